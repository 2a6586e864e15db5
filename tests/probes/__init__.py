"""The parts of the core that only compiled code reaches, as Python objects; built for the tests alone."""

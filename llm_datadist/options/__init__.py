"""The options of ``init``: parsed once, every value checked, and the endpoints they describe."""

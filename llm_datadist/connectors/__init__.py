"""Connectors: this package inside serving engines. Each imports its engine only when the engine loads it."""

"""Older path of `llm_datadist.utils`."""

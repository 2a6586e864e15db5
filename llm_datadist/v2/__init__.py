"""Older import paths of the cache manager generation. They give the same objects as `llm_datadist`."""

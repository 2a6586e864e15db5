"""Older path of `llm_datadist.v2.config`: the very same objects."""
from llm_datadist.v2.config import ClusterConfig, EngineConfig

__all__ = ["ClusterConfig", "EngineConfig"]

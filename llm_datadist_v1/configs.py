"""Older path of `llm_datadist.configs`: the very same objects."""
from llm_datadist.configs import LLMClusterInfo, LLMConfig, LlmConfig, LLMRole, trans_str_ip

__all__ = ["LLMClusterInfo", "LLMConfig", "LlmConfig", "LLMRole", "trans_str_ip"]

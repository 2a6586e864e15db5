"""Command line tools, installed as ``llm_datadist.tools``; each one is a subcommand of ``llm-datadist``."""

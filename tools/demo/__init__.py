"""Disaggregated inference in two processes: a prefill process fills KV caches, a decode process pulls and uses them.

`model` is a small decoder-only transformer, `kv` the two layouts it keeps its keys and values in, `workload` the
requests and their limits, `prefill` and `decode` the two sides, `command` the ``llm-datadist demo`` front.
"""

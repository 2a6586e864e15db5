"""Benchmarks: ``llm-datadist bench`` and ``llm-datadist kvbench``.

One process measures (`worker`), others own the caches it reads and writes (`peer`), and the command starts, waits for
and reports on them. Every measured row is interleaved with what the machine itself does with the same bytes, because
machines drift: ratios are taken between neighbours in time.
"""

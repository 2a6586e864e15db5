"""Type checkers of clients see a misspelt keyword, also where the API takes keywords of any name."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llm_datadist

pytest.importorskip("mypy")

CLIENT = """
from llm_datadist import BlocksCacheKey, Cache, CacheKey, CacheManager, KvCache, KvCacheManager

def right(m: CacheManager, v1: KvCacheManager, key: CacheKey, blocks: BlocksCacheKey, c: Cache, kv: KvCache) -> None:
    m.pull_cache(key, c, src_layer_range=range(1), dst_layer_range=None, tensor_num_per_layer=2)
    m.pull_blocks(blocks, c, [0], [0], src_layer_range=range(1))
    v1.pull_cache(key, kv, 0, -1, src_cache_offset=8, dst_cache_offset=None, src_layer_range=range(1))
    m.allocate_cache(c.cache_desc, cache_keys=[key])

def wrong(m: CacheManager, v1: KvCacheManager, key: CacheKey, blocks: BlocksCacheKey, c: Cache, kv: KvCache) -> None:
    m.pull_cache(key, c, src_layers=range(1))
    m.pull_cache(key, c, src_cache_offset=8)
    m.pull_blocks(blocks, c, [0], [0], tensor_num_per_layer="2")
    v1.pull_blocks(blocks, kv, [0], [0], src_cache_offset=8)
    m.allocate_cache(c.cache_desc, cache_key=[key])
"""


def test_keywords(tmp_path):
    client = tmp_path / "client.py"
    client.write_text(CLIENT, encoding="utf-8")
    root = str(Path(llm_datadist.__file__).parent.parent)
    shown = {} if "site-packages" in root else {"MYPYPATH": root}
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", str(client)], capture_output=True, text=True,
                          timeout=110, check=False, cwd=tmp_path, env={**os.environ, **shown})
    found = {int(line) for line in re.findall(r"^client\.py:(\d+): error", done.stdout, re.M)}
    first = CLIENT.split("\n").index(next(line for line in CLIENT.split("\n") if line.startswith("def wrong"))) + 2
    assert found == set(range(first, first + 5)), done.stdout

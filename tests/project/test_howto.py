"""The examples of the documentation, run as they stand there."""
import asyncio
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peers

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LLMDataDist,
    LLMException,
    LLMLinkError,
    LLMRole,
    LLMStatusCode,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def examples():
    """Everything that the code blocks of the pages define."""
    found = {}
    for page in ("howto.md", "errors.md"):
        for indent, code in re.findall(r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text("utf-8"), re.M | re.S):
            if "setLevel" not in code:
                exec(re.sub(rf"^{indent}", "", code, flags=re.M), found)
    return found


def fill(node, desc, key, num_blocks):
    cache = node.cache_manager.allocate_blocks_cache(desc, key)
    for index, tensor in enumerate(cache.tensors()):
        tensor[:] = index + np.arange(num_blocks).reshape(num_blocks, *[1] * (tensor.ndim - 1))
    return cache.tensor_addrs



def test_two_engines(examples, tmp_path):
    """Embed, register, link, pull, follow layers, forget."""
    with Peers() as peers:
        there = peers.start(2)
        there.leftovers_allowed = True
        engine = examples["open_engine"](LLMRole.MIX, 1, "localhost:0")
        with engine:
            assert engine.listen_address[0] == "127.0.0.1" and engine.listen_address[1] > 0
            cache, tensors = examples["register_paged_cache"](engine, 2, 4, (8,))
            assert examples["link"](engine, 2, *there.address) and examples["link"](engine, 2, *there.address)
            addresses = there.call(fill, CacheDesc(4, [4, 8], DataType.DT_FLOAT), BlocksCacheKey(2), 4)
            pull = examples["pull_or_recompute"]
            assert pull(engine.cache_manager, BlocksCacheKey(2), cache, [3], [0]) == []
            assert [tensor[0].tolist() for tensor in tensors] == [[3.0 + index] * 8 for index in range(4)]
            assert pull(engine.cache_manager, BlocksCacheKey(2, 5), cache, [3], [0]) == [0]
            assert pull(engine.cache_manager, BlocksCacheKey(9), cache, [3, 1], [0, 2]) == [0, 2]
            with pytest.raises(LLMException):
                pull(engine.cache_manager, BlocksCacheKey(2), cache, [9], [0])
            events = [threading.Event() for _ in range(2)]
            task = examples["send"](engine.cache_manager, cache, events, 2, addresses)
            for event in events:
                event.set()
            assert asyncio.run(_result(task)) is LLMStatusCode.LLM_SUCCESS and task.progress == [(2, 2)]
            key = CacheKey(1, 5)
            made = engine.cache_manager.allocate_cache(CacheDesc(1, [1, 8], DataType.DT_FLOAT), [key])
            taken = engine.stats()["device_pool"]
            assert taken["bytes"] - taken["free_bytes"] == examples["cache_bytes"](made.cache_desc)
            assert examples["oldest"](engine) == [f"cache {made.cache_id}: 32 bytes, open, keys req_id=5"]
            result = examples["traced"](engine, tmp_path / "run.json", lambda: examples["forget"](engine, key, made))
            assert result["engines"] == 1 and result["events"] >= 2 and (tmp_path / "run.json").stat().st_size
            trace = "4bf92f3577b34da6a3ce929d0e0e4736"
            headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
            examples["traced"](engine, tmp_path / "run.json", lambda: examples["pull_for"](
                headers, engine.cache_manager, BlocksCacheKey(2), cache, [2], [1]))
            assert '"name":"pull"' in (text := (tmp_path / "run.json").read_text()) and trace in text
            examples["forget"](engine, key, made)
            assert engine.stats()["keys"] == 1                      # that of the blocks
            engine.cache_manager.unregister_cache(cache.cache_id)
    assert LLMDataDist.llm_engine_instance is None and issubclass(LLMLinkError, ConnectionError)


async def _result(task):
    return await task

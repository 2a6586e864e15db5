"""The prefill process: runs the prompts, leaves their keys and values to be pulled, and counts what is left.

It talks to the decode process over the pipe it was started with: ``(kind, content)`` tuples, out "listening", one
"filled" per request, "counts" or "failed"; in "finish". The cache itself never goes through the pipe.
"""
from __future__ import annotations

import faulthandler
import sys
import traceback
from multiprocessing.connection import Connection

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMDataDist, LLMException, LLMRole

from . import kv, workload
from .engine import counts, free_port, open_engine
from .model import Transformer, greedy

_BLOCKS_SEED = 11
_PORT_ATTEMPTS = 5


def main(connection: Connection, settings: workload.Settings) -> None:
    """Serve one run; any failure is reported to the decode process with its traceback, and as exit status 1."""
    faulthandler.enable()
    try:
        _serve(connection, settings)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)                         # the decode process is gone or going: nobody is left to tell
    except Exception:
        connection.send(("failed", traceback.format_exc()))
        sys.exit(1)


def _serve(connection: Connection, settings: workload.Settings) -> None:
    engine, port = _listen(settings)
    try:
        manager = engine.cache_manager
        blocks_desc = CacheDesc(settings.num_tensors, settings.blocks_shape, DataType.DT_FLOAT)
        blocks_key = BlocksCacheKey(workload.PREFILL_CLUSTER_ID, workload.BLOCKS_MODEL_ID)
        blocks_cache = manager.allocate_blocks_cache(blocks_desc, blocks_key)
        tables = kv.scatter_tables(settings.lengths, settings.block_tokens, settings.total_blocks, _BLOCKS_SEED)
        model = Transformer(settings.model)
        connection.send(("listening", {"port": port}))
        for request, table in enumerate(tables):
            paged = kv.PagedKV(blocks_cache.tensors(), table)
            filled = _fill(manager, settings, model, request, paged)
            connection.send(("filled", {**filled, "block_table": table.tolist(), "counts": counts(engine)}))
        connection.recv()                   # "finish": all pulls are done
        manager.deallocate_blocks_cache(blocks_cache)
        connection.send(("counts", counts(engine)))
    finally:
        engine.finalize()


def _listen(settings: workload.Settings) -> tuple[LLMDataDist, int]:
    """Return an engine and its port; another port is tried when somebody takes the chosen one in between."""
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        port = free_port()
        try:
            engine = open_engine(
                LLMRole.PROMPT, workload.PREFILL_CLUSTER_ID, settings, num_slots=len(settings.prompts), port=port
            )
        except LLMException:
            if attempt == _PORT_ATTEMPTS:
                raise
        else:
            return engine, port
    raise AssertionError("the last attempt returns or raises")


def _fill(manager, settings: workload.Settings, model: Transformer, request: int, paged: kv.PagedKV) -> dict:
    """Run one prompt into a cache of its own, copy it into blocks too, and let go of the cache: its key keeps it."""
    prompt = list(settings.prompts[request])
    key = CacheKey(prompt_cluster_id=workload.PREFILL_CLUSTER_ID, req_id=request)
    desc = CacheDesc(settings.num_tensors, settings.slot_shape, DataType.DT_FLOAT)
    cache = manager.allocate_cache(desc, [key])
    slot = kv.ContiguousKV(cache.tensors())
    first_token = greedy(model.prefill(prompt, slot))
    kv.copy_tokens(slot, paged, len(prompt))
    filled = {"request": request, "first_token": first_token, "digest": kv.digest(slot, len(prompt))}
    manager.deallocate_cache(cache)
    return filled

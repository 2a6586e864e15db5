"""One engine at a time in the test's own process, with caches, for tests of what a call accepts and refuses.

A refused call must leave everything as it was: `Bench.unchanged` compares what the engine holds, and every byte of the
caches, before and after.
"""
from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, Callable, Dict, Iterator, List, Optional, Type

import numpy as np
from support.peer import Here, engine_options, engine_options_v1
from transfers.caches import addrs_of, bytes_at

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMDataDist,
    LLMRole,
    Placement,
)

CLUSTER = 1
PEER = 7                            # a cluster that there is no link to
NO_ID = 2**64 - 1
KEY, PREFIX = CacheKey(PEER, 1), CacheKey(PEER, NO_ID, 0, 1)
BY_ID, BLOCKS = CacheKeyByIdAndIndex(PEER, 1), BlocksCacheKey(PEER)
NOT_UINT32 = [("1", "TE"), (1.0, "TE"), (None, "TE"), (-1, "VE"), (2**32, "VE")]
NOT_UINT64 = [("1", "TE"), (1.0, "TE"), (None, "TE"), (-1, "VE"), (2**64, "VE")]
NOT_INT64 = [("1", "TE"), (1.0, "TE"), (None, "TE"), (2**63, "VE"), (-2**63 - 1, "VE")]
BYTES = DataType.DT_UINT8
SLOTS, SLOT_BYTES = 3, 16           # of the caches of a bench: two layers of two tensors each
TENSORS = 4
POOL_BYTES = 1 << 20


def desc(num_tensors: int = TENSORS, shape: Any = (SLOTS, SLOT_BYTES),
         placement: Placement = Placement.DEVICE) -> CacheDesc:
    """A descriptor of bytes."""
    return CacheDesc(num_tensors, list(shape), BYTES, placement)


def _v2(**options: Any) -> Callable[[], Dict[str, str]]:
    return lambda: engine_options(**{"device_pool": POOL_BYTES, "host_pool": POOL_BYTES, "listen": False, **options})


def _v1() -> Dict[str, str]:
    return {**engine_options_v1(device_pool=POOL_BYTES), "llm.EnableSwitchRole": "1"}


# Name of an engine -> its options and role.
ENGINES: Dict[str, Any] = {
    "pools": (_v2(), LLMRole.MIX),
    "lenient": (_v2(llm_Strict="0"), LLMRole.MIX),
    "remote": (_v2(remote_accessible=True), LLMRole.MIX),
    "bare": (_v2(device_pool=0, host_pool=0), LLMRole.MIX),
    "device only": (_v2(host_pool=0), LLMRole.MIX),
    "prompt": (_v1, LLMRole.PROMPT),
    "decoder": (_v1, LLMRole.DECODER),
    "mix": (_v1, LLMRole.MIX),
}


class Bench:
    """An engine with caches of either layout and placement, filled with different bytes.

    Attributes
    ----------
    dist : LLMDataDist
    m : CacheManager or KvCacheManager
        Its manager; the name is short because the tables of calls use it in every line.
    slots, blocks, host_slots, host_blocks, cpu, registered
        Caches; None where the engine can have none of this kind.
    """

    def __init__(self, name: str) -> None:
        options, role = ENGINES[name]
        self.name = name
        self._process = Here({})
        try:
            self._process.open(CLUSTER, options(), role)
            self.dist: LLMDataDist = self._process.node.dist
            self.m: Any = self._process.node.cache_manager
            self._buffers: List[np.ndarray] = []
            self.is_v1 = hasattr(self.m, "get_cache_tensors")
            self._make_caches()
        except BaseException:
            self._process.end()
            raise

    def _make_caches(self) -> None:
        stats = self.dist.stats()
        has_device, has_host = stats["device_pool"] is not None, stats["host_pool"] is not None
        on_host = Placement.HOST
        self.slots = self.m.allocate_cache(desc()) if has_device else None
        self.blocks = self.m.allocate_blocks_cache(desc()) if has_device else None
        self.host_slots = self.m.allocate_cache(desc(placement=on_host)) if has_host else None
        self.host_blocks = self.m.allocate_blocks_cache(desc(placement=on_host)) if has_host else None
        kind: Any = KvCache if self.is_v1 else Cache
        self.cpu = kind.create_cpu_cache(desc(placement=on_host), self.addrs())
        self.registered = None if self.is_v1 else self.m.register_blocks_cache(desc(), self.addrs())
        for number, cache in enumerate(self.caches()):
            for index, tensor in enumerate(self._tensors(cache)):
                tensor[:] = 16 * number + index + 1

    def addrs(self, count: int = TENSORS, num_bytes: int = SLOTS * SLOT_BYTES) -> List[int]:
        """Addresses of memory that lives as long as the bench."""
        made = [np.zeros(num_bytes, np.uint8) for _ in range(count)]
        self._buffers += made
        return [buffer.ctypes.data for buffer in made]

    def caches(self) -> List[Any]:
        """The caches there are."""
        every = (self.slots, self.blocks, self.host_slots, self.host_blocks, self.cpu, self.registered)
        return [cache for cache in every if cache is not None]

    @staticmethod
    def _tensors(cache: Any) -> List[np.ndarray]:
        return [bytes_at(addr, cache.cache_desc.size) for addr in addrs_of(cache)]

    def state(self) -> Dict[str, Any]:
        """What the engine holds, and what its caches contain."""
        engine = self.dist._require_engine()
        return {
            "stats": {key: value for key, value in self.dist.stats().items() if key != "requests"},
            "caches": sorted(({key: row[key] for key in row if key != "age_s"} for row in engine.caches()),
                             key=lambda row: row["cache_id"]),
            "links": [{key: row[key] for key in ("cluster_id", "state", "origin")} for row in self.dist.links()],
            "listens": self.dist.listen_address,
            "handles": [list(addrs_of(cache)) for cache in self.caches()],
            "bytes": [[tensor.tobytes() for tensor in self._tensors(cache)] for cache in self.caches()],
        }

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Assert that the block leaves everything as it was."""
        before = self.state()
        yield
        assert self.state() == before

    def close(self) -> None:
        """Finalise the engine."""
        self._process.end()


class Benches:
    """Benches by name, for a whole module: the one that was asked for last is open."""

    def __init__(self) -> None:
        self._open: Optional[Bench] = None

    def __call__(self, name: str) -> Bench:
        if self._open is None or self._open.name != name:
            self.close()
            self._open = Bench(name)
        return self._open

    def close(self) -> None:
        """Finalise the engine that is open."""
        bench, self._open = self._open, None
        if bench is not None:
            bench.close()

    def __enter__(self) -> "Benches":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], value: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()


def rows(*lines: Any, engine: str = "pools") -> List[Any]:
    """Parameters (engine, call, kind of error) of lines (call, kind) or (call, kind, engine)."""
    return [(line[2] if len(line) > 2 else engine, line[0], line[1]) for line in lines]


def refused(benches: Benches, assert_raises: Callable[..., Exception], engine: str, call: Callable[[Bench], Any],
            kind: str) -> Exception:
    """Make a call on the bench of that name: it fails as it must, and nothing has changed."""
    bench = benches(engine)
    with bench.unchanged():
        return assert_raises(kind, call, bench)


class Synchronizer(LayerSynchronizer):
    """Says what it is told to, and notes which layers it was asked for."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.layers: List[Any] = []

    def synchronize_layer(self, layer_index: int, timeout_in_millis: Optional[int]) -> bool:
        """Note the layer and answer."""
        self.layers.append((layer_index, timeout_in_millis))
        return self.answer

"""The workers' half: this package's engine over vLLM's KV cache.

One in each Worker process, used by its main thread. The engine is opened when the caches are known; from then on
others fetch blocks from here without this process taking part, and what is fetched from others is the work of a few
threads, which sleep while there is none.
"""
from __future__ import annotations

import ctypes
import json
import secrets
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from llm_datadist import Cache, CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
from llm_datadist.connectors.vllm.block_tables import BlockTables
from llm_datadist.connectors.vllm.holds import Holds
from llm_datadist.connectors.vllm.layout import BlocksLayout
from llm_datadist.connectors.vllm.links import Links
from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.metadata import Endpoint, Metadata, WorkerCard
from llm_datadist.connectors.vllm.pulls import Pulls
from llm_datadist.connectors.vllm.pushes import Pushes
from llm_datadist.connectors.vllm.receives import Receives
from llm_datadist.connectors.vllm.settings import Settings
from llm_datadist.connectors.vllm.stats import TransferStats

__all__ = ["WorkerHalf"]

_PAGE_SHIFT = 12
_PAGE_BYTES = 1 << _PAGE_SHIFT
_CLUSTER_ID_BITS = 52           # ids travel in JSON, which some proxies read as floating point numbers


class WorkerHalf:
    """One worker's engine and what it does for the scheduler.

    Parameters
    ----------
    settings : Settings
        Options.
    rank : int
        Tensor parallel rank.
    layouts : sequence of BlocksLayout
        The KV cache.
    digest : str
        Its digest.
    serves : bool
        Whether others come here, so that it listens.
    places : mapping of str to (int, int), optional
        Where the blocks of each layer lie, as `layer_places` says; for pushes.
    """

    def __init__(self, settings: Settings, rank: int, layouts: Sequence[BlocksLayout], digest: str,
                 serves: bool, places: Optional[Mapping[str, Tuple[int, int]]] = None) -> None:
        self._settings = settings
        self._rank = rank
        self._layouts = list(layouts)
        self._digest = digest
        self._serves = serves
        self._places = places
        self._engine: Optional[LLMDataDist] = None
        self._caches: List[Tuple[BlocksLayout, Cache]] = []
        self._pulls: Optional[Pulls] = None
        self._holds: Optional[Holds] = None
        self._tables: Optional[BlockTables] = None
        self._pushes: Optional[Pushes] = None
        self._receives: Optional[Receives] = None
        self._failed_blocks: Set[int] = set()
        self._stats = TransferStats()

    # ------------------------------------------------------------------------------------------------ life cycle

    def open(self, pool_bytes: int = 0) -> LLMDataDist:
        """Open the engine, once; `pool_bytes` are taken for its pool."""
        if self._engine is None:
            settings = self._settings
            config = LLMConfig()
            config.device_id = 0
            config.enable_cache_manager = True
            config.sync_kv_timeout = settings.pull_timeout_ms
            config.enable_remote_cache_accessible = self._places is not None
            if self._serves:
                port = settings.listen_port + self._rank if settings.listen_port else 0
                config.listen_ip_info = f"{settings.listen_host}:{port}"
            if pool_bytes:
                config.mem_pool_cfg = json.dumps({"memory_size": pool_bytes, "page_shift": _PAGE_SHIFT})
            options = {**config.generate_options(), "llm.Provider": settings.provider}
            # A new name each time: what another engine knows about a process that was here before leads nowhere.
            engine = LLMDataDist(LLMRole.MIX, secrets.randbits(_CLUSTER_ID_BITS) | 1)
            engine.init(options)
            self._engine = engine
        return self._engine

    def take_from_pool(self, num_bytes: int) -> "Optional[np.ndarray[Any, Any]]":
        """Take the KV cache from the pool of the engine, which is opened for that.

        Parameters
        ----------
        num_bytes : int
            Size of vLLM's buffer.

        Returns
        -------
        numpy.ndarray of uint8, shape (num_bytes,), or None
            Zeros, as the pool is new; this package's memory, good until `close`. None where the layers do not fill the
            buffer one after the other, as the tensors of a cache do.
        """
        if len(self._layouts) != 1 or self._engine is not None:
            return None
        layout = self._layouts[0]
        is_dense = layout.offsets == tuple(range(0, num_bytes, layout.place_bytes))
        if not is_dense or len(layout.offsets) * layout.place_bytes != num_bytes or layout.place_bytes % _PAGE_BYTES:
            log.warning("kv_in_pool: the layers of this model are not laid out one after the other in whole pages; "
                        "the KV cache is registered instead")
            return None
        engine = self.open(num_bytes)
        cache = engine.cache_manager.allocate_blocks_cache(
            CacheDesc(len(layout.offsets), [layout.num_blocks, layout.block_bytes], DataType.DT_UINT8))
        start = cache.tensor_addrs[0]
        if cache.tensor_addrs != [start + offset for offset in layout.offsets]:
            raise RuntimeError("the tensors of the pool do not follow each other")
        self._caches.append((layout, cache))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(start))

    def register(self, base_addr: int) -> None:
        """Make the KV cache known to the engine; `base_addr` is the first byte of vLLM's buffer."""
        manager = self.open().cache_manager
        if self._caches:                                # in the pool already
            self._start()
            return
        for layout in self._layouts:
            # Without a key for all blocks: others get at those of a request alone, by the key it holds.
            desc = CacheDesc(len(layout.offsets), [layout.num_blocks, layout.block_bytes], DataType.DT_UINT8)
            cache = manager.register_blocks_cache(desc, [base_addr + offset for offset in layout.offsets], None,
                                                  self._places is not None)
            self._caches.append((layout, cache))
        self._start()

    def _start(self) -> None:
        settings, engine = self._settings, self.open()
        self._holds = Holds(engine, [cache for _, cache in self._caches], settings.lease_ms)
        links = Links(engine, settings.link_timeout_ms)
        self._pulls = Pulls(engine, self._caches, links, self._rank, settings.pull_threads, settings.chunk_bytes)
        if self._places is not None:
            self._tables = BlockTables(engine)
            self._pushes = Pushes(engine, self._caches, self._places, self._tables, links, self._rank,
                                  settings.lease_ms)
            self._receives = Receives(engine, self._caches, self._tables, settings.push_timeout_ms)
        shapes = ", ".join(f"{len(layout.offsets)} x {layout.num_blocks} blocks of {layout.block_bytes} bytes"
                           for layout in self._layouts)
        log.info("cluster %s, rank %s, listens at %s; KV cache in %s, %s", engine.cluster_id, self._rank,
                 engine.listen_address, "vLLM's memory" if self._caches[0][1].is_registered else "the shared pool",
                 shapes)

    def card(self) -> WorkerCard:
        """Where this worker is reached, and what lies there."""
        engine = self.open()
        host, port = engine.listen_address or (self._settings.listen_host, 0)
        return WorkerCard(Endpoint(engine.cluster_id, host, port), self._digest)

    def close(self) -> None:
        """End the transfers, within their deadlines, and the engine."""
        if self._pulls is not None:
            self._pulls.close()
        if self._pushes is not None:
            self._pushes.close()
        if self._engine is not None:
            manager = self._engine.cache_manager
            if self._tables is not None:
                self._tables.close()
            for _, cache in self._caches:
                if cache.is_registered:
                    manager.unregister_cache(cache.cache_id)
                else:
                    manager.deallocate_blocks_cache(cache)
            self._caches = []
            self._engine.finalize()
            self._engine = None

    # ------------------------------------------------------------------------------------------------- each step

    def bind(self, metadata: Metadata) -> None:
        """Take in which blocks others may fetch; before the step computes anything."""
        holds = self._holds
        if holds is None:
            return
        for request_id, key in metadata.holds.items():
            holds.hold(request_id, key)
        for request_id in metadata.leases:
            holds.lease(request_id)
        for request_id in metadata.drops:
            holds.drop(request_id)
        if self._receives is not None and self._pushes is not None:
            self._bind_pushes(metadata, self._receives, self._pushes)

    @staticmethod
    def _bind_pushes(metadata: Metadata, receives: Receives, pushes: Pushes) -> None:
        for expectation in metadata.expects:
            receives.expect(expectation)
        for request_id in metadata.withdraws:
            receives.withdraw(request_id)
        for request_id, keeps in metadata.ends.items():
            if keeps:
                pushes.finish(request_id)
            else:
                pushes.drop(request_id)
        for request_id in metadata.restarts:
            pushes.restart(request_id)
        for push in metadata.pushes:
            pushes.start(push)
        pushes.begin_step(metadata.chunks)

    def tick(self, layer: str) -> None:
        """A layer of this step was computed."""
        if self._pushes is not None:
            self._pushes.tick(layer)

    def end_step(self) -> None:
        """All layers of this step were."""
        if self._pushes is not None:
            self._pushes.end_step()

    def start_pulls(self, metadata: Metadata) -> None:
        """Start to fetch what the scheduler asks for."""
        if self._pulls is not None:
            for order in metadata.pulls:
                self._pulls.start(order)

    def take_results(self) -> Tuple[Set[str], Set[str], Set[str]]:
        """Return the requests whose blocks were taken or given up, that have theirs, and of those, that failed."""
        if self._pulls is None or self._holds is None:
            return set(), set(), set()
        sent: Set[str] = set()
        events = self.open().cache_manager.take_key_events()
        if self._receives is not None:
            events = [event for event in events if not self._receives.take_event(event)]
        for request_id, outcome in self._holds.take_ended(events):
            sent.add(request_id)
            self._stats.count(f"blocks_{outcome.name.lower()}")
        received: Set[str] = set()
        failed: Set[str] = set()
        for result in self._pulls.take_ended():
            if not result.order.waits:
                continue
            received.add(result.order.request_id)
            if result.error is None:
                self._stats.record("pull", result.seconds, result.num_bytes)
                continue
            self._stats.count("failed_pulls")
            if len(result.order.dst_blocks) == 1:
                self._failed_blocks |= result.failed_blocks     # those before the first one are kept
            else:
                failed.add(result.order.request_id)             # block ids do not tell the group
        if self._receives is not None and self._pushes is not None:
            self._take_received(self._receives, received, failed)
            self._take_pushed(self._pushes, sent)
        return sent, received, failed

    def _take_received(self, receives: Receives, received: Set[str], failed: Set[str]) -> None:
        for result in receives.take_ended():
            if not result.order.waits:
                continue
            received.add(result.order.request_id)
            if result.arrived:
                self._stats.record("receive", result.seconds, result.num_bytes)
            else:
                self._stats.count("failed_receives")
                failed.add(result.order.request_id)

    def _take_pushed(self, pushes: Pushes, sent: Set[str]) -> None:
        ended, results = pushes.take_ended()
        sent.update(ended)
        for result in results:
            if result.error is None:
                self._stats.record("push", result.seconds, result.num_bytes)
            else:
                self._stats.count("failed_pushes")

    def take_failed_blocks(self) -> Set[int]:
        """Return the blocks that did not arrive, of requests that ended by now."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_stats(self) -> Optional[TransferStats]:
        """Return what was counted since the last call; None when that is nothing."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, TransferStats()
        return stats

    def held(self) -> Dict[str, int]:
        """What this worker's engine holds at this moment, for tests and for whoever looks for a leak."""
        stats = self.open().stats()
        return {**{name: int(stats[name]) for name in ("caches", "pins", "holds", "links")},
                "requests": len(self._holds or ()), "pulls": self._pulls.num_running if self._pulls else 0,
                "pushes": len(self._pushes or ()), "receives": len(self._receives or ())}

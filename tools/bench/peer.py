"""A process that owns the caches which the measuring process reads and writes.

It does what `channel.serve` reads from its connection and nothing on its own. Started by this host's command or, for a
measurement between machines, by ``llm-datadist bench --listen``.
"""
from __future__ import annotations

import faulthandler
import itertools
import os
import resource
import threading
import time
from multiprocessing.connection import Connection

from llm_datadist import CacheDesc, CacheKey, DataType, LLMDataDist, LLMRole
from llm_datadist.core.engine.engine import KEY_BLOCKS, Engine
from llm_datadist.options.parser import EngineOptions

from . import engine as engines
from .case import Case, descriptors
from .channel import Channel, serve
from .memory import clear, fill, tensor_views, wrong_bytes
from .native.bound_tcp import TcpServer

MAX_POOL_BYTES = 1 << 40


def main(connection: Connection, environ: dict[str, str], listen_ip: str) -> None:
    """Serve one session.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        Commands in, answers out; its end ends the process.
    environ : dict of str to str
        Set before the engine is opened; the host provider reads its settings there.
    listen_ip : str
        Address that engines and reference servers of this process listen at.
    """
    faulthandler.enable()
    os.environ.update(environ)
    peer = Peer(listen_ip)
    try:
        serve(Channel(connection, "the measuring process"), peer.handlers())
    except KeyboardInterrupt:
        pass
    finally:
        peer.close()


class Peer:
    """The commands, and what they have opened."""

    def __init__(self, listen_ip: str) -> None:
        self._ip = listen_ip
        self._engine: LLMDataDist | None = None
        self._case: Case | None = None
        self._link = 0
        self._memory: engines.Memory | None = None
        self._views: list = []
        self._reference: TcpServer | None = None
        self._published: list[CacheKey] = []
        self._churn_ids = itertools.count(1 << 50)
        self._spinner: threading.Thread | None = None
        self._spinning = False
        self._crowd: list = []

    def handlers(self) -> dict:
        """Return the commands by name."""
        return {
            "hello": self.hello, "open": self.open, "prepare": self.prepare, "reference": self.reference,
            "clear": self.clear_memory, "verify": self.verify, "publish": self.publish, "hold": self.hold,
            "churn": self.churn, "cpu": self.cpu, "pins": self.pins, "spin": self.spin, "crowd": self.crowd,
            "shut": self.shut,
        }

    def hello(self) -> dict:
        """Say who this is; the boot id tells whether two processes share a host."""
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as source:
            boot_id = source.read().strip()
        return {"pid": os.getpid(), "boot_id": boot_id, "ip": self._ip}

    def open(self, cluster_id: int, pool_bytes: int, page_shift: int, remote_accessible: bool) -> dict:
        """Open the engine."""
        self.shut()
        if not 0 <= pool_bytes <= MAX_POOL_BYTES:
            raise ValueError(f"pool_bytes={pool_bytes} is not allowed; at most {MAX_POOL_BYTES}")
        self._engine, port = engines.open_engine(
            cluster_id, pool_bytes, remote_accessible, self._ip, page_shift=page_shift)
        return {"port": port}

    def prepare(self, case: dict, link: int) -> dict:
        """Make the case's cache: with the pattern in it, or cleared when it is to be written."""
        self._case, self._link = Case.from_dict(case), link
        if self._case.operation == "pull_key":
            return {"addrs": [], "cache_id": 0}
        self._memory = engines.Memory(self._engine, self._case, keys=True)
        self._views = tensor_views(self._memory.addrs, self._case.capacity, self._case.block_bytes)
        clear(self._views) if self._case.is_push else fill(self._views, link)
        return {"addrs": self._memory.addrs, "cache_id": self._memory.cache.cache_id}

    def reference(self) -> dict:
        """Serve the case's blocks over plain sockets as well."""
        src, dst = self._case.block_lists(self._link)
        blocks = dst if self._case.is_push else src
        rows = descriptors(self._memory.addrs, self._memory.addrs, blocks, blocks, self._case.block_bytes)
        self._reference = TcpServer(self._ip, rows)
        return {"port": self._reference.port}

    def clear_memory(self) -> dict:
        """Overwrite the cache."""
        clear(self._views)
        return {}

    def verify(self, corrupt: bool) -> dict:
        """Compare the cache with what a push must have left; `corrupt` damages one byte first."""
        src, dst = self._case.block_lists(self._link)
        if corrupt:
            self._views[-1][dst[-1], -1] ^= 0x40
        count, where = wrong_bytes(self._views, self._link, src, dst)
        return {"wrong_bytes": count, "where": where}

    def publish(self, first_id: int, count: int, num_tensors: int, slot_bytes: int, fill_first: bool = False) -> dict:
        """Allocate caches under the request keys `first_id`... and give up their handles.

        Keys that an earlier call published and nobody took are removed.
        """
        manager = self._engine.cache_manager
        for key in self._published:
            manager.remove_cache_key(key)
        self._published = [CacheKey(0, req_id) for req_id in range(first_id, first_id + count)]
        desc = CacheDesc(num_tensors, [1, slot_bytes], DataType.DT_INT8)
        for index, key in enumerate(self._published):
            cache = manager.allocate_cache(desc, [key])
            if fill_first and index == 0:
                fill(tensor_views(cache.tensor_addrs, 1, slot_bytes), self._link)
            manager.deallocate_cache(cache)
        return {"keys": self._engine.stats()["keys"]}

    def hold(self, count: int, first_id: int, slot_bytes: int) -> dict:
        """Keep `count` caches alive by two request keys each, `first_id` and on."""
        manager, desc = self._engine.cache_manager, CacheDesc(1, [2, slot_bytes], DataType.DT_INT8)
        for req_id in range(first_id, first_id + 2 * count, 2):
            manager.deallocate_cache(manager.allocate_cache(desc, [CacheKey(0, req_id), CacheKey(0, req_id + 1)]))
        return {"keys": self._engine.stats()["keys"]}

    def churn(self, count: int, slot_bytes: int) -> dict:
        """Bind and remove keys of caches that are deallocated, `count` times; nanoseconds of either step."""
        manager, desc = self._engine.cache_manager, CacheDesc(1, [1, slot_bytes], DataType.DT_INT8)
        took: dict[str, list[int]] = {"remove": [], "deallocate": []}
        for _ in range(count):
            key = CacheKey(0, next(self._churn_ids))
            cache = manager.allocate_cache(desc, [key])
            before = time.perf_counter_ns()
            manager.remove_cache_key(key)
            between = time.perf_counter_ns()
            manager.deallocate_cache(cache)
            took["deallocate"].append(time.perf_counter_ns() - between)
            took["remove"].append(between - before)
        return took

    def cpu(self) -> dict:
        """Processor time of this process so far."""
        return {"cpu_ns": time.process_time_ns()}

    def pins(self) -> dict:
        """How many transfers of others hold a cache of this process."""
        return {"pins": self._engine.stats()["pins"]}

    def spin(self, on: bool) -> dict:
        """Keep the interpreter of this process busy with pure Python, or stop that."""
        if self._spinner is not None:
            self._spinning = False
            self._spinner.join()
            self._spinner = None
        if on:
            self._spinning = True
            self._spinner = threading.Thread(target=self._spin, name="spin", daemon=True)
            self._spinner.start()
        return {}

    def _spin(self) -> None:
        count = 0
        while self._spinning:
            count += 1

    def crowd(self, first_cluster_id: int, count: int, pool_bytes: int, block_bytes: int, model_id: int) -> dict:
        """Open many small engines in this process, with a cache of one block each; none closes those that are open.

        The facade allows one engine per process, the core does not: this way hundreds of peers need few processes.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for engine in self._crowd:
            engine.close()
        self._crowd = []
        ports = []
        for cluster_id in range(first_cluster_id, first_cluster_id + count):
            options = engines.options(pool_bytes, False, None)
            engine = Engine(EngineOptions.parse(options, LLMRole.MIX, cluster_id), cluster_id)
            self._crowd.append(engine)
            engine.set_listener((self._ip, 0))
            engine.allocate(1, 1, block_bytes, False, True, [(0, KEY_BLOCKS, 2**64 - 1, model_id)])
            ports.append(engine.listener[1])
        return {"ports": ports}

    def shut(self) -> dict:
        """Close what a case has opened."""
        if self._reference is not None:
            self._reference.close()
            self._reference = None
        self._views = []
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._engine is not None:
            self._published = []
            self._engine.finalize()
            self._engine = None
        self._case = None
        return {}

    def close(self) -> None:
        """Close everything."""
        self.spin(False)
        self.crowd(0, 0, 0, 0, 0)
        self.shut()

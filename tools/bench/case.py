"""What one row of a sweep measures, and which blocks take part.

Both sides of a transfer derive the same block lists from the same `Case`, so only the case travels between them.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

OPERATIONS = ("pull_blocks", "pull_cache", "pull_key", "push_blocks", "push_cache")
PATHS = ("shm", "cma", "tcp")
MEMORIES = ("pool", "registered")
PAGED_TENSORS = 122
DEFAULT_STREAMS = 2
ALL_BLOCKS = 0
MAX_LINKS = 64

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SEED = 20240229


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes
    ----------
    operation : str
        ``pull_blocks``, ``push_blocks``: blocks to blocks; ``pull_cache``, ``push_cache``: one slot, by cache id;
        ``pull_key``: one slot by request key, released by the pull, so that each pull takes another cache.
    path : str
        Data path the processes are restricted to: ``shm``, ``cma`` or ``tcp``.
    memory : str
        ``pool``, or ``registered``: private memory of the caller, on both sides.
    block_bytes : int
        One block; of the operations on slots, one slot.
    num_blocks : int
        Blocks per tensor and operation; 1 for slots.
    run_blocks : int
        How many blocks in a row lie in a row on both sides; `ALL_BLOCKS`: all of them.
    num_tensors : int
    num_links : int
        Peers that are read from (or written to) at the same time, each with all of the above.
    num_threads : int
        Copying threads of the measuring process.
    num_streams : int
        TCP connections per link.
    group : str
        A name that rows share; goals refer to it.
    """

    operation: str
    path: str
    memory: str
    block_bytes: int
    num_blocks: int
    run_blocks: int
    num_tensors: int
    num_links: int
    num_threads: int
    num_streams: int
    group: str = ""

    @classmethod
    def from_dict(cls, values: Mapping) -> Case:
        """Return the case of a message or a file; raises ValueError when it is none, or not a sane one."""
        names = {field.name for field in fields(cls)}
        try:
            case = cls(**{name: value for name, value in values.items() if name in names})
        except TypeError as error:
            raise ValueError(f"not a case: {error}") from None
        case.check()
        return case

    def to_dict(self) -> dict:
        """Return the fields as plain values."""
        return asdict(self)

    def check(self) -> None:
        """Raise ValueError naming the first thing that cannot be measured."""
        for name, value, allowed in (
            ("operation", self.operation, OPERATIONS), ("path", self.path, PATHS), ("memory", self.memory, MEMORIES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: unknown; known: {', '.join(allowed)}")
        for name, least, most in (
            ("block_bytes", 1, 1 << 40), ("num_blocks", 1, 1 << 24), ("run_blocks", 0, 1 << 24),
            ("num_tensors", 1, 1 << 16), ("num_links", 1, MAX_LINKS), ("num_threads", 1, 64), ("num_streams", 1, 16),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} {value!r}: must be a whole number from {least} to {most}")
        reason = self.impossible()
        if reason:
            raise ValueError(f"{self.label}: {reason}")

    def impossible(self) -> str:
        """Say why there is no such transfer; empty when there is."""
        if self.memory == "registered" and self.path == "shm":
            return "registered memory is private to its process: there is nothing to map"
        if self.memory == "registered" and self.operation == "pull_key":
            return "keys of registered memory are not released by a pull"
        if not self.is_paged and self.num_blocks != 1:
            return "a slot is one block"
        return ""

    @property
    def is_paged(self) -> bool:
        """Whether block lists are involved."""
        return self.operation.endswith("_blocks")

    @property
    def is_push(self) -> bool:
        """Whether bytes go to the peer."""
        return self.operation.startswith("push_")

    @property
    def link_bytes(self) -> int:
        """Bytes one operation moves over one link."""
        return self.block_bytes * self.num_blocks * self.num_tensors

    @property
    def num_bytes(self) -> int:
        """Bytes one operation moves over all links."""
        return self.link_bytes * self.num_links

    @property
    def capacity(self) -> int:
        """Blocks per tensor of the caches: a quarter more than take part, unless all of them are one run."""
        if not self.is_paged or self.run_blocks == ALL_BLOCKS:
            return self.num_blocks
        runs = -(-self.num_blocks // self.run_blocks)
        return (runs + max(1, runs // 4)) * self.run_blocks

    @property
    def cache_bytes(self) -> int:
        """Bytes of one cache."""
        return self.block_bytes * self.capacity * self.num_tensors

    @property
    def key(self) -> str:
        """Name of the row for comparisons; rows of two runs with the same one measure the same."""
        return " ".join(
            f"{name}={value}" for name, value in self.to_dict().items() if name != "group"
        )

    @property
    def label(self) -> str:
        """Short text for people."""
        shape = f"{size_text(self.block_bytes)}"
        if self.is_paged:
            run = {ALL_BLOCKS: "one run", 1: "scattered"}.get(self.run_blocks, f"runs of {self.run_blocks}")
            shape += f" x {self.num_blocks} blocks, {run}"
        if self.num_tensors > 1:
            shape += f", {self.num_tensors} tensors"
        if self.num_links > 1:
            shape += f", {self.num_links} links"
        return f"{self.operation} {self.path}/{self.memory} {shape}"

    def block_lists(self, link: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source and destination blocks of a link, int64, shape (num_blocks,) each."""
        if not self.is_paged or self.run_blocks == ALL_BLOCKS:
            every = np.arange(self.num_blocks, dtype=np.int64)
            return every, every.copy()
        rng = np.random.default_rng([_SEED, link])
        num_runs, places = -(-self.num_blocks // self.run_blocks), self.capacity // self.run_blocks
        within = np.arange(self.run_blocks, dtype=np.int64)
        src, dst = (
            (rng.permutation(places)[:num_runs, None] * self.run_blocks + within).ravel()[: self.num_blocks]
            for _ in range(2)
        )
        return src.astype(np.int64), dst.astype(np.int64)


def descriptors(
    src_addrs: Sequence[int], dst_addrs: Sequence[int], src_blocks: np.ndarray, dst_blocks: np.ndarray, block_bytes: int
) -> np.ndarray:
    """Return rows (source address, destination address, bytes), uint64, runs merged, tensor after tensor."""
    src = (np.asarray(src_addrs, dtype=np.uint64)[:, None] + (src_blocks * block_bytes).astype(np.uint64)).ravel()
    dst = (np.asarray(dst_addrs, dtype=np.uint64)[:, None] + (dst_blocks * block_bytes).astype(np.uint64)).ravel()
    step = np.uint64(block_bytes)
    starts = np.ones(len(src), dtype=bool)
    starts[1:] = (src[1:] != src[:-1] + step) | (dst[1:] != dst[:-1] + step)
    first = np.flatnonzero(starts)
    lengths = np.diff(np.append(first, len(src))).astype(np.uint64) * step
    return np.ascontiguousarray(np.stack([src[first], dst[first], lengths], axis=1))


def sweep(base: Case, axes: Mapping[str, Sequence]) -> Iterator[tuple[Case, str]]:
    """Yield every combination of the values of `axes` put into `base`, with the reason why it is impossible, or ""."""
    seen = set()
    for values in itertools.product(*axes.values()):
        case = replace(base, **dict(zip(axes, values)))
        if not case.is_paged:
            case = replace(case, num_blocks=1, run_blocks=ALL_BLOCKS)
        if case.key not in seen:
            seen.add(case.key)
            yield case, case.impossible()


def parse_size(text: str) -> int:
    """Return the bytes that "4096", "16K", "1.5M" or "2G" stand for; raises ValueError."""
    number, unit = text.strip(), ""
    if number[-3:].lower() in ("kib", "mib", "gib"):
        number, unit = number[:-3], number[-3].lower()
    elif number[-1:].lower() in ("k", "m", "g"):
        number, unit = number[:-1], number[-1].lower()
    try:
        size = float(number) * _UNITS[unit]
    except ValueError:
        size = 0.0
    if size < 1 or size != size // 1:
        raise ValueError(f"{text!r} is not a positive number of bytes, such as 4096, 64K or 1.5M")
    return int(size)


def size_text(size: int) -> str:
    """Return "16 KiB" for 16384."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"

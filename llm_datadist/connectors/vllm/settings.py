"""What ``kv_connector_extra_config`` may hold, read once and checked."""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Mapping

__all__ = ["Settings"]

_MODES = ("pull", "push")
_PROVIDERS = ("auto", "host", "cann")


@dataclass(frozen=True)
class Settings:
    """Options of the connector.

    Parameters
    ----------
    mode : str
        ``"pull"``: a decode engine fetches blocks of a prompt that was computed. ``"push"``: a prefill engine also
        writes them, layer by layer while it computes, for requests that a proxy sends to both at once.
    kv_in_pool : bool
        Whether the KV cache is allocated in the shared pool of this package, which peers on the same host map.
    listen_host : str
        IPv4 address at which workers that own blocks listen, and under which peers reach them.
    listen_port : int
        Port of the first rank; rank r listens at this port plus r. 0 takes a free one, as peers learn it with each
        request.
    lease_ms : int
        How long finished blocks are kept for a decode side that does not come.
    pull_timeout_ms : int
        Deadline of one transfer.
    push_timeout_ms : int
        How long a decode engine waits for a prompt to be computed and pushed.
    link_timeout_ms : int
        Deadline of making a link.
    pull_threads : int
        Requests whose blocks are fetched at once. Those from one peer take turns on its link.
    chunk_bytes : int
        Bytes that are fetched by one call. What arrived before a failure is kept.
    provider : str
        ``"auto"``, ``"host"`` or ``"cann"``; host memory for vLLM's processor backend in any case.

    Raises
    ------
    ValueError
        An option is unknown, or has a value that is not allowed. The text names it.
    """

    mode: str = "pull"
    kv_in_pool: bool = False
    listen_host: str = "127.0.0.1"
    listen_port: int = 0
    lease_ms: int = 30_000
    pull_timeout_ms: int = 10_000
    push_timeout_ms: int = 120_000
    link_timeout_ms: int = 3_000
    pull_threads: int = 4
    chunk_bytes: int = 64 << 20
    provider: str = "auto"

    def __post_init__(self) -> None:
        ranges = {"listen_port": (0, 65535), "pull_threads": (1, 64), "chunk_bytes": (1, 2**62),
                  **dict.fromkeys(("lease_ms", "pull_timeout_ms", "push_timeout_ms", "link_timeout_ms"),
                                  (1, 2**31 - 1))}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} is not allowed; it must be an integer in [{low}, {high}]")
        for name, allowed in (("mode", _MODES), ("provider", _PROVIDERS), ("kv_in_pool", (True, False))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; it must be one of {allowed}")
        if not isinstance(self.listen_host, str):
            raise ValueError(f"listen_host={self.listen_host!r} is not allowed; it must be an IPv4 address")

    @classmethod
    def read(cls, extra_config: Mapping[str, Any]) -> "Settings":
        """Return the options in `extra_config`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(extra_config) - set(known))
        if unknown:
            raise ValueError(f"kv_connector_extra_config has {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**extra_config)

"""What an engine still holds that its client should have given back: for ``finalize``, ``drain``, ``leaks``, tools."""
from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from llm_datadist.managers.base import KEY_BLOCKS, KEY_PREFIX, KEY_REQ

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["drain", "held", "leaks", "leftovers"]

_OLDEST = 3
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.001, 0.02
_KINDS = {KEY_REQ: "req_id", KEY_PREFIX: "prefix_id"}


def held(engine: "Engine") -> List[Dict[str, Any]]:
    """One dict per allocated cache, oldest first: its row of ``Engine.caches``, and its keys as texts, ``names``."""
    names: Dict[int, List[str]] = {}
    for cache_id, kind, id_, model_id in engine.keys():
        number = "BlocksCacheKey" if kind == KEY_BLOCKS else f"{_KINDS[kind]}={id_}"
        names.setdefault(cache_id, []).append(f"{number}, model_id={model_id}" if model_id else number)
    rows = sorted((row for row in engine.caches() if row["owned"]), key=lambda row: row["cache_id"])
    return [{**row, "names": names.get(row["cache_id"], [])} for row in rows]


def leaks(engine: "Engine", min_age_s: float = 0.0) -> List[Dict[str, Any]]:
    """Rows of `held` of that age, and in ``peers`` the clusters linked just now, any of which could pull the keys."""
    peers = sorted({row["cluster_id"] for row in engine.links() if row["state"] == "active"})
    return [{**row, "peers": peers} for row in held(engine) if row["age_s"] >= min_age_s]


def _is_busy(engine: "Engine") -> bool:
    """Whether somebody is to come for a key, or a transfer runs, of ours or of a peer."""
    counts = engine.stats()
    return bool(counts["pins"] or counts["holds"] or any(row["running"] for row in engine.links())
                or engine.num_unpulled())


def drain(engine: "Engine", timeout_s: float) -> List[Dict[str, Any]]:
    """Wait until nobody is to come for a key and no transfer runs; rows of `leaks` of what is left then."""
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_PAUSE_S
    while _is_busy(engine):
        left = deadline - time.monotonic()
        if left <= 0:
            return [row for row in leaks(engine) if row["names"] or row["pins"]]
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_PAUSE_S)
    return []


def leftovers(engine: "Engine") -> Optional[str]:
    """Say what is left: how many keys and caches, and the oldest of them; None when there is nothing."""
    rows = held(engine)
    if not rows:
        return None
    num_keys = sum(len(row["names"]) for row in rows)
    num_handles = sum(row["handle"] for row in rows)
    oldest = ", ".join(
        f"cache {row['cache_id']} ({row['bytes']} bytes" + "".join(f"; {name}" for name in row["names"][:_OLDEST]) + ")"
        for row in rows[:_OLDEST])
    return (f"{num_keys} keys that nobody pulled or removed and {num_handles} caches that were not deallocated, in all "
            f"{sum(row['bytes'] for row in rows)} bytes; the oldest: {oldest}. Pull or remove_cache_key each key, and "
            "deallocate each cache")

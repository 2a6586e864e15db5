"""What an engine still holds that its client should have given back: for the warning of ``finalize``, and for tools."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional

from llm_datadist.managers.base import KEY_BLOCKS, KEY_PREFIX, KEY_REQ

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["held", "leftovers"]

_OLDEST = 3
_KINDS = {KEY_REQ: "req_id", KEY_PREFIX: "prefix_id"}


def held(engine: "Engine") -> List[Dict[str, Any]]:
    """One dict per allocated cache, oldest first: its row of ``Engine.caches``, and its keys as texts, ``names``."""
    names: Dict[int, List[str]] = {}
    for cache_id, kind, id_, model_id in engine.keys():
        number = "BlocksCacheKey" if kind == KEY_BLOCKS else f"{_KINDS[kind]}={id_}"
        names.setdefault(cache_id, []).append(f"{number}, model_id={model_id}" if model_id else number)
    rows = sorted((row for row in engine.caches() if row["owned"]), key=lambda row: row["cache_id"])
    return [{**row, "names": names.get(row["cache_id"], [])} for row in rows]


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

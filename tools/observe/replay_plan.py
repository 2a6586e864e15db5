"""Which calls of a recording wait for which: what lets a replay do the same at another speed, in real processes.

A call follows those of its thread. It also waits for every call that had ended before it began and that concerns the
same thing in a way that may change the outcome: a key that is bound and then pulled, a cache that is pulled into and
then freed, a link that is made and then used, a pool in which room was made.
"""
from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from llm_datadist.tools.observe.recording import Recording

Json = dict[str, Any]
Use = tuple[tuple[Any, ...], str]           # a thing, and in which way it is used

# Uses of one thing that go with each other in any order: readers, those who take room, those who make room.
READ, WRITE, TAKE, FREE = "read", "write", "take", "free"
KEYS_THAT_GO = ("CacheKey", "HeldBlocksKey")
NO_ID = 2**64 - 1


def plans(recording: Recording) -> list[Json]:
    """One plan for each engine: its calls with what each waits for, and whom to tell of which."""
    calls = [call for call in recording.calls if is_replayable(call)]
    clusters = [engine["cluster"] for engine in recording.engines]
    found: list[Json] = [{"engine": engine, "calls": []} for engine in recording.engines]
    needs = list(waits_of(calls, clusters))
    told: dict[int, set[int]] = defaultdict(set)    # call -> engines that wait for it
    targets = _targets(calls)
    for index, call in enumerate(calls):
        for other in needs[index]:
            if calls[other]["engine"] != call["engine"]:
                told[other].add(call["engine"])
    for index, call in enumerate(calls):
        plan = copy.copy(call)
        cluster = clusters[call["engine"]]
        plan.update(index=index, needs=sorted(needs[index]), tell=sorted(told[index]))
        created = call["result"].get("cache") if isinstance(call["result"], dict) else None
        if created is not None:
            plan["shows_memory"] = (cluster, created) in targets
            plan["tell"] = [each for each in range(len(clusters)) if each != call["engine"]] if (
                plan["shows_memory"] or plan["tell"]) else []
        if call["op"] in ("init", "switch_role"):   # everybody has to know where to link to
            plan["tell"] = [each for each in range(len(clusters)) if each != call["engine"]]
        found[call["engine"]]["calls"].append(plan)
    # What a message about a call of another engine says: a port of a cluster, or the id of a cache.
    meanings = {index: [clusters[call["engine"]], call["result"]["cache"] if isinstance(call["result"], dict)
                        and "cache" in call["result"] else None] for index, call in enumerate(calls)}
    for plan in found:
        own = {call["index"] for call in plan["calls"]}
        plan["foreign"] = {index: meaning for index, meaning in meanings.items() if index not in own and (
            meaning[1] is not None or calls[index]["op"] in ("init", "switch_role"))}
    return found


def is_replayable(call: Json) -> bool:
    """Whether the recording holds all that the call needs: not for an argument of a type that no call takes."""
    if call["op"] == "query_register_mem_status" and call["result"] == "PREPARING":
        return False                                # who asks that, asks again
    return not _has_unknown(call["args"])


def _has_unknown(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and not isinstance(value[0], int) and any(map(_has_unknown, value))
    return isinstance(value, dict) and ("type" in value or any(map(_has_unknown, value.values())))


def _targets(calls: list[Json]) -> set[tuple[int, int]]:
    """Cluster and id of the caches that are written to by address."""
    return {(config["dst_cluster_id"]["cluster"], config["cache"]) for call in calls
            for config in call["args"].get("transfer_configs") or () if config.get("to") == "address"}


# ---------------------------------------------------------------------------------------------------- what is used

def _uses(call: Json, cluster: int, comms: dict[Any, list[int]], bound: dict[Any, list[Json]]) -> Iterator[Use]:
    """The things that a call of a cluster concerns.

    `comms` has the members of each communicator of an engine, and `bound` the keys of each cache, both filled here.
    """
    op, args, result = call["op"], call["args"], call["result"]
    yield ("life", cluster), WRITE if op in ("init", "finalize", "switch_role") else READ
    created = result.get("cache") if isinstance(result, dict) else None
    if op.startswith(("allocate", "register")):
        yield ("pool", cluster), TAKE
        keys = [*(args.get("cache_keys") or ()), *filter(None, [args.get("blocks_cache_key")])]
        if created is not None:
            yield ("cache", cluster, created), WRITE
            bound[cluster, created] = keys
        for key in keys:
            yield ("key", cluster, key["key"], *key["numbers"]), WRITE
    elif op in ("remove_cache_key", "drop_blocks", "hold_blocks"):
        key = args.get("cache_key") or args["key"]
        yield ("key", cluster, key["key"], *key["numbers"]), WRITE
        yield ("pool", cluster), FREE
        if op == "hold_blocks":
            yield ("cache", cluster, args["cache"].get("handle")), READ
            bound.setdefault((cluster, args["cache"].get("handle")), []).append(key)
    elif op.startswith("deallocate") or op == "unregister_cache":
        cache = args.get("cache_id", (args.get("cache") or {}).get("handle"))
        yield ("pool", cluster), FREE
        yield ("cache", cluster, cache), WRITE
        for key in bound.get((cluster, cache), ()):
            if op != "deallocate_cache" or key["key"] != "CacheKey":    # the others go with it
                yield ("key", cluster, key["key"], *key["numbers"]), WRITE
    elif op in ("link", "unlink"):
        members = [key["cluster"] for key, _ in args.get("cluster_rank_info", {}).get("map", ())]
        members = comms.setdefault((call["engine"], result if op == "link" else args["comm_id"]), members)
        for member in members:
            yield ("link", *sorted((cluster, member))), WRITE
        yield ("comm", call["engine"], result if op == "link" else args["comm_id"]), WRITE
    elif op == "query_register_mem_status":
        yield ("comm", call["engine"], args["comm_id"]), READ
    elif op in ("link_clusters", "unlink_clusters"):
        for info in args.get("clusters") or ():
            peer = info["peer"]["cluster"]
            yield ("link", *sorted((cluster, peer))), WRITE
            yield ("life", peer), READ
    else:
        yield from _uses_of_transfer(call, cluster)


def _uses_of_transfer(call: Json, cluster: int) -> Iterator[Use]:
    """Caches that are used, keys that are followed, and the links there."""
    args = call["args"]
    configs = args.get("transfer_configs") or ()
    for name, value in [*args.items(), *(pair for config in configs for pair in config.items())]:
        if not isinstance(value, dict):
            continue
        if "handle" in value:
            yield ("cache", cluster, value["handle"]), READ
        elif "cluster" in value:
            yield from _remote(cluster, value["cluster"])
        elif "key" in value:
            owner = value["of"]["cluster"]
            yield from _remote(cluster, owner)
            if value["key"] == "CacheKeyByIdAndIndex":
                yield ("cache", owner, value["numbers"][0]), READ
            else:
                goes = value["key"] in KEYS_THAT_GO and value["numbers"][0] != NO_ID
                yield ("key", owner, value["key"], *value["numbers"]), WRITE if goes else READ
                if goes and not name.startswith("dst"):
                    yield ("pool", owner), FREE
    for config in configs:
        if config.get("cache") is not None:
            yield ("cache", config["dst_cluster_id"]["cluster"], config["cache"]), READ


def _remote(cluster: int, peer: int) -> Iterator[Use]:
    yield ("link", *sorted((cluster, peer))), READ
    yield ("life", peer), READ


# -------------------------------------------------------------------------------------------------- what waits for it

class _Thing:
    """Who used one thing so far, without those whom a later use stands for."""

    def __init__(self) -> None:
        self._uses: dict[str, dict[Any, list[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(list))

    def before(self, start_ns: int, how: str) -> Iterator[int]:
        """Calls that ended before `start_ns` and do not go with this use: of each thread the last."""
        self._forget(start_ns)
        for other, threads in self._uses.items():
            if other != how or how == WRITE:
                for entries in threads.values():
                    ended = [index for _, end_ns, index in entries if end_ns <= start_ns]
                    if ended:
                        yield ended[-1]

    def add(self, how: str, thread: Any, start_ns: int, end_ns: int, index: int) -> None:
        entries = self._uses[how][thread]
        entries.append((start_ns, end_ns, index))
        del entries[:-2]                            # one that may still run, and the one before it

    def _forget(self, start_ns: int) -> None:
        """Whoever waits for a write also waits for what had ended before that began."""
        writes = [start for entries in self._uses[WRITE].values() for start, end, _ in entries if end <= start_ns]
        if not writes:
            return
        last = max(writes)
        for threads in self._uses.values():
            for thread, entries in list(threads.items()):
                entries[:] = [entry for entry in entries if entry[1] > last]
                if not entries:
                    del threads[thread]


def waits_of(calls: list[Json], clusters: list[int]) -> Iterator[set[int]]:
    """For each call, in the order of their start, the places of those it waits for, but for earlier ones of its thread.

    Parameters
    ----------
    calls : list of dict
        In the order of their start.
    clusters : list of int
        The cluster of each engine.
    """
    things: dict[tuple[Any, ...], _Thing] = defaultdict(_Thing)
    comms: dict[Any, list[int]] = {}
    bound: dict[Any, list[Json]] = {}
    threads: dict[int, Any] = {}
    for index, call in enumerate(calls):
        start_ns = call["start_ns"]
        end_ns = start_ns + call["duration_ns"]
        thread = (call["engine"], call["thread"])
        runs_on = "returned_ns" in call             # it ended after the call had returned
        needs = set()
        uses = dict(_uses(call, clusters[call["engine"]], comms, bound))
        for thing, how in uses.items():
            needs.update(things[thing].before(start_ns, how))
        for thing, how in uses.items():
            things[thing].add(how, (thread, index) if runs_on else thread, start_ns, end_ns, index)
        threads[index] = None if runs_on else thread
        yield {other for other in needs if threads[other] != thread}

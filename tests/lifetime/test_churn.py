"""An owner that reuses its memory under readers: a pull brings the bytes of its own key, or finds none.

``LDD_CHURN_PULLS`` sets how many pulls there are, of all readers and every kind together.
"""
import os
import random
import threading
import time

import numpy as np
import pytest

from llm_datadist import CacheDesc, CacheKey, DataType, LLMException, LLMStatusCode

PULLS = int(os.environ.get("LDD_CHURN_PULLS", "12000"))
OWNER, READERS = 1, (2, 3)
WORDS, TENSORS = 192, 2                     # three pages: a small pool goes round at once
DESC = CacheDesc(TENSORS, [1, WORDS], DataType.DT_UINT64)
WINDOW = 16                                 # keys that exist at a time
NO_PREFIX = 2**64 - 1


def key_of(number):
    """Every third key is a prefix, which a pull does not take: only the owner's removal ends it."""
    return CacheKey(OWNER, NO_PREFIX, 0, number) if number % 3 == 0 else CacheKey(OWNER, number, 0)


def announcement(path):
    return np.memmap(path, dtype=np.uint64, mode="r+", shape=(2,))


def offer_for_a_while(node, path, number):
    """Bind key after key, each filled with its number before it is announced; take back the oldest, mostly pulled.

    Goes on after `number`, and returns how far it came in five seconds, or when it was told to stop.
    """
    told, manager, until = announcement(path), node.cache_manager, time.monotonic() + 5
    while not told[1] and time.monotonic() < until:
        number += 1
        if number > WINDOW:
            manager.remove_cache_key(key_of(number - WINDOW))
        cache = manager.allocate_cache(DESC, [key_of(number)])
        for tensor in cache.tensors():
            tensor[:] = number
        manager.deallocate_cache(cache)         # the key keeps it
        told[0] = number                        # what the table's own fences put after the bytes
    return number


def take_back(node, number):
    """Remove the keys that are left."""
    for last in range(max(1, number - WINDOW), number + 1):
        node.cache_manager.remove_cache_key(key_of(last))


def pull(node, path, count, seed):
    """Pull announced keys; return how many came, and the numbers of those that brought something else."""
    told, rng = announcement(path), random.Random(seed)
    cache, came, wrong = node.cache_manager.allocate_cache(DESC), 0, []
    views = cache.tensors()
    for _ in range(count):
        newest = int(told[0])
        if newest == 0:
            time.sleep(0.001)
            continue
        number = max(1, newest - rng.randrange(WINDOW))
        try:
            node.cache_manager.pull_cache(key_of(number), cache)
        except LLMException as error:
            assert error.status_code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, error
            continue
        came += 1
        if any((tensor != number).any() for tensor in views):
            wrong.append((number, [np.unique(tensor).tolist() for tensor in views]))
    node.cache_manager.deallocate_cache(cache)
    return came, wrong[:3]


@pytest.mark.parametrize("path", ["shm", "cma", "tcp"])
def test_a_pull_brings_the_bytes_of_its_key(peers, tmp_path, path):
    """Over the shared table and the mapping, the shared table's absence with attach, and the exchange over TCP."""
    env = {} if path == "shm" else {"LLM_DATADIST_HOST_PATHS": path}
    owner = peers.start(OWNER, env=env)
    readers = [peers.start(number, env=env) for number in READERS]
    for reader in readers:
        peers.link(reader, owner)
    file = str(tmp_path / "announced")
    np.memmap(file, dtype=np.uint64, mode="w+", shape=(2,)).flush()
    told, results = announcement(file), []
    share = PULLS // 3 // len(READERS)
    batches = [2000] * (share // 2000) + [share % 2000]         # a call into a process has a time limit
    offered = [0]

    def offer():
        while not told[1]:
            offered.append(owner.call(offer_for_a_while, file, offered[-1]))

    def run(reader):
        for turn, count in enumerate(batches):
            results.append(reader.call(pull, file, count, turn * 10 + reader.cluster_id))

    offering = threading.Thread(target=offer)
    threads = [threading.Thread(target=run, args=(reader,)) for reader in readers]
    for thread in [offering, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    told[1] = 1
    offering.join()
    owner.call(take_back, offered[-1])
    assert len(results) == len(batches) * len(READERS)
    assert [wrong for _, wrong in results if wrong] == []
    assert sum(came for came, _ in results) > 0 and offered[-1] > WINDOW
    counts = owner.settled()
    assert (counts["keys"], counts["caches"], counts["pins"]) == (0, 0, 0)
    assert counts["device_pool"]["free_bytes"] == counts["device_pool"]["bytes"]

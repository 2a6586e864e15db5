"""Cancelling calls that wait, from another thread: `CancelScope`, and `CacheTask.cancel` in the middle of a layer."""
from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import pytest
from support.link_steps import (
    ALL_BLOCKS,
    BLOCK_BYTES,
    DESC,
    NUM_BLOCKS,
    addrs_of,
    byte_of,
    fetch_code,
    free,
    link,
    links,
    offer,
    stop,
    until,
    withdraw,
)
from support.peer import engine_options
from transfers.pair import PATHS, PATHS_VARIABLE

from llm_datadist import (
    BlocksCacheKey,
    CancelScope,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    TransferConfig,
)

S = LLMStatusCode
OK = (S.LLM_SUCCESS, [S.LLM_SUCCESS])
FOR_EVER_MS = 3600 * 1000               # a call that is not cancelled fails its test by hanging
ASKING = {"LLM_DATADIST_SHARED_TABLE": "0"}


def start(peers, cluster_id, path, **options):
    process = peers.start(cluster_id, engine_options(timeout_ms=FOR_EVER_MS, **options),
                          env={PATHS_VARIABLE: path, **ASKING})
    process.call(offer)
    return process


@pytest.fixture(params=PATHS)
def pair(peers, request):
    """An owner, and a reader that is linked to it, on each path."""
    owner, reader = start(peers, 1, request.param), start(peers, 2, request.param)
    assert reader.call(link, (1, owner.address)) == OK
    assert reader.call(fetch_code, 1) is S.LLM_SUCCESS
    yield owner, reader
    for process in (owner, reader):
        process.call(withdraw)


def fill(cache, value):
    for addr in addrs_of(cache):
        ctypes.memset(addr, value, NUM_BLOCKS * BLOCK_BYTES)


def bytes_of(cache):
    return set().union(*(set(ctypes.string_at(addr, NUM_BLOCKS * BLOCK_BYTES)) for addr in addrs_of(cache)))


def is_running(node):
    return any(row["running"] for row in node.dist.links())


def cancel_a_pull(node, cluster_id, pid, in_main_thread):
    """Cancel a pull from a peer that stands still: its exception, milliseconds to it, and whether bytes came later."""
    scope, ended, errors = CancelScope(), [], []
    cache = node.cache_manager.allocate_blocks_cache(DESC)

    def pull():
        try:
            with scope:
                node.cache_manager.pull_blocks(BlocksCacheKey(cluster_id), cache, ALL_BLOCKS, ALL_BLOCKS)
        except LLMException as error:
            errors.append(error)
        ended.append(time.monotonic())

    def cancel():
        until(lambda: is_running(node))
        begun.append(time.monotonic())
        left.append(scope.cancel(10000))
        left.append(time.monotonic())

    begun, left = [], []
    stop(pid)
    other = threading.Thread(target=cancel if in_main_thread else pull)
    other.start()
    (pull if in_main_thread else cancel)()
    other.join()
    fill(cache, 0xA5)
    os.kill(pid, signal.SIGCONT)
    code = fetch_code(node, cluster_id)                 # the peer has read and answered all there was
    untouched = bytes_of(cache) == {0xA5}
    free(node, cache)
    error = errors[0]
    return (error.status_code, error.recoverable, str(error), left[0], scope.is_cancelled, untouched, code,
            (max(ended[0], left[1]) - begun[0]) * 1000)


@pytest.mark.parametrize("in_main_thread", [False, True])
def test_cancel_a_pull_from_another_thread(pair, in_main_thread):
    owner, reader = pair
    code, recoverable, text, left, is_cancelled, untouched, after, elapsed_ms = reader.call(
        cancel_a_pull, 1, owner.pid, in_main_thread)
    assert (code, recoverable, left, is_cancelled, untouched) == (S.LLM_FAILED, True, True, True, True)
    assert "cancelled" in text
    assert after is S.LLM_SUCCESS
    assert elapsed_ms < 5000            # far from the time limit; the figure itself is in docs/reliability.md
    assert until(lambda: owner.call(links) == [(2, "peer", "active")])
    assert owner.settled()["pins"] == 0


def use_a_cancelled_scope(node, cluster_id):
    """What happens to a block that is entered too late, and to calls after it."""
    scope = CancelScope()
    with scope:
        first = fetch_code(node, cluster_id)
    assert scope.cancel() and scope.is_cancelled
    try:
        with scope:
            raise AssertionError("the block was entered")
    except LLMException as error:
        return first, error.status_code, fetch_code(node, cluster_id)


def test_a_scope_that_was_cancelled_is_not_entered(pair):
    _, reader = pair
    assert reader.call(use_a_cancelled_scope, 1) == (S.LLM_SUCCESS, S.LLM_FAILED, S.LLM_SUCCESS)


def cancel_those_that_wait_for_their_turn(node, cluster_id, pid):
    """Three threads pull over one link to a peer that stands still, the last two in one scope, which is cancelled."""
    scopes = [CancelScope(), CancelScope()]
    codes = [None] * 3

    def pull(i):
        try:
            with scopes[i > 0]:
                codes[i] = fetch_code(node, cluster_id)
        except LLMException as error:
            codes[i] = error.status_code

    stop(pid)
    threads = [threading.Thread(target=pull, args=(i,)) for i in range(3)]
    threads[0].start()
    until(lambda: is_running(node))
    for thread in threads[1:]:
        thread.start()
    until(lambda: sum(row["running"] for row in node.dist.links()) == 3)
    assert scopes[1].cancel(10000)
    first = codes[0]
    os.kill(pid, signal.SIGCONT)
    for thread in threads:
        thread.join()
    return first, codes


def test_cancel_concerns_the_calls_of_its_scope_alone(pair):
    owner, reader = pair
    assert reader.call(cancel_those_that_wait_for_their_turn, 1, owner.pid) \
        == (None, [S.LLM_SUCCESS, S.LLM_FAILED, S.LLM_FAILED])


class Always(LayerSynchronizer):
    """Says that every layer is complete."""

    def synchronize_layer(self, layer_index, timeout_in_millis):
        return True


def cancel_a_task(node, cluster_id, pid, addrs):
    """Cancel a transfer whose layer waits for a peer that stands still: what its task says."""
    stop(pid)
    task = node.cache_manager.transfer_cache_async(node.kept["offer", 0], Always(),
                                                   [TransferConfig(cluster_id, addrs)])
    until(lambda: is_running(node))
    cancelled = task.cancel()
    ended = task.done(), task.cancelled(), task.get_results(0), task.cancel()
    os.kill(pid, signal.SIGCONT)
    return cancelled, ended


def hold(node):
    cache = node.kept["destination"] = node.cache_manager.allocate_blocks_cache(DESC)
    fill(cache, 0)
    return addrs_of(cache)


def held_bytes(node):
    return bytes_of(node.kept["destination"])


def drop(node):
    free(node, node.kept.pop("destination"))


def test_cancel_a_task_in_the_middle_of_a_layer(pair):
    owner, reader = pair
    addrs = owner.call(hold)
    assert reader.call(cancel_a_task, 1, owner.pid, addrs) == (True, (True, True, [S.LLM_FAILED], False))
    assert reader.call(fetch_code, 1) is S.LLM_SUCCESS
    assert owner.settled()["pins"] == 0
    assert owner.call(held_bytes) <= {0, byte_of(2)}
    owner.call(drop)


def test_a_scope_without_calls():
    """Nothing to end, nobody to wait for."""
    scope = CancelScope()
    assert not scope.is_cancelled
    assert scope.cancel(0) and scope.is_cancelled

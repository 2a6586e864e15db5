"""The connector's two halves without vLLM: what the scheduler decides, and what real engines then do."""
from __future__ import annotations

import json
import signal
import time

import pytest
from connectors.halves import BLOCK_TOKENS, BLOCKS, LAYERS, EngineHalves, blocks, needs_imitation, request
from support.link_steps import until
from support.peer import Peers

from llm_datadist import KeyOutcome

pytestmark = needs_imitation

WANTED = {"do_remote_decode": True, "do_remote_prefill": False}


# These run in the prefill engine's process.

def open_prefill(node, **settings):
    node.kept["engine"] = EngineHalves(**settings)


def step(node):
    engine = node.kept["engine"]
    engine.step()
    return engine.sent


def compute(node, name, block_ids, finish=True, params=None):
    """A request that computes for another engine: each byte of its blocks tells layer and block."""
    engine = node.kept["engine"]
    made = request(name, BLOCK_TOKENS * len(block_ids), dict(params or WANTED))
    engine.scheduler.allocated(made, blocks(block_ids), 0)
    engine.step()
    for block in block_ids:
        for layer in range(LAYERS):
            engine.places[layer, block] = 64 * layer + block
    node.kept[name] = made
    return end(node, name, block_ids) if finish else None


def end(node, name, block_ids, status="FINISHED_LENGTH_CAPPED"):
    made = node.kept.pop(name)
    made.status.name = status
    keeps, params = node.kept["engine"].scheduler.finished(made, (block_ids,))
    node.kept["engine"].step()
    return (keeps, json.loads(json.dumps(params)))          # as it travels


def held(node):
    return node.kept["engine"].worker.held()


def counts(node):
    stats = node.kept["engine"].worker.take_stats()
    return {} if stats is None else {name: value for name, value in stats.data.items() if value}


def close(node):
    node.kept.pop("engine").close()


class Pair:
    """A prefill engine in a process of its own, and a decode engine here."""

    def __init__(self, peers, prefill=None, decode=None):
        self.prefill = peers.child()
        self.prefill.call(open_prefill, **(prefill or {}))
        self.decode = EngineHalves(serves=False, **(decode or {}))

    def admit(self, name, params, block_ids, hashed=0, num_tokens=None):
        """A request of the decode engine takes its blocks from elsewhere; returns how many tokens, and the request."""
        num_tokens = num_tokens or BLOCK_TOKENS * len(block_ids)
        made = request(name, num_tokens, dict(params))
        count, is_async = self.decode.scheduler.num_matched_tokens(made, BLOCK_TOKENS * hashed)
        assert is_async == (count > 0)
        self.decode.scheduler.allocated(made, blocks(block_ids, hashed=hashed), count)
        return count, made

    def load(self, name, params, block_ids, **kwargs):
        count, made = self.admit(name, params, block_ids, **kwargs)
        assert until(lambda: self.decode.step() or name in self.decode.received)
        return count, made

    def check(self, src, dst):
        for layer in range(LAYERS):
            for there, here in zip(src, dst):
                assert (self.decode.places[layer, here] == 64 * layer + there).all()

    def nothing_held(self):
        assert until(lambda: self.decode.worker.held()["pulls"] == 0)
        assert until(lambda: (self.prefill.call(step), self.prefill.call(held)["requests"])[1] == 0)
        there, here = self.prefill.call(held), self.decode.worker.held()
        for name in ("pins", "holds", "requests", "pulls"):
            assert there[name] == here[name] == 0, (name, there, here)

    def close(self):
        self.decode.close()
        if self.prefill.is_running:
            self.prefill.call(close)


@pytest.fixture
def pair(peers):
    made = Pair(peers)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------ the usual life

@pytest.mark.parametrize("in_pool", [False, True])
def test_blocks_of_a_prompt_go_over_and_are_free_then(peers, in_pool):
    pair = Pair(peers, {"kv_in_pool": in_pool}, {"kv_in_pool": in_pool})
    keeps, params = pair.prefill.call(compute, "there", [3, 9, 4])
    assert keeps
    assert params["do_remote_prefill"] and not params["do_remote_decode"]
    count, _ = pair.load("here", params, [7, 1, 2])
    assert count == 3 * BLOCK_TOKENS
    pair.check([3, 9, 4], [7, 1, 2])
    assert until(lambda: pair.prefill.call(step) == ["there"])
    assert pair.prefill.call(counts) == {"blocks_pulled": 1}
    data = pair.decode.worker.take_stats().data
    assert data["pull_bytes"] == [3 * LAYERS * 4096]
    assert data["failed_pulls"] == 0
    assert (pair.decode.failed, pair.decode.failed_blocks) == ([], [])
    pair.nothing_held()
    pair.close()


def test_only_blocks_that_are_missing_are_fetched(pair):
    _, params = pair.prefill.call(compute, "there", [3, 9, 4])
    count, _ = pair.load("here", params, [7, 1, 2], hashed=2)
    assert count == BLOCK_TOKENS
    pair.check([4], [2])
    assert not pair.decode.places[:, [7, 1]].any()
    pair.nothing_held()


def test_a_whole_prompt_that_is_here_frees_the_other_side(pair):
    _, params = pair.prefill.call(compute, "there", [3, 9])
    count, _ = pair.admit("here", params, [7, 1], hashed=2)
    assert count == 0
    pair.decode.step()
    pair.nothing_held()
    assert pair.decode.received == []               # nobody waits for it
    assert pair.prefill.call(counts) == {"blocks_released": 1}


def test_a_load_is_asked_for_once(pair):
    """vLLM calls again when the load has ended, and when the request comes back after a preemption."""
    _, params = pair.prefill.call(compute, "there", [3])
    _, made = pair.load("here", params, [7])
    assert pair.decode.scheduler.num_matched_tokens(made, 0) == (0, False)
    pair.decode.scheduler.allocated(made, blocks([7, 8]), 0)
    assert pair.decode.scheduler.take_metadata().pulls == []
    assert pair.decode.scheduler.finished(made, ([7, 8],)) == (False, None)
    pair.nothing_held()


def test_a_window_that_has_moved_on_leaves_blocks_out(peers):
    pair = Pair(peers, {"num_groups": 2}, {"num_groups": 2})
    keeps, params = pair.prefill.call(two_groups, "there", [3, 9, 4], [0, 0, 5])
    assert keeps
    made = request("here", 3 * BLOCK_TOKENS, params)
    pair.decode.scheduler.allocated(made, blocks([7, 1, 2], [0, 0, 6]), 3 * BLOCK_TOKENS)
    assert until(lambda: pair.decode.step() or pair.decode.received == ["here"])
    pair.check([3, 9, 4, 5], [7, 1, 2, 6])
    assert not pair.decode.places[:, 0].any()
    pair.nothing_held()
    pair.close()


def two_groups(node, name, *groups):
    engine = node.kept["engine"]
    made = request(name, BLOCK_TOKENS * len(groups[0]), dict(WANTED))
    engine.scheduler.allocated(made, blocks(*groups), 0)
    engine.step()
    for block in range(BLOCKS):
        for layer in range(LAYERS):
            engine.places[layer, block] = 64 * layer + block
    keeps, params = engine.scheduler.finished(made, groups)
    engine.step()
    return keeps, params


def test_fifty_requests_at_once(pair):
    orders = []
    for index in range(50):
        src = [1 + index % (BLOCKS - 1)]
        _, params = pair.prefill.call(compute, f"there{index}", src)
        orders.append((f"here{index}", params, src))
    for index, (name, params, _) in enumerate(orders):
        pair.admit(name, params, [index % BLOCKS])
    assert until(lambda: pair.decode.step() or len(pair.decode.received) == 50)
    assert sorted(pair.decode.received) == sorted(name for name, _, _ in orders)
    assert until(lambda: len(pair.prefill.call(step)) == 50)
    assert pair.decode.failed_blocks == []
    pair.nothing_held()


# ------------------------------------------------------------------------------------------- aborts and failures

def test_a_request_aborted_while_it_computes_for_others(pair):
    pair.prefill.call(compute, "there", [3], finish=False)
    assert pair.prefill.call(held)["holds"] == 1
    assert pair.prefill.call(end, "there", [3], "FINISHED_ABORTED") == (False, None)
    pair.nothing_held()
    assert pair.prefill.call(step) == []


def test_a_request_aborted_before_it_was_admitted_frees_the_other_side(pair):
    _, params = pair.prefill.call(compute, "there", [3])
    made = request("here", BLOCK_TOKENS, params, status="FINISHED_ABORTED")
    assert pair.decode.scheduler.num_matched_tokens(made, 0) == (BLOCK_TOKENS, True)
    assert pair.decode.scheduler.finished(made, ([],)) == (False, None)
    pair.decode.step()
    pair.nothing_held()
    assert pair.decode.received == []


def test_a_request_aborted_while_its_blocks_come_still_ends(pair):
    """vLLM keeps its blocks until the worker says that nothing lands in them any more."""
    _, params = pair.prefill.call(compute, "there", [3])
    _, made = pair.admit("here", params, [7])
    made.status.name = "FINISHED_ABORTED"
    pair.decode.step()
    assert pair.decode.scheduler.finished(made, ([7],)) == (False, None)
    assert until(lambda: pair.decode.step() or pair.decode.received == ["here"])
    pair.nothing_held()


def test_blocks_that_nobody_fetches_are_free_after_the_lease(peers):
    pair = Pair(peers, {"lease_ms": 50})
    _, params = pair.prefill.call(compute, "there", [3, 4])
    assert until(lambda: pair.prefill.call(step) == ["there"])
    assert pair.prefill.call(counts) == {"blocks_expired": 1}
    pair.load("here", params, [7, 8])
    assert pair.decode.failed_blocks == [7, 8]
    assert not pair.decode.places.any()
    pair.nothing_held()
    pair.close()


def test_the_lease_does_not_run_while_a_request_computes(peers):
    pair = Pair(peers, {"lease_ms": 50})
    pair.prefill.call(compute, "there", [3], finish=False)
    time.sleep(0.2)
    assert pair.prefill.call(step) == []
    _, params = pair.prefill.call(end, "there", [3])
    pair.load("here", params, [7])
    assert pair.decode.failed_blocks == []
    pair.nothing_held()
    pair.close()


def test_a_killed_prefill_engine_fails_its_requests_at_once(pair):
    _, params = pair.prefill.call(compute, "first", [3])
    _, later = pair.prefill.call(compute, "second", [4, 5])
    pair.load("one", params, [7])
    pair.prefill.kill()
    start = time.monotonic()
    pair.load("two", later, [8, 9])
    assert time.monotonic() - start < 5             # not a deadline of ten seconds
    assert pair.decode.failed_blocks == [8, 9]
    assert pair.decode.worker.take_stats().data["failed_pulls"] == 1


def test_a_stopped_prefill_engine_fails_requests_by_the_deadline(peers):
    pair = Pair(peers, None, {"pull_timeout_ms": 300, "link_timeout_ms": 300})
    _, params = pair.prefill.call(compute, "there", [3])
    pair.prefill.signal(signal.SIGSTOP)
    try:
        pair.load("here", params, [7])
        assert pair.decode.failed_blocks == [7]
    finally:
        pair.prefill.signal(signal.SIGCONT)
    pair.close()


def test_what_an_engine_said_before_it_was_started_anew_leads_nowhere(peers):
    pair = Pair(peers, None)
    _, params = pair.prefill.call(compute, "there", [3])
    pair.prefill.call(close)
    _, _, port = params["remote_workers"][0]
    pair.prefill.call(open_prefill, listen_port=port)
    pair.prefill.call(compute, "other", [3], finish=False)
    pair.load("here", params, [7])
    assert pair.decode.failed_blocks == [7]
    assert not pair.decode.places.any()
    _, params = pair.prefill.call(end, "other", [3])
    pair.load("again", params, [8])
    pair.check([3], [8])
    pair.nothing_held()
    pair.close()


def test_a_decode_engine_that_dies_leaves_nothing_at_the_other(peers):
    prefill, decode = peers.child(), peers.child()
    prefill.call(open_prefill, lease_ms=500)
    decode.call(open_prefill, serves=False)
    _, params = prefill.call(compute, "there", [3])
    assert decode.call(fetch, "here", params, [7]) == []
    _, params = prefill.call(compute, "next", [3])
    decode.kill()
    assert until(lambda: prefill.call(step) == ["there", "next"])
    assert until(lambda: prefill.call(held)["links"] == 0)
    assert prefill.call(held)["holds"] == 0
    prefill.call(close)


def fetch(node, name, params, block_ids):
    engine = node.kept["engine"]
    made = request(name, BLOCK_TOKENS * len(block_ids), params)
    engine.scheduler.allocated(made, blocks(block_ids), made.num_prompt_tokens)
    assert until(lambda: engine.step() or name in engine.received)
    return engine.failed_blocks


# ------------------------------------------------------------------------------------------------ what is refused

@pytest.mark.parametrize("change", [
    {"remote_layout": "another"}, {"remote_workers": [[1, "127.0.0.1", 1]] * 2}, {"remote_workers": []},
    {"remote_workers": "nonsense"}, {"remote_key": None}, {"remote_block_ids": None},
])
def test_params_that_do_not_fit_mean_local_prefill(pair, change):
    _, params = pair.prefill.call(compute, "there", [3])
    made = request("here", BLOCK_TOKENS, {**params, **change})
    assert pair.decode.scheduler.num_matched_tokens(made, 0) == (0, False)
    pair.decode.scheduler.allocated(made, blocks([7]), 0)
    pair.decode.step()
    # What is not released by now ends with its lease; the test need not wait for that.
    assert pair.decode.received == []
    _, again = pair.prefill.call(compute, "next", [3])
    pair.load("next", again, [8])


def test_requests_without_params_are_left_alone(pair):
    for params in (None, {}, {"do_remote_prefill": False}):
        made = request("here", BLOCK_TOKENS, params)
        assert pair.decode.scheduler.num_matched_tokens(made, 0) == (0, False)
        pair.decode.scheduler.allocated(made, blocks([7]), 0)
        assert pair.decode.scheduler.finished(made, ([7],)) == (False, None)
    metadata = pair.decode.scheduler.take_metadata()
    assert (metadata.pulls, metadata.holds, metadata.leases, metadata.drops) == ([], {}, [], [])


def test_outcomes_have_a_count_each(pair):
    from llm_datadist.connectors.vllm.stats import TransferStats

    for outcome in KeyOutcome:
        assert f"blocks_{outcome.name.lower()}" in TransferStats().data


@pytest.fixture
def peers():
    """Processes without an engine of their own: the halves open theirs."""
    with Peers() as group:
        yield group

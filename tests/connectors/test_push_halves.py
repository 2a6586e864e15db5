"""Pushes without vLLM: a prefill engine writes into blocks of a decode engine, layer by layer, while it computes."""
from __future__ import annotations

import json
import signal

import pytest
from connectors.halves import BLOCK_TOKENS, LAYERS, EngineHalves, blocks, needs_imitation, request, scheduled
from support.link_steps import until
from support.peer import Peers

pytestmark = needs_imitation

TRANSFER = 1 << 40


# These run in the prefill engine's process.

def open_prefill(node, **settings):
    node.kept["engine"] = EngineHalves(mode="push", **settings)


def admit(node, name, num_tokens, transfer_id, described):
    """A request that is pushed gets its first blocks."""
    engine = node.kept["engine"]
    made = request(name, num_tokens, {**described, "do_remote_decode": True, "transfer_id": transfer_id})
    engine.scheduler.allocated(made, blocks([]), 0)
    node.kept[name] = made


def compute(node, output, groups, wait_at=None):
    """A step that fills `groups`, the blocks of each KV cache group; waits before a layer until the peer has the one
    before."""
    engine = node.kept["engine"]

    def fill(layer):
        group, place = (int(text[-1]) for text in layer.split("."))
        for block in groups[group]:
            engine.places[place, block] = 64 * place + block

    engine.step(output, fill)
    return engine.worker.held()["pushes"]


def compute_until(node, output, ids, layer_name):
    """The first half of a step: all layers up to and with `layer_name`, while what follows is not computed yet."""
    engine = node.kept["engine"]
    metadata = engine.scheduler.take_metadata(output)
    engine.worker.bind(metadata)
    for layer in range(LAYERS):
        for block in ids:
            engine.places[layer, block] = 64 * layer + block
        engine.worker.tick(f"group0.layer{layer}")
        if layer_name == f"group0.layer{layer}":
            return


def compute_rest(node, ids, first):
    engine = node.kept["engine"]
    for layer in range(first, LAYERS):
        for block in ids:
            engine.places[layer, block] = 64 * layer + block
    engine.worker.end_step()


def end(node, name, block_ids, status="FINISHED_LENGTH_CAPPED"):
    made = node.kept.pop(name)
    made.status.name = status
    keeps, params = node.kept["engine"].scheduler.finished(made, (block_ids,))
    node.kept["engine"].step()
    return keeps, json.loads(json.dumps(params))


def step(node):
    node.kept["engine"].step()
    return node.kept["engine"].sent


def held(node):
    return node.kept["engine"].worker.held()


def counts(node):
    stats = node.kept["engine"].worker.take_stats()
    return {} if stats is None else {name: value for name, value in stats.data.items() if value}


def close(node):
    node.kept.pop("engine").close()


class Pair:
    """A prefill engine in a process of its own, and a decode engine here."""

    def __init__(self, peers, prefill=None, decode=None, **both):
        self.prefill = peers.child()
        self.prefill.call(open_prefill, **{**both, **(prefill or {})})
        self.decode = EngineHalves(mode="push", **{**both, **(decode or {})})
        asked = request("describe", 1, {"describe": True})
        _, described = self.decode.scheduler.finished(asked, ([],))
        self.described = json.loads(json.dumps(described))

    def expect(self, name, block_ids, transfer_id=TRANSFER, hashed=0, num_tokens=None, status="RUNNING"):
        num_tokens = num_tokens or BLOCK_TOKENS * len(block_ids)
        made = request(name, num_tokens, {"do_remote_prefill": True, "transfer_mode": "push",
                                          "transfer_id": transfer_id}, status=status)
        count, is_async = self.decode.scheduler.num_matched_tokens(made, BLOCK_TOKENS * hashed)
        assert is_async == (count > 0)
        self.decode.scheduler.allocated(made, blocks(block_ids, hashed=hashed), count)
        self.decode.step()
        return made

    def push(self, name, block_ids, transfer_id=TRANSFER, num_tokens=None):
        """The prompt is computed in one step, and finishes."""
        num_tokens = num_tokens or BLOCK_TOKENS * len(block_ids)
        self.prefill.call(admit, name, num_tokens, transfer_id, self.described)
        self.prefill.call(compute, scheduled({name: ((block_ids,), 0)}, **{name: num_tokens}), [block_ids])
        return self.prefill.call(end, name, block_ids)

    def arrived(self, name):
        return until(lambda: self.decode.step() or name in self.decode.received)

    def check(self, src, dst, layers=range(LAYERS)):
        for layer in layers:
            for there, here in zip(src, dst):
                assert (self.decode.places[layer, here] == 64 * layer + there).all(), (layer, there, here)

    def nothing_held(self):
        def is_free():
            self.decode.step()
            self.prefill.call(step)
            both = [self.prefill.call(held), self.decode.worker.held()]
            return not any(one[name] for one in both for name in ("pins", "holds", "requests", "pushes", "receives"))

        assert until(is_free), (self.prefill.call(held), self.decode.worker.held())

    def close(self):
        self.decode.close()
        if self.prefill.is_running:
            self.prefill.call(close)


@pytest.fixture
def peers():
    """Processes without an engine of their own: the halves open theirs."""
    with Peers() as group:
        yield group


@pytest.fixture
def pair(peers):
    made = Pair(peers)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------ the usual life

@pytest.mark.parametrize("in_pool", [False, True])
def test_a_prompt_is_pushed(peers, in_pool):
    pair = Pair(peers, kv_in_pool=in_pool)
    pair.expect("here", [7, 1, 2])
    keeps, params = pair.push("there", [3, 9, 4])
    assert keeps
    assert params == {"transfer_mode": "push", "transfer_id": TRANSFER}
    assert pair.arrived("here")
    pair.check([3, 9, 4], [7, 1, 2])
    assert (pair.decode.failed, pair.decode.failed_blocks) == ([], [])
    assert until(lambda: pair.prefill.call(step) == ["there"])
    data = pair.decode.worker.take_stats().data
    assert data["receive_bytes"] == [3 * LAYERS * 4096]
    assert pair.prefill.call(counts)["push_bytes"] == [3 * LAYERS * 4096]
    pair.nothing_held()
    pair.close()


def test_layers_go_while_later_ones_are_computed(pair):
    pair.expect("here", [7, 1])
    pair.prefill.call(admit, "there", 2 * BLOCK_TOKENS, TRANSFER, pair.described)
    pair.prefill.call(compute_until, scheduled({"there": (([3, 9],), 0)}, there=2 * BLOCK_TOKENS), [3, 9],
                      "group0.layer1")
    assert until(lambda: pair.decode.places[1, 1].all())
    pair.check([3, 9], [7, 1], range(2))
    assert not pair.decode.places[2].any()
    pair.decode.step()
    assert pair.decode.received == []
    pair.prefill.call(compute_rest, [3, 9], 2)
    pair.prefill.call(end, "there", [3, 9])
    assert pair.arrived("here")
    pair.check([3, 9], [7, 1])
    pair.nothing_held()


def test_a_prompt_that_is_computed_in_chunks(pair):
    """A block goes once it is full; the last one as it is."""
    num_tokens = 3 * BLOCK_TOKENS + 5
    pair.expect("here", [7, 1, 2, 8], num_tokens=num_tokens)
    pair.prefill.call(admit, "there", num_tokens, TRANSFER, pair.described)
    pair.prefill.call(compute, scheduled({"there": (([3, 9],), 0)}, there=BLOCK_TOKENS + 3), [[3, 9]])
    assert until(lambda: pair.decode.places[:, 7].all(axis=None) or pair.decode.places[2, 7].all())
    assert not pair.decode.places[:, 1].any()
    pair.prefill.call(compute, scheduled(more={"there": (([4, 5],), BLOCK_TOKENS + 3)},
                                         there=num_tokens - BLOCK_TOKENS - 3), [[9, 4, 5]])
    pair.prefill.call(end, "there", [3, 9, 4, 5])
    assert pair.arrived("here")
    pair.check([3, 9, 4, 5], [7, 1, 2, 8])
    pair.nothing_held()


def test_a_prompt_that_lost_its_blocks_is_pushed_again(pair):
    """As when it was preempted: its blocks are another request's, and it is computed from the start."""
    pair.expect("here", [7, 1, 2])
    pair.prefill.call(admit, "there", 3 * BLOCK_TOKENS, TRANSFER, pair.described)
    pair.prefill.call(compute, scheduled({"there": (([3, 9],), 0)}, there=BLOCK_TOKENS), [[3, 9]])
    assert until(lambda: pair.decode.places[2, 7].all())
    pair.prefill.call(compute, scheduled(more={"there": (([11, 12, 13],), 0)}, resumed=["there"],
                                         there=3 * BLOCK_TOKENS), [[11, 12, 13]])
    pair.prefill.call(end, "there", [11, 12, 13])
    assert pair.arrived("here")
    pair.check([11, 12, 13], [7, 1, 2])
    assert pair.decode.failed == []
    pair.nothing_held()


def test_the_prompt_is_complete_before_the_other_side_has_room(pair):
    keeps, _ = pair.push("there", [3, 9])
    assert keeps
    assert pair.prefill.call(step) == []
    pair.expect("here", [7, 1])
    assert pair.arrived("here")
    pair.check([3, 9], [7, 1])
    pair.nothing_held()


def test_only_blocks_that_are_missing_are_pushed(pair):
    pair.expect("here", [7, 1, 2], hashed=2)
    pair.push("there", [3, 9, 4])
    assert pair.arrived("here")
    pair.check([4], [2])
    assert not pair.decode.places[:, [7, 1]].any()
    pair.nothing_held()


def test_a_whole_prompt_that_is_here_frees_the_other_side(pair):
    pair.expect("here", [7, 1], hashed=2)
    pair.push("there", [3, 9])
    pair.nothing_held()
    assert pair.decode.received == []
    assert not pair.decode.places.any()
    assert until(lambda: pair.prefill.call(step) == ["there"])


def test_several_groups_of_which_one_has_a_window(peers):
    pair = Pair(peers, num_groups=2)
    made = request("here", 3 * BLOCK_TOKENS, {"do_remote_prefill": True, "transfer_mode": "push",
                                              "transfer_id": TRANSFER})
    pair.decode.scheduler.allocated(made, blocks([7, 1, 2], [0, 0, 6]), 3 * BLOCK_TOKENS)
    pair.decode.step()
    pair.prefill.call(admit, "there", 3 * BLOCK_TOKENS, TRANSFER, pair.described)
    pair.prefill.call(compute, scheduled({"there": (([3, 9, 4], [10, 11, 5]), 0)}, there=3 * BLOCK_TOKENS),
                      [[3, 9, 4], [10, 11, 5]])
    pair.prefill.call(end, "there", [3, 9, 4])
    assert pair.arrived("here")
    pair.check([3, 9, 4, 5], [7, 1, 2, 6])
    assert not pair.decode.places[:, 0].any()
    pair.nothing_held()
    pair.close()


def test_fifty_requests_at_once(pair):
    for index in range(50):
        pair.expect(f"here{index}", [index % 31 + 1], TRANSFER + index)
    for index in range(50):
        pair.push(f"there{index}", [index % 31 + 1], TRANSFER + index)
    assert until(lambda: pair.decode.step() or len(pair.decode.received) == 50)
    assert pair.decode.failed == []
    assert until(lambda: len(pair.prefill.call(step)) == 50)
    pair.nothing_held()


def test_a_proxy_that_knows_no_pushes_is_served_by_pulls(pair):
    made = request("there", 2 * BLOCK_TOKENS, {"do_remote_decode": True})
    _, params = pair.prefill.call(computed_for_pull, made, [3, 9])
    here = request("here", 2 * BLOCK_TOKENS, params)
    count, _ = pair.decode.scheduler.num_matched_tokens(here, 0)
    pair.decode.scheduler.allocated(here, blocks([7, 1]), count)
    assert pair.arrived("here")
    pair.check([3, 9], [7, 1])
    pair.nothing_held()


def computed_for_pull(node, made, ids):
    engine = node.kept["engine"]
    engine.scheduler.allocated(made, blocks(ids), 0)
    compute(node, scheduled({"there": ((ids,), 0)}, there=len(ids) * BLOCK_TOKENS), [ids])
    made.status.name = "FINISHED_LENGTH_CAPPED"
    keeps, params = engine.scheduler.finished(made, (ids,))
    engine.step()
    return keeps, json.loads(json.dumps(params))


# ------------------------------------------------------------------------------------------- aborts and failures

def test_a_request_aborted_while_it_is_computed(pair):
    """The other side is told at once, and computes the prompt itself."""
    pair.expect("here", [7, 1])
    pair.prefill.call(admit, "there", 2 * BLOCK_TOKENS, TRANSFER, pair.described)
    pair.prefill.call(compute, scheduled({"there": (([3, 9],), 0)}, there=BLOCK_TOKENS), [[3]])
    assert until(lambda: pair.decode.places[2, 7].all())
    assert pair.prefill.call(end, "there", [3, 9], "FINISHED_ABORTED") == (False, None)
    assert pair.arrived("here")
    assert pair.decode.failed == ["here"]
    pair.nothing_held()


def test_a_request_aborted_while_its_blocks_come_still_ends(pair):
    made = pair.expect("here", [7, 1])
    made.status.name = "FINISHED_ABORTED"
    assert pair.decode.scheduler.finished(made, ([7, 1],)) == (False, None)
    assert pair.arrived("here")
    pair.push("there", [3, 9])
    pair.prefill.call(step)
    assert not pair.decode.places.any()
    pair.decode.step()
    assert pair.decode.worker.held()["receives"] == 0


def test_a_request_aborted_before_it_was_admitted_frees_the_other_side(pair):
    pair.push("there", [3, 9])
    made = request("here", 2 * BLOCK_TOKENS, {"do_remote_prefill": True, "transfer_mode": "push",
                                              "transfer_id": TRANSFER}, status="FINISHED_ABORTED")
    assert pair.decode.scheduler.finished(made, ([],)) == (False, None)
    pair.decode.step()
    pair.nothing_held()
    assert until(lambda: pair.prefill.call(step) == ["there"])


def test_a_push_that_does_not_come_fails_by_its_deadline(peers):
    pair = Pair(peers, decode={"push_timeout_ms": 100})
    pair.expect("here", [7, 1])
    assert pair.arrived("here")
    assert pair.decode.failed == ["here"]
    assert pair.decode.worker.take_stats().data["failed_receives"] == 1
    pair.close()


def test_a_prefill_engine_killed_while_it_pushes_fails_its_requests_at_once(pair):
    pair.expect("here", [7, 1])
    pair.prefill.call(admit, "there", 2 * BLOCK_TOKENS, TRANSFER, pair.described)
    pair.prefill.call(compute_until, scheduled({"there": (([3, 9],), 0)}, there=2 * BLOCK_TOKENS), [3, 9],
                      "group0.layer0")
    assert until(lambda: pair.decode.places[0, 1].all())
    pair.prefill.kill()
    assert pair.arrived("here")                     # not by the deadline of two minutes
    assert pair.decode.failed == ["here"]
    assert pair.decode.worker.held()["holds"] == 0


def test_a_decode_engine_that_dies_leaves_nothing_at_the_other(peers):
    prefill, decode = peers.child(), peers.child()
    prefill.call(open_prefill)
    decode.call(open_prefill)
    described = decode.call(describe)
    decode.signal(signal.SIGKILL)
    decode.kill()
    prefill.call(admit, "there", BLOCK_TOKENS, TRANSFER, described)
    prefill.call(compute, scheduled({"there": (([3],), 0)}, there=BLOCK_TOKENS), [[3]])
    prefill.call(end, "there", [3])
    assert until(lambda: prefill.call(step) == ["there"])
    assert prefill.call(counts) == {"failed_pushes": 1}
    prefill.call(close)


def describe(node):
    asked = request("describe", 1, {"describe": True})
    return node.kept["engine"].scheduler.finished(asked, ([],))[1]


def test_blocks_that_nobody_takes_are_free_after_the_lease(peers):
    pair = Pair(peers, {"lease_ms": 50})
    pair.push("there", [3, 9])
    assert until(lambda: pair.prefill.call(step) == ["there"])
    assert pair.prefill.call(counts) == {"failed_pushes": 1}
    pair.nothing_held()
    pair.close()


# ------------------------------------------------------------------------------------------------ what is refused

@pytest.mark.parametrize("change", [
    {"remote_layout": "another"}, {"remote_workers": [[1, "127.0.0.1", 1]] * 2}, {"remote_workers": None},
])
def test_an_engine_that_does_not_fit_is_not_pushed_to(pair, change):
    pair.described.update(change)
    assert pair.push("there", [3]) == (False, None)
    assert pair.prefill.call(held)["pushes"] == 0


@pytest.mark.parametrize("transfer_id", [None, True, 7, 1 << 63, "x"])
def test_a_transfer_id_that_is_none_is_no_push(pair, transfer_id):
    made = request("here", BLOCK_TOKENS, {"do_remote_prefill": True, "transfer_mode": "push",
                                          "transfer_id": transfer_id})
    assert pair.decode.scheduler.num_matched_tokens(made, 0) == (0, False)


def test_an_engine_in_mode_pull_computes_a_prompt_that_is_to_be_pushed():
    engine = EngineHalves()
    made = request("here", BLOCK_TOKENS, {"do_remote_prefill": True, "transfer_mode": "push",
                                          "transfer_id": TRANSFER})
    assert engine.scheduler.num_matched_tokens(made, 0) == (0, False)
    engine.scheduler.allocated(made, blocks([3]), 0)
    assert engine.scheduler.finished(made, ([3],)) == (False, None)
    engine.step()
    engine.close()

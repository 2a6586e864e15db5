"""``llm.Checksum``: every damaged block is found and named, its key is not taken, and nothing else raises an alarm."""
import threading
import time

import pytest
from support import reference
from support.peer import Peers, engine_options, engine_options_v1
from support.tampering import tampering
from transfers.caches import Named, Spec, contents, invoke, make
from transfers.exchange.steps import linked
from transfers.pair import HERE, PATHS, PATHS_VARIABLE, THERE, Pair
from transfers.tasks import transfer

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMChecksumError,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

TENSORS, SLOTS, BLOCKS, BLOCK_BYTES = 4, 3, 6, 4000
ON = {"llm_Checksum": "1"}
SLOT_SPEC = Spec(TENSORS, SLOTS, (2, BLOCK_BYTES))
BLOCK_SPEC = Spec(TENSORS, BLOCKS, (BLOCK_BYTES,), is_blocks=True)
LAYERS = {"src_layer_range": range(2), "dst_layer_range": range(2)}


class Damaged:
    """A pair with checksums, and a network between it that can be told to damage what it carries."""

    def __init__(self, pair, proxy):
        self.pair = pair
        self.proxy = proxy
        self.peer = pair.there.cluster_id

    def stage(self, scene):
        """Caches on both sides; the models by name."""
        self.models, self.made = {}, {}
        for process, name, spec in [
                (self.pair.there, "slots", SLOT_SPEC), (self.pair.here, "my slots", SLOT_SPEC),
                (self.pair.there, "blocks", BLOCK_SPEC._replace(keys=(BlocksCacheKey(1),))),
                (self.pair.here, "my blocks", BLOCK_SPEC),
                (self.pair.there, "loose", BLOCK_SPEC._replace(is_registered=True, remote_accessible=True,
                                                               keys=(BlocksCacheKey(1, 3),))),
                (self.pair.here, "my loose", BLOCK_SPEC._replace(is_registered=True, remote_accessible=True))]:
            self.made[name], self.models[name] = scene.make(process, name, spec._replace(seed=len(self.made)))

    def pulls(self):
        """Calls by name: method and arguments, destination, and the model's change."""
        slot = CacheKeyByIdAndIndex(self.peer, self.made["slots"].cache_id, 1)
        slots, blocks = self.models["slots"], self.models["blocks"]
        mine, my_blocks = self.models["my slots"], self.models["my blocks"]
        return {
            "slot": (("pull_cache", slot, Named("my slots"), 2), {}, "my slots",
                     lambda: reference.copy_slot(mine, 2, slots, 1, slots.stride)),
            "blocks": (("pull_blocks", BlocksCacheKey(self.peer), Named("my blocks"), [0, 1, 5, 3], [5, 0, 1, 3]), {},
                       "my blocks", lambda: reference.copy_blocks(my_blocks, [5, 0, 1, 3], blocks, [0, 1, 5, 3])),
            "layers": (("pull_blocks", BlocksCacheKey(self.peer), Named("my blocks"), [2, 3], [1, 2]),
                       {"src_layer_range": range(1), "dst_layer_range": range(1, 2)}, "my blocks",
                       lambda: reference.copy_blocks(my_blocks, [1, 2], blocks, [2, 3], dst_layers=range(1, 2),
                                                     src_layers=range(1))),
            "cut slot": (("pull_blocks", slot, Named("my blocks"), [], [4, 2]), {}, "my blocks",
                         lambda: reference.cut_slot(my_blocks, [4, 2], slots, 1)),
            "registered": (("pull_blocks", BlocksCacheKey(self.peer, 3), Named("my loose"), [1, 2, 0], [3, 4, 0]), {},
                           "my loose",
                           lambda: reference.copy_blocks(self.models["my loose"], [3, 4, 0], self.models["loose"],
                                                         [1, 2, 0])),
        }

    def pushes(self):
        """The same; only for remote-accessible caches."""
        slot = CacheKeyByIdAndIndex(self.peer, self.made["slots"].cache_id, 2)
        return {
            "push slot": (("push_cache", slot, Named("my slots"), 0), LAYERS, "slots",
                          lambda: reference.copy_slot(self.models["slots"], 2, self.models["my slots"], 0,
                                                      self.models["slots"].stride)),
            "push blocks": (("push_blocks", BlocksCacheKey(self.peer), Named("my blocks"), [0, 1, 4], [3, 4, 0]),
                            LAYERS, "blocks",
                            lambda: reference.copy_blocks(self.models["blocks"], [3, 4, 0], self.models["my blocks"],
                                                          [0, 1, 4])),
        }

    def differing(self, name):
        """Tensors and blocks of a cache that are not as its model says, as pairs."""
        process = self.pair.there if name in ("slots", "blocks", "loose") else self.pair.here
        stride = self.models[name].stride
        return sorted({(tensor, at // stride)
                       for tensor, (found, expected) in enumerate(
                           zip(process.call(contents, name), self.models[name].contents()))
                       if found != expected for at in range(0, len(found), stride)
                       if found[at:at + stride] != expected[at:at + stride]})


@pytest.fixture(scope="module", params=[False, True], ids=["two_sided", "remote_accessible"])
def damaged(request):
    env = {PATHS_VARIABLE: "tcp"}
    with Peers() as peers:
        there = peers.start(THERE, engine_options(remote_accessible=request.param), env=env)
        here = peers.here(HERE, engine_options(remote_accessible=request.param, **ON), env=env)
        with tampering(there.address) as proxy:
            direct, there.address = there.address, proxy.address
            peers.link(here, there)
            yield Damaged(Pair(peers, request.param, "tcp", here, there), proxy)
            peers.unlink(here, there)
            there.address = direct


@pytest.fixture
def scene(damaged):
    with damaged.pair.scene() as scene:
        damaged.stage(scene)
        yield scene
        for process in (damaged.pair.here, damaged.pair.there):
            assert process.settled()["pins"] == 0


def test_hundreds_of_flipped_bits_in_transfers_of_every_shape(damaged, scene):
    """Each is found, in the blocks and layers where it is and no others; the same call without it succeeds."""
    here = damaged.pair.here
    calls = {**damaged.pulls(), **(damaged.pushes() if damaged.pair.remote_accessible else {})}
    flips = 0
    for turn in range(60):
        for name, (call, kwargs, target, change) in calls.items():
            if turn % 4 == 0:
                here.call(invoke, *call, **kwargs)          # no false alarm
                change()
            change()
            damaged.proxy.flip(1 + turn % 3)
            with pytest.raises(LLMChecksumError) as caught:
                here.call(invoke, *call, **kwargs)
            flips += damaged.proxy.take_flipped()
            error, found = caught.value, damaged.differing(target)
            assert found, name
            assert error.failed_blocks == (None if call[0].endswith("cache") else sorted({block for _, block in found}))
            assert list(error.failed_layers) == sorted({tensor // 2 for tensor, _ in found})
            assert (error.status_code, error.stage, error.peer, error.recoverable) == (
                LLMStatusCode.LLM_FAILED, "verify", damaged.peer, True)
            for tensor, block in found[:6]:
                assert f"block {block} of tensor {tensor}" in str(error)
            here.call(invoke, *call, **kwargs)              # the link is as good as before, and repairs it
            assert damaged.differing(target) == []
    assert flips >= 300
    scene.check()


def test_a_key_is_taken_by_the_pull_that_brought_the_right_bytes(damaged, scene):
    if damaged.pair.remote_accessible:
        pytest.skip("keys of remote-accessible caches are not taken")
    here, there = damaged.pair.here, damaged.pair.there
    _, source = scene.make(there, "keyed", SLOT_SPEC._replace(keys=(CacheKey(1, 5),), seed=9))
    keys = there.stats()["keys"]
    damaged.proxy.flip()
    with pytest.raises(LLMChecksumError):
        here.call(invoke, "pull_cache", CacheKey(damaged.peer, 5), Named("my slots"))
    damaged.proxy.take_flipped()
    assert there.settled()["keys"] == keys
    here.call(invoke, "pull_cache", CacheKey(damaged.peer, 5), Named("my slots"))
    assert there.settled()["keys"] == keys - 1
    reference.copy_slot(damaged.models["my slots"], 0, source, 0, source.stride)
    scene.check()


def test_layered_pushes(damaged, scene):
    """By addresses, and by a key where that may be."""
    here, there = damaged.pair.here, damaged.pair.there
    target = scene.make(there, "target", SLOT_SPEC._replace(seed=12))[0]
    scene.lose("target")
    configs = [TransferConfig(damaged.peer, target.addrs, range(2))]
    if damaged.pair.remote_accessible:
        configs.append(TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(damaged.peer, target.cache_id, 1), range(2),
                                                  range(2)))
    for config in configs:
        for _ in range(10):
            damaged.proxy.flip()
            outcome = here.call(transfer, "my slots", [config])
            assert damaged.proxy.take_flipped() == 1 and outcome.code is LLMStatusCode.LLM_FAILED
            assert isinstance(outcome.error, LLMChecksumError) and outcome.error.stage == "verify"
            assert outcome.error.failed_layers == range(2)
            assert here.call(transfer, "my slots", [config]).code is LLMStatusCode.LLM_SUCCESS
    blocks = TransferConfig(damaged.peer, scene.make(there, "more", BLOCK_SPEC._replace(seed=13))[0].addrs, range(2))
    scene.lose("more")
    for lists in (([3, 1], [0, 5]),):
        damaged.proxy.flip()
        outcome = here.call(transfer, "my blocks", [blocks], *lists)
        assert damaged.proxy.take_flipped() == 1 and isinstance(outcome.error, LLMChecksumError)
        assert outcome.error.failed_blocks == [0, 5]
        assert here.call(transfer, "my blocks", [blocks], *lists).code is LLMStatusCode.LLM_SUCCESS
    assert there.settled()["pins"] == 0


def test_large_blocks_are_compared_in_pieces(damaged, scene):
    """More than one request may ask for; a block that is damaged twice is named once."""
    here, there = damaged.pair.here, damaged.pair.there
    spec = Spec(2, 2, (5 << 20,), is_blocks=True)
    _, source = scene.make(there, "large", spec._replace(keys=(BlocksCacheKey(1, 77),), seed=1))
    damaged.made["my large"], damaged.models["my large"] = scene.make(here, "my large", spec._replace(seed=2))
    call = ("pull_blocks", BlocksCacheKey(damaged.peer, 77), Named("my large"), [0, 1], [1, 0])
    for tensor, other in zip(damaged.models["my large"].tensors, source.tensors):
        half = len(other) // 2
        tensor[:] = other[half:] + other[:half]
    damaged.proxy.flip(2)
    with pytest.raises(LLMChecksumError) as caught:
        here.call(invoke, *call)
    assert damaged.proxy.take_flipped()
    assert caught.value.failed_blocks == sorted({block for _, block in damaged.differing("my large")})
    here.call(invoke, *call)
    assert damaged.differing("my large") == []


def restless(node, name):
    """Change one byte of tensor 1, block 2 of a cache again and again, until `calm`."""
    tensor, stop = node.kept[name].tensors()[1].reshape(-1), threading.Event()

    def run():
        at = 2 * BLOCK_BYTES + 17
        while not stop.is_set():
            for _ in range(1000):
                tensor[at] ^= 64

    thread = threading.Thread(target=run, daemon=True)
    node.kept["restless"] = (thread, stop)
    thread.start()


def calm(node):
    thread, stop = node.kept.pop("restless")
    stop.set()
    thread.join()


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_compared(path):
    """A source that its own program goes on writing is noticed on every path, and nothing else is."""
    with Peers() as peers:
        env = {PATHS_VARIABLE: path}
        there = peers.start(THERE, engine_options(), env=env)
        here = peers.start(HERE, engine_options(**ON), env=env)
        here.leftovers_allowed = there.leftovers_allowed = True
        peers.link(here, there)
        there.call(make, "blocks", BLOCK_SPEC._replace(keys=(BlocksCacheKey(1),), seed=3))
        here.call(make, "mine", BLOCK_SPEC)
        call = ("pull_blocks", BlocksCacheKey(there.cluster_id), Named("mine"), [0, 1, 2, 4], [3, 2, 1, 0])
        for _ in range(300):
            here.call(invoke, *call)
        there.call(restless, "blocks")
        found, until = 0, time.monotonic() + 30         # for the writer to get a processor
        while found < 3 and time.monotonic() < until:
            try:
                here.call(invoke, *call)
            except LLMChecksumError as error:
                found += 1
                assert (error.failed_blocks, error.failed_layers) == ([1], range(1))
                assert "block 1 of tensor 1." in str(error)
        there.call(calm)
        assert found == 3
        here.call(invoke, *call)
        assert there.settled()["pins"] == 0


def test_the_first_generation():
    with Peers() as peers:
        env = {PATHS_VARIABLE: "tcp"}
        there = peers.start(THERE, engine_options_v1(), role=LLMRole.PROMPT, env=env)
        here = peers.start(HERE, engine_options_v1(listen=False, **ON), role=LLMRole.DECODER, env=env)
        with tampering(there.address) as proxy:
            there.address = proxy.address
            peers.link(here, there)
            source = SLOT_SPEC._replace(keys=(CacheKey(1, 5),), seed=3)
            there.call(make, "slots", source)
            here.call(make, "mine", SLOT_SPEC)
            proxy.flip()
            with pytest.raises(LLMChecksumError) as caught:
                here.call(invoke, "pull_cache", CacheKey(there.cluster_id, 5), Named("mine"))
            assert proxy.take_flipped() == 1 and len(caught.value.failed_layers) == 1
            here.call(invoke, "pull_cache", CacheKey(there.cluster_id, 5), Named("mine"))
            stride = source.stride
            assert [tensor[:stride] for tensor in here.call(contents, "mine")] == [
                tensor[:stride] for tensor in source.fill()]
            assert there.settled()["keys"] == 0
            here.leftovers_allowed = there.leftovers_allowed = True
            peers.unlink(here, there)


def test_nothing_is_asked_where_it_is_off():
    """The owner of a pull over shared memory is not even asked."""
    with Peers() as peers:
        pair = linked(peers, "shm")
        with pair.scene() as scene:
            scene.make(pair.there, "blocks", BLOCK_SPEC._replace(keys=(BlocksCacheKey(1),), seed=3))
            scene.make(pair.here, "mine", BLOCK_SPEC)
            scene.lose("mine")
            call = ("pull_blocks", BlocksCacheKey(pair.there.cluster_id), Named("mine"), [0], [1])
            pair.here.call(invoke, *call)
            before = pair.there.stats()["requests"]
            pair.here.call(invoke, *call)
            assert pair.there.stats()["requests"] == before

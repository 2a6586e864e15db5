"""Pulls over TCP that are one exchange: nothing is asked besides, and what is refused is refused as ever."""
import contextlib
import os

import pytest
from support import reference
from support.hixl_frames import ADMIN, DATA, Wire
from support.peer import Peers
from transfers.caches import Named, Spec, invoke
from transfers.exchange.steps import (
    BLOCKS_KEY,
    LARGE,
    PREFIX_KEY,
    SMALL,
    asking,
    linked,
    request_key,
)
from transfers.owner import PADDING
from transfers.pair import THERE
from transfers.tasks import transfer
from transfers.test_refusals import BLOCKS, KEYS, ROWS, Stage

from llm_datadist import CacheKey, CacheKeyByIdAndIndex, LLMStatusCode, TransferConfig
from llm_datadist.status import LLMException

# ----------------------------------------------------------------------------------------- what asks nothing besides

@pytest.mark.parametrize("stride", [SMALL, LARGE])
@pytest.mark.parametrize("kind", ["request", "prefix", "id", "id of a request"])
@pytest.mark.parametrize("size", [-1, 77, 1])
def test_pull_of_a_slot(two_sided, stride, kind, size):
    """By whatever names the slot; the destination may be smaller, and in any of its slots."""
    pair = two_sided
    key = PREFIX_KEY if kind == "prefix" else request_key()
    keys = () if kind == "id" else (PADDING, key)
    with pair.scene() as scene:
        made, source = scene.make(pair.there, "src", Spec(3, 3, (stride,), keys=keys, seed=1))
        _, target = scene.make(pair.here, "dst", Spec(3, 2, (stride - 5,), is_registered=True, seed=2))
        key = CacheKeyByIdAndIndex(THERE, made.cache_id, 1) if kind.startswith("id") else key
        with asking(pair.there, 0):
            pair.here.call(invoke, "pull_cache", key, Named("dst"), 1, size)
        assert pair.there.settled()["keys"] == (1 if kind == "prefix" else 0)
        reference.copy_slot(target, 1, source, 1, stride - 5 if size == -1 else size)
        scene.check()


LISTS = {
    "one": ([2], [0]), "run": ([0, 1, 2, 3], [1, 2, 3, 4]), "backwards": ([4, 3, 2, 1, 0], [0, 1, 2, 3, 4]),
    "two runs": ([0, 1, 3, 4], [3, 4, 0, 1]), "one source for all": ([2, 2, 2, 2], [4, 0, 2, 1]),
    "halves meet": ([0, 4, 1], [1, 2, 3]),
}


@pytest.mark.parametrize("stride", [SMALL, LARGE])
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("on_host", [False, True])
def test_pull_of_blocks(two_sided, stride, lists, on_host):
    pair = two_sided
    with pair.scene() as scene:
        _, source = scene.make(pair.there, "src", Spec(2, 5, (stride,), is_blocks=True, keys=(BLOCKS_KEY,), seed=3,
                                                       on_host=on_host))
        _, target = scene.make(pair.here, "dst", Spec(2, 5, (stride,), is_blocks=True, is_registered=True, seed=4))
        for _ in range(2):
            with asking(pair.there, 0):
                pair.here.call(invoke, "pull_blocks", BLOCKS_KEY, Named("dst"), *lists)
        reference.copy_blocks(target, lists[1], source, lists[0])
        scene.check()


@pytest.mark.parametrize("stride", [SMALL, LARGE])
@pytest.mark.parametrize("kind", ["request", "prefix", "id"])
@pytest.mark.parametrize("blocks", [[2], [0, 1, 2], [4, 0, 3], [3, 3]])
def test_pull_of_a_slot_into_blocks(two_sided, stride, kind, blocks):
    """Blocks that the slot fills."""
    pair = two_sided
    key = request_key() if kind == "request" else PREFIX_KEY
    with pair.scene() as scene:
        made, source = scene.make(pair.there, "src", Spec(2, 2, (stride,), keys=(PADDING, key) if kind != "id" else (),
                                                          seed=5))
        _, target = scene.make(pair.here, "dst", Spec(2, 5, (stride // 3,), is_blocks=True, seed=6))
        with asking(pair.there, 0):
            pair.here.call(invoke, "pull_blocks",
                           CacheKeyByIdAndIndex(THERE, made.cache_id, 1) if kind == "id" else key, Named("dst"), [],
                           blocks)
        assert pair.there.settled()["keys"] == (kind == "prefix")
        reference.cut_slot(target, blocks, source, 1)
        scene.check()


RANGES = [{"src_layer_range": range(1, 3)}, {"dst_layer_range": range(2, 4)},
          {"src_layer_range": range(2, 3), "dst_layer_range": range(1)},
          {"src_layer_range": range(1, 4), "dst_layer_range": range(3), "tensor_num_per_layer": 1},
          {"src_layer_range": range(5, 6), "dst_layer_range": range(7, 8), "tensor_num_per_layer": 1}]


def tensors_for(ranges):
    """How many tensors source and destination need: all eight, or as many as the other side's range."""
    count = len(next(iter(ranges.values()))) * ranges.get("tensor_num_per_layer", 2)
    return [8 if f"{side}_layer_range" in ranges else count for side in ("src", "dst")]


def ranges_of_model(ranges):
    return {"src_layers": ranges.get("src_layer_range"), "dst_layers": ranges.get("dst_layer_range"),
            "tensors_per_layer": ranges.get("tensor_num_per_layer", 2)}


@pytest.mark.parametrize("stride", [SMALL, LARGE])
@pytest.mark.parametrize("ranges", [{}, *RANGES])
@pytest.mark.parametrize("shape", ["slots", "blocks", "slot into blocks"])
def test_layers_of_accessible_caches(accessible, stride, ranges, shape):
    """Where no key is taken, a part of the layers is one exchange too."""
    pair = accessible
    num_src, num_dst = tensors_for(ranges) if ranges else (3, 3)
    with pair.scene() as scene:
        spec = Spec(num_src, 3, (stride,), is_registered=True, is_blocks=shape == "blocks", remote_accessible=True,
                    keys=(BLOCKS_KEY,) if shape == "blocks" else (), seed=7)
        made, source = scene.make(pair.there, "src", spec)
        _, target = scene.make(pair.here, "dst", Spec(num_dst, 3, (stride // (3 if "into" in shape else 1),),
                                                      is_blocks="blocks" in shape, seed=8))
        by_id = CacheKeyByIdAndIndex(THERE, made.cache_id, 2)
        with asking(pair.there, 0):
            if shape == "slots":
                pair.here.call(invoke, "pull_cache", by_id, Named("dst"), 1, stride - 9, **ranges)
                reference.copy_slot(target, 1, source, 2, stride - 9, **ranges_of_model(ranges))
            elif shape == "blocks":
                pair.here.call(invoke, "pull_blocks", BLOCKS_KEY, Named("dst"), [2, 0], [1, 2], **ranges)
                reference.copy_blocks(target, [1, 2], source, [2, 0], **ranges_of_model(ranges))
            else:
                pair.here.call(invoke, "pull_blocks", by_id, Named("dst"), [], [2, 0], **ranges)
                reference.cut_slot(target, [2, 0], source, 2, **ranges_of_model(ranges))
        scene.check()


@pytest.mark.parametrize("stride", [SMALL, LARGE])
@pytest.mark.parametrize("size, src_offset, dst_offset", [(-1, 0, 0), (-1, 5, 7), (10, 0, 80), (50, 46, None),
                                                          (1, None, 95)])
def test_offsets_of_the_first_generation(first_generation, stride, size, src_offset, dst_offset):
    pair = first_generation
    with pair.scene() as scene:
        _, source = scene.make(pair.there, "src", Spec(4, 2, (stride + 10,), keys=(PADDING, PREFIX_KEY), seed=9))
        _, target = scene.make(pair.here, "dst", Spec(4, 2, (stride,), seed=10))
        with asking(pair.there, 0):
            pair.here.call(invoke, "pull_cache", PREFIX_KEY, Named("dst"), 1, size, src_cache_offset=src_offset,
                           dst_cache_offset=dst_offset)
        reference.copy_slot(target, 1, source, 1, stride - (dst_offset or 0) if size == -1 else size,
                            src_offset=src_offset or 0, dst_offset=dst_offset or 0)
        scene.check()


# ------------------------------------------------------------------------------------------ what is still asked for

def test_layers_that_are_released_one_by_one(two_sided):
    """They count towards the release of their key, together with an exchange that takes all."""
    pair = two_sided
    for last in (range(2, 3), None):
        with pair.scene() as scene:
            _, source = scene.make(pair.there, "src", Spec(3, 2, (LARGE,), keys=(PADDING, request_key()), seed=11))
            _, target = scene.make(pair.here, "dst", Spec(3, 1, (LARGE,), seed=12))
            for layers in (range(2), last):
                arguments = {} if layers is None else {"src_layer_range": layers, "dst_layer_range": layers,
                                                       "tensor_num_per_layer": 1}
                assert pair.there.settled()["keys"] == 1
                with asking(pair.there, 0 if layers is None else 2):
                    pair.here.call(invoke, "pull_cache", request_key(), Named("dst"), **arguments)
            assert pair.there.settled()["keys"] == 0
            reference.copy_slot(target, 0, source, 1, LARGE)
            scene.check()


@pytest.mark.parametrize("stride", [SMALL, LARGE])
def test_last_block_that_is_not_full(two_sided, stride):
    pair = two_sided
    with pair.scene() as scene:
        _, source = scene.make(pair.there, "src", Spec(2, 2, (stride,), keys=(PADDING, request_key()), seed=13))
        _, target = scene.make(pair.here, "dst", Spec(2, 4, (stride // 2 - 1,), is_blocks=True, seed=14))
        with asking(pair.there, 2):
            pair.here.call(invoke, "pull_blocks", request_key(), Named("dst"), [], [3, 1, 0])
        assert pair.there.settled()["keys"] == 0
        reference.cut_slot(target, [3, 1, 0], source, 1)
        scene.check()


def test_host_slot_into_host_blocks(two_sided):
    """A layout may change on the way where both are on the host."""
    pair = two_sided
    with pair.scene() as scene:
        made, source = scene.make(pair.there, "src", Spec(2, 2, (SMALL,), on_host=True, seed=15))
        _, target = scene.make(pair.here, "dst", Spec(2, 4, (SMALL // 2,), is_blocks=True, on_host=True, seed=16))
        with asking(pair.there, 0):
            pair.here.call(invoke, "pull_blocks", CacheKeyByIdAndIndex(THERE, made.cache_id, 1), Named("dst"), [],
                           [2, 3])
        reference.cut_slot(target, [2, 3], source, 1)
        scene.check()


@pytest.mark.parametrize("stride", [SMALL, LARGE])
def test_pushes_between_pulls(accessible, stride):
    pair = accessible
    with pair.scene() as scene:
        made, there = scene.make(pair.there, "there", Spec(4, 2, (stride,), seed=17))
        blocks, blocks_there = scene.make(pair.there, "blocks", Spec(4, 3, (stride,), is_blocks=True,
                                                                     keys=(BLOCKS_KEY,), seed=18))
        _, here = scene.make(pair.here, "here", Spec(4, 2, (stride,), seed=19))
        _, blocks_here = scene.make(pair.here, "my blocks", Spec(4, 3, (stride,), is_blocks=True, seed=20))
        for slot in range(2):
            key = CacheKeyByIdAndIndex(THERE, made.cache_id, slot)
            pair.here.call(invoke, "push_cache", key, Named("here"), 1 - slot)
            reference.copy_slot(there, slot, here, 1 - slot, stride)
            with asking(pair.there, 0):
                pair.here.call(invoke, "pull_cache", key, Named("here"), slot)
            reference.copy_slot(here, slot, there, slot, stride)
        pair.here.call(invoke, "push_blocks", BLOCKS_KEY, Named("my blocks"), [0, 2], [1, 0])
        reference.copy_blocks(blocks_there, [1, 0], blocks_here, [0, 2])
        with asking(pair.there, 0):
            pair.here.call(invoke, "pull_blocks", BLOCKS_KEY, Named("my blocks"), [2, 1], [0, 1])
        reference.copy_blocks(blocks_here, [0, 1], blocks_there, [2, 1])
        outcome = pair.here.call(transfer, "here", [TransferConfig(THERE, made.addrs)])
        assert outcome.code == LLMStatusCode.LLM_SUCCESS
        reference.copy_slot(there, 0, here, 0, stride)
        scene.check()
        assert blocks.cache_id != made.cache_id


# ---------------------------------------------------------------------------------------------------- refused pulls

@pytest.fixture(scope="module")
def stages():
    """The same caches behind a connected link by TCP and by shared memory, each pair in processes of its own."""
    with Peers() as peers, contextlib.ExitStack() as scenes:
        made = []
        for path in ("tcp", "shm"):
            pair = linked(peers, path)
            stage = Stage(pair, scenes.enter_context(pair.scene()))
            stage.scene.make(pair.here, "spare", Spec(4, 1, (64,), is_blocks=True))
            stage.scene.lose("spare")
            pull_spare(stage)
            stage.held = [stage.counts(process) for process in (pair.here, pair.there)]
            made.append(stage)
        yield made


def pull_spare(stage):
    """A pull like any other, over the link that was made first."""
    stage.pair.here.call(invoke, "pull_blocks", stage.blocks_key(), Named("spare"), [4], [0])


def refusal(stage, method, *args, **kwargs):
    """Class and status of what a call raises; nothing has changed on either side, and the next pull works."""
    with pytest.raises(Exception) as caught:
        stage.pair.here.call(invoke, method, *args, **kwargs)
    stage.scene.check()
    assert [stage.counts(process) for process in (stage.pair.here, stage.pair.there)] == stage.held
    with asking(stage.pair.there, 0):
        pull_spare(stage)
    return type(caught.value), caught.value.status_code if isinstance(caught.value, LLMException) else None


def check_alike(stages, code, call):
    """Refused in the same way on either path."""
    by_tcp, by_memory = (call(stage) for stage in stages)
    assert by_tcp == by_memory
    assert by_tcp[1] is code or by_tcp == (code, None)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_refused_pull_of_a_slot(stages, row):
    code, _, cache, key, *more = row
    check_alike(stages, code, lambda stage: refusal(stage, "pull_cache", key(stage), Named(cache),
                                                    **(more[0] if more else {})))


@pytest.mark.parametrize("row", KEYS.values(), ids=KEYS.keys())
def test_refused_pull_by_key(stages, row):
    code, _, key = row
    check_alike(stages, code, lambda stage: refusal(stage, "pull_cache", key(stage), Named("dst")))


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS.keys())
def test_refused_pull_into_blocks(stages, row):
    code, _, cache, key, src_blocks, dst_blocks, *more = row
    check_alike(stages, code, lambda stage: refusal(stage, "pull_blocks", key(stage), Named(cache), src_blocks,
                                                    dst_blocks, **(more[0] if more else {})))


@pytest.mark.parametrize("cache", ["five tensors", "wide", "two tensors"])
def test_refused_pull_keeps_its_key(stages, cache):
    """What does not fit takes nothing: the key is there for a pull that does."""
    code = LLMStatusCode.LLM_PARAM_INVALID
    check_alike(stages, code, lambda stage: refusal(stage, "pull_cache", CacheKey(stage.there, 31, 33), Named(cache)))


def data_port(process):
    """Where the data server of a child listens: the other of its two listeners."""
    inodes = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")}
    with open(f"/proc/{process.pid}/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table][1:]
    ports = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}
    (port,) = ports - {process.address[1]}
    return port


def test_whoever_has_no_link_is_told_nothing(two_sided):
    """A client of the data server that brings the token of no link: it does not come as far as asking."""
    pair = two_sided
    client_id = b"c" * 16
    with pair.scene() as scene:
        scene.make(pair.there, "src", Spec(1, 1, (64,), keys=(request_key(5),)))
        for kind in (ADMIN, DATA):
            with Wire(data_port(pair.there)) as wire:
                welcome = wire.hello(kind, client_id, token=b"t" * 16)
                assert welcome[3] == 103902 and welcome[4:6] == (bytes(16), bytes(16)) and wire.closed()
        assert pair.there.settled()["keys"] == 1
        scene.check()

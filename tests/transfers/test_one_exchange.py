"""Pulls over TCP that are one exchange: nothing is asked besides, nothing is left, and what fails has taken nothing."""
import contextlib
import os
import struct
import threading

import numpy as np
import pytest
import reference
from hixl_frames import ADMIN, DATA, FETCH, PART, REQUEST, REQUEST_MAGIC, Wire
from link_steps import stopped, until
from peer import Peers, engine_options, engine_options_v1
from transfers.caches import PAGE_BYTES, Named, Spec, addrs_of, bytes_at, invoke
from transfers.owner import MODEL, NONE, PADDING
from transfers.pair import HERE, PATHS_VARIABLE, THERE, Pair
from transfers.refusal import NOT_EXIST, refused
from transfers.tasks import transfer
from transfers.test_refusals import BLOCKS, KEYS, ROWS, Stage

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.status import LLMException, LLMTimeoutError

KIB, MIB = 1 << 10, 1 << 20
SMALL, LARGE = 96, 150 * KIB        # strides; all tensors of a LARGE one need several streams
TCP = {PATHS_VARIABLE: "tcp"}


def connect(pair):
    """Have the data path connected by a first pull, whatever steps that takes."""
    with pair.scene() as scene:
        made, _ = scene.make(pair.there, "first", Spec(1, 1, (8,)))
        scene.make(pair.here, "into", Spec(1, 1, (8,)))
        pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(THERE, made.cache_id), Named("into"))
    return pair


def linked(peers, path="tcp", remote_accessible=False):
    """Two linked children: a process has room for one engine, and several pairs of this module live at once."""
    env = {PATHS_VARIABLE: path}
    options = engine_options(host_pool=16 * MIB, remote_accessible=remote_accessible)
    there, here = (peers.start(number, options, env=env) for number in (THERE, HERE))
    peers.link(here, there)
    return Pair(peers, remote_accessible, path, here, there)


@pytest.fixture(scope="module")
def two_sided():
    with Peers() as peers:
        yield connect(linked(peers))


@pytest.fixture(scope="module")
def accessible():
    with Peers() as peers:
        yield connect(linked(peers, remote_accessible=True))


@pytest.fixture(scope="module")
def first_generation():
    with Peers() as peers:
        there = peers.start(THERE, engine_options_v1(), role=LLMRole.PROMPT, env=TCP)
        here = peers.start(HERE, engine_options_v1(listen=False), role=LLMRole.DECODER, env=TCP)
        peers.link(here, there)
        yield connect(Pair(peers, False, "tcp", here, there))


@contextlib.contextmanager
def asking(process, exactly):
    """The owner is asked exactly so much over the control connection."""
    before = process.stats()["requests"]
    yield
    assert process.stats()["requests"] - before == exactly


def request_key(number=1):
    return CacheKey(THERE, number, MODEL)


PREFIX_KEY = CacheKey(THERE, NONE, MODEL, 3)
BLOCKS_KEY = BlocksCacheKey(THERE, MODEL)


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
        assert pair.there.stats()["keys"] == (1 if kind == "prefix" else 0)
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
        assert pair.there.stats()["keys"] == (kind == "prefix")
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
                assert pair.there.stats()["keys"] == 1
                with asking(pair.there, 0 if layers is None else 2):
                    pair.here.call(invoke, "pull_cache", request_key(), Named("dst"), **arguments)
            assert pair.there.stats()["keys"] == 0
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
        assert pair.there.stats()["keys"] == 0
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


# --------------------------------------------------------------------------------------------- nothing is left at once

def offer(node, key, num_tensors, tensor_bytes, seed):
    """Bind a cache to a request key, its only hold, and return its id."""
    cache = node.cache_manager.allocate_cache(CacheDesc(num_tensors, [1, tensor_bytes], DataType.DT_UINT8), [key])
    for number, addr in enumerate(addrs_of(cache)):
        bytes_at(addr, tensor_bytes)[:] = wanted(tensor_bytes, seed + number)
    node.cache_manager.deallocate_cache(cache)
    return cache.cache_id


def wanted(num_bytes, seed):
    """Bytes that differ for every seed and at every alignment."""
    return np.resize((np.arange(251) * 3 + seed * 37).astype(np.uint8), num_bytes)


def prepare(node, num_tensors, tensor_bytes):
    """Allocate what `take` pulls into."""
    desc = CacheDesc(num_tensors, [1, tensor_bytes], DataType.DT_UINT8)
    node.kept["target"] = node.cache_manager.allocate_cache(desc)


def take(node, key, seed):
    """Pull a key that was offered, and say whether all bytes are right."""
    cache = node.kept["target"]
    node.cache_manager.pull_cache(key, cache)
    tensor_bytes = cache.cache_desc.size
    return all(np.array_equal(bytes_at(addr, tensor_bytes), wanted(tensor_bytes, seed + number))
               for number, addr in enumerate(addrs_of(cache)))


def put_away(node):
    node.cache_manager.deallocate_cache(node.kept.pop("target"))


def holds(stats):
    """Caches, keys, pins and bytes an owner holds."""
    pool = stats["device_pool"]
    return stats["caches"], stats["keys"], stats["pins"], pool["bytes"] - pool["free_bytes"]


NOTHING = (0, 0, 0, 0)


@pytest.mark.parametrize("num_tensors, tensor_bytes, times", [(2, 96, 300), (2, 2 * MIB, 100)])
def test_nothing_is_left_when_a_pull_returns(two_sided, num_tensors, tensor_bytes, times):
    """No pause, and no second look."""
    pair = two_sided
    pair.here.call(prepare, num_tensors, tensor_bytes)
    assert holds(pair.there.stats()) == NOTHING
    for number in range(times):
        pair.there.call(offer, request_key(), num_tensors, tensor_bytes, number)
        assert holds(pair.there.stats())[:3] == (1, 1, 0)
        correct = pair.here.call(take, request_key(), number)
        assert holds(pair.there.stats()) == NOTHING
        assert correct
    pair.here.call(put_away)


def test_key_is_free_when_a_pull_returns(two_sided):
    """The owner binds it again, and there is room: the pool holds no second cache of this size."""
    pair = two_sided
    pair.here.call(prepare, 1, 40 * MIB)
    for number in range(20):
        pair.there.call(offer, request_key(), 1, 40 * MIB, number)
        assert pair.here.call(take, request_key(), number)
    refused(NOT_EXIST, pair.here.call, take, request_key(), 0)
    pair.here.call(put_away)


@pytest.fixture
def crowd():
    """An owner here, and two linked readers."""
    with Peers() as peers:
        owner = peers.here(THERE, engine_options(device_pool=256 * MIB), env=TCP)
        readers = [peers.start(number, engine_options(device_pool=160 * MIB), env=TCP) for number in (21, 22)]
        for reader in readers:
            peers.link(reader, owner)
            meet(owner, reader)
        yield peers, owner, readers


def meet(owner, reader):
    """Connect the data path of a reader."""
    owner.call(offer, request_key(), 1, 8, 0)
    reader.call(prepare, 1, 8)
    assert reader.call(take, request_key(), 0)
    reader.call(put_away)
    assert holds(owner.stats()) == NOTHING


@pytest.mark.parametrize("tensor_bytes, times", [(96, 200), (2 * MIB, 60)])
def test_nothing_is_left_when_two_readers_have_returned(crowd, tensor_bytes, times):
    _, owner, readers = crowd
    for reader in readers:
        reader.call(prepare, 2, tensor_bytes)
    with asking(owner, 0):
        for turn in range(times):
            for number in range(2):
                owner.call(offer, request_key(number), 2, tensor_bytes, turn + number)
            finishes = [reader.begin(take, request_key(number), turn + number)
                        for number, reader in enumerate(readers)]
            correct = [finish() for finish in finishes]
            assert holds(owner.stats()) == NOTHING
            assert correct == [True, True]
    for reader in readers:
        reader.call(put_away)


def take_many(node, keys, seeds):
    return [take(node, key, seed) for key, seed in zip(keys, seeds)]


def test_many_keys_of_two_readers(crowd):
    """Each takes its own keys as fast as it can, both from the same owner."""
    _, owner, readers = crowd
    count, tensor_bytes = 100, 300 * KIB
    for reader in readers:
        reader.call(prepare, 1, tensor_bytes)
    keys = [request_key(number) for number in range(2 * count)]
    for number, key in enumerate(keys):
        owner.call(offer, key, 1, tensor_bytes, number)
    assert owner.stats()["keys"] == 2 * count
    finishes = [reader.begin(take_many, keys[start::2], range(start, 2 * count, 2))
                for start, reader in enumerate(readers)]
    assert [finish() for finish in finishes] == [[True] * count] * 2
    assert holds(owner.stats()) == NOTHING
    for reader in readers:
        reader.call(put_away)


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
    """A client of the data server that brings the token of no link, with words that are right."""
    pair = two_sided
    client_id = b"c" * 16
    with pair.scene() as scene:
        scene.make(pair.there, "src", Spec(1, 1, (64,), keys=(request_key(5),)))
        words = struct.pack("<BBHIQQIIqqQQQQ", 0, 0, 0, 0, 5, MODEL, 1, 1, -1, 0, 64, 1, 0, 64)
        with Wire(data_port(pair.there)) as admin, Wire(data_port(pair.there)) as wire:
            nonce = admin.hello(ADMIN, client_id, token=b"t" * 16)[4]
            assert wire.hello(DATA, client_id, nonce, token=b"t" * 16)[3] == 0
            for number in range(2):
                wire.send(REQUEST.pack(REQUEST_MAGIC, FETCH, 0, 7, len(words), 64, 0)
                          + PART.pack(number + 1, 0, 64, 0, 1) + words)
                status, text, num_bytes, code = wire.reply()
                assert (status != 0, num_bytes, code) == (True, 0, 2**64 - 6) and "link" in text
        assert pair.there.stats()["keys"] == 1
        scene.check()


# --------------------------------------------------------------------------------- readers and owners that stand still

WEIGHT = 96 * MIB                   # of a cache: bytes that are on their way for a while


@contextlib.contextmanager
def halfway(owner, reader, begin):
    """Have `begin` start a pull again and again until its reader stands still in the middle of it; how to end that."""
    for _ in range(50):
        finish = begin()
        until(lambda: owner.stats()["pins"])
        with stopped(reader):
            if owner.stats()["pins"]:
                yield finish
                return
        finish()
    raise AssertionError("every pull was over at once")


@pytest.fixture
def weighty(crowd):
    """The crowd of `crowd`, whose first reader is to pull a cache of some weight, by a key that starts anew."""
    peers, owner, readers = crowd
    readers[0].call(prepare, 2, WEIGHT // 2)

    def begin():
        owner.call(offer, request_key(), 2, WEIGHT // 2, 5)
        return readers[0].begin(take, request_key(), 5)

    yield peers, owner, readers, begin


def comes_to_hold(owner, *wanted):
    """Wait until the owner has noticed that a reader is gone, and perhaps what that one asked for last."""
    return until(lambda: holds(owner.stats()) == wanted)


def test_reader_killed_in_the_middle_has_taken_nothing(weighty):
    _, owner, (reader, other), begin = weighty
    with halfway(owner, reader, begin) as finish:
        reader.kill()
        with pytest.raises(Exception, match="ended"):
            finish()
    assert comes_to_hold(owner, 1, 1, 0, WEIGHT)
    other.call(prepare, 2, WEIGHT // 2)
    assert other.call(take, request_key(), 5)
    assert holds(owner.stats()) == NOTHING
    other.call(put_away)


def test_reader_that_stands_still_gets_all_of_it_later(weighty):
    """Nobody gives up on it, and the key is its own until it is through."""
    _, owner, (reader, other), begin = weighty
    with halfway(owner, reader, begin) as finish:
        assert holds(owner.stats()) == (1, 1, 1, WEIGHT)
    assert finish()
    assert holds(owner.stats()) == NOTHING
    other.call(prepare, 2, WEIGHT // 2)
    refused(NOT_EXIST, other.call, take, request_key(), 5)
    for process in (reader, other):
        process.call(put_away)


def test_two_readers_of_one_key_in_the_middle(weighty):
    """Whoever found it before it was taken gets it; whoever comes later does not."""
    _, owner, (reader, other), begin = weighty
    other.call(prepare, 2, WEIGHT // 2)
    with halfway(owner, reader, begin) as finish:
        assert other.call(take, request_key(), 5)
        assert holds(owner.stats()) == (1, 0, 1, WEIGHT)
        refused(NOT_EXIST, other.call, take, request_key(), 5)
    assert finish()
    assert holds(owner.stats()) == NOTHING
    for process in (reader, other):
        process.call(put_away)


@pytest.fixture
def impatient():
    """An owner in a child, and two readers of which the first gives up soon."""
    with Peers() as peers:
        owner = peers.start(THERE, engine_options(), env=TCP)
        reader = peers.here(21, engine_options(timeout_ms=300), env=TCP)
        other = peers.start(22, engine_options(), env=TCP)
        for process in (reader, other):
            peers.link(process, owner)
            meet(owner, process)
        yield peers, owner, reader, other


@pytest.mark.parametrize("num_tensors, tensor_bytes", [(2, 96), (2, 2 * MIB)])
def test_reader_that_gives_up_has_taken_nothing(impatient, num_tensors, tensor_bytes):
    """Though the owner finds the request in its socket when it wakes up; what was taken before stays taken."""
    peers, owner, reader, other = impatient
    owner.call(offer, request_key(1), num_tensors, tensor_bytes, 1)
    owner.call(offer, request_key(2), num_tensors, tensor_bytes, 2)
    reader.call(prepare, num_tensors, tensor_bytes)
    assert reader.call(take, request_key(1), 1)
    with stopped(owner):
        with pytest.raises(LLMTimeoutError):
            reader.call(take, request_key(2), 2)
        reader.call(overwrite)
    assert comes_to_hold(owner, 1, 1, 0, num_tensors * max(tensor_bytes, PAGE_BYTES))
    other.call(prepare, num_tensors, tensor_bytes)
    assert other.call(take, request_key(2), 2)
    assert comes_to_hold(owner, *NOTHING)
    refused(NOT_EXIST, other.call, take, request_key(1), 1)
    assert reader.call(is_overwritten)
    peers.unlink(reader, owner)
    peers.link(reader, owner)
    owner.call(offer, request_key(2), num_tensors, tensor_bytes, 3)
    assert reader.call(take, request_key(2), 3)
    for process in (reader, other):
        process.call(put_away)


def overwrite(node):
    cache = node.kept["target"]
    for addr in addrs_of(cache):
        bytes_at(addr, cache.cache_desc.size)[:] = 0xEE


def is_overwritten(node):
    cache = node.kept["target"]
    return all(bool((bytes_at(addr, cache.cache_desc.size) == 0xEE).all()) for addr in addrs_of(cache))


def test_owner_killed_in_the_middle(peers):
    """The reader is told, and the link is gone."""
    owner = peers.start(THERE, engine_options(device_pool=WEIGHT), env=TCP)
    reader = peers.here(21, engine_options(device_pool=WEIGHT), env=TCP)
    peers.link(reader, owner)
    meet(owner, reader)
    owner.call(offer, request_key(), 2, WEIGHT // 2, 5)
    reader.call(prepare, 2, WEIGHT // 2)
    errors = []

    def pull():
        try:
            reader.call(take, request_key(), 5)
        except LLMException as error:
            errors.append(error)

    with stopped(owner):
        thread = threading.Thread(target=pull)
        thread.start()
        owner.kill()
    thread.join()
    assert [error.status_code for error in errors] in ([LLMStatusCode.LLM_NOT_YET_LINK], [LLMStatusCode.LLM_FAILED],
                                                       [LLMStatusCode.LLM_LINK_FAILED])
    refused(LLMStatusCode.LLM_NOT_YET_LINK, reader.call, take, request_key(), 5)
    reader.call(put_away)


# ------------------------------------------------------------------------------------------ an owner that takes away

def test_key_removed_in_the_middle(weighty):
    """The bytes stay until they are through, and a key that is bound again meanwhile is not the one that was taken."""
    _, owner, (reader, other), begin = weighty
    with halfway(owner, reader, begin) as finish:
        owner.call(invoke, "remove_cache_key", request_key())
        assert holds(owner.stats()) == (1, 0, 1, WEIGHT)
        owner.call(offer, request_key(), 2, 4096, 9)
        assert holds(owner.stats()) == (2, 1, 1, WEIGHT + 8192)
    assert finish()
    assert holds(owner.stats()) == (1, 1, 0, 8192)
    other.call(prepare, 2, 4096)
    assert other.call(take, request_key(), 9)
    assert holds(owner.stats()) == NOTHING
    for process in (reader, other):
        process.call(put_away)


def allocate(node, num_tensors, tensor_bytes, seed):
    """A cache without a key, held by its handle."""
    cache = node.cache_manager.allocate_cache(CacheDesc(num_tensors, [1, tensor_bytes], DataType.DT_UINT8))
    for number, addr in enumerate(addrs_of(cache)):
        bytes_at(addr, tensor_bytes)[:] = wanted(tensor_bytes, seed + number)
    node.kept["held"] = cache
    return CacheKeyByIdAndIndex(THERE, cache.cache_id, 0)


def deallocate(node):
    node.cache_manager.deallocate_cache(node.kept.pop("held"))


def test_deallocated_in_the_middle(crowd):
    """At once gone for everybody else; its memory when the bytes are through."""
    _, owner, (reader, other) = crowd
    for process in (reader, other):
        process.call(prepare, 2, WEIGHT // 2)
    key = owner.call(allocate, 2, WEIGHT // 2, 6)
    with halfway(owner, reader, lambda: reader.begin(take, key, 6)) as finish:
        owner.call(deallocate)
        assert holds(owner.stats())[1:] == (0, 1, WEIGHT)
        refused(NOT_EXIST, other.call, take, key, 6)
    assert finish()
    assert holds(owner.stats()) == NOTHING
    refused(NOT_EXIST, reader.call, take, key, 6)
    for process in (reader, other):
        process.call(put_away)


def test_unregistered_in_the_middle(crowd):
    """The call waits for the reader; from then on the memory is the caller's, and was read before."""
    _, owner, (reader, _) = crowd
    reader.call(prepare, 2, WEIGHT // 2)
    memory = [wanted(WEIGHT // 2, 7 + number) for number in range(2)]
    desc = CacheDesc(2, [1, WEIGHT // 2], DataType.DT_UINT8)
    manager = owner.node.cache_manager
    cache = manager.register_cache(desc, [tensor.ctypes.data for tensor in memory])
    key = CacheKeyByIdAndIndex(THERE, cache.cache_id, 0)
    faults = []

    def unregister():
        try:
            manager.unregister_cache(cache.cache_id)
            for tensor in memory:
                tensor[:] = 0xEE
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=unregister)
    with halfway(owner, reader, lambda: reader.begin(take, key, 7)) as finish:
        thread.start()
        assert until(lambda: is_withdrawn(owner))
        assert thread.is_alive() and owner.stats()["registered_caches"] == 1
    assert finish()
    thread.join()
    assert faults == []
    assert holds(owner.stats()) == NOTHING
    reader.call(put_away)


def is_withdrawn(owner):
    """Whether the cache has no handle any more: nobody finds it."""
    return any(not row["handle"] for row in owner.node.dist._require_engine().caches())

"""Transfers that must fail: the documented status, the offending value in the text, and not a byte moved anywhere."""
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import reference
from transfers.caches import Named, Spec, drop, invoke, make
from transfers.owner import NONE
from transfers.refusal import INVALID, NOT_EXIST, NOT_LINKED, refused

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMStatusCode

NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
STRANGER = 12345                # a cluster nobody is linked to
REQ, PREFIX, MODEL = 31, 32, 33


class Stage:
    """Caches on both sides that no refused call may change.

    There: `slots`, contiguous, 4 tensors of 3 slots of 64 bytes, with keys; `blocks`, 4 tensors of 5 blocks of 64
    bytes. Here: the same shapes with 2 slots and 4 blocks, and others that do not fit.
    """

    def __init__(self, pair, scene):
        self.pair = pair
        self.scene = scene
        self.there = pair.there.cluster_id
        self.here = pair.here.cluster_id
        keys = (CacheKey(1, REQ, MODEL), CacheKey(1, NONE, MODEL, PREFIX))
        self.ids = {}
        for process, name, spec in [
                (pair.there, "slots", Spec(4, 3, (64,), keys=keys)),
                (pair.there, "blocks", Spec(4, 5, (64,), is_blocks=True, keys=(BlocksCacheKey(1, MODEL),))),
                (pair.there, "host slots", Spec(4, 3, (64,), on_host=True)),
                (pair.there, "private slots", Spec(4, 3, (64,), is_registered=True, remote_accessible=False)),
                (pair.there, "private blocks", Spec(4, 3, (64,), is_blocks=True, is_registered=True,
                                                    remote_accessible=False, keys=(BlocksCacheKey(1, MODEL + 1),))),
                (pair.here, "dst", Spec(4, 2, (64,))),
                (pair.here, "dst blocks", Spec(4, 4, (64,), is_blocks=True)),
                (pair.here, "two tensors", Spec(2, 2, (64,))),
                (pair.here, "five tensors", Spec(5, 2, (64,))),
                (pair.here, "wide", Spec(4, 2, (65,))),
                (pair.here, "wide blocks", Spec(4, 4, (65,), is_blocks=True)),
                (pair.here, "narrow", Spec(4, 2, (63,))),
                (pair.here, "private", Spec(4, 2, (64,), is_registered=True, remote_accessible=False)),
                (pair.here, "private dst blocks", Spec(4, 4, (64,), is_blocks=True, is_registered=True,
                                                       remote_accessible=False)),
        ]:
            made, _ = scene.make(process, name, spec._replace(seed=len(self.ids)))
            self.ids[name] = made.cache_id
        self.held = [self.counts(process) for process in (pair.here, pair.there)]

    @staticmethod
    def counts(process):
        stats = process.settled()
        return {name: stats[name] for name in ("caches", "keys", "pins", "links", "device_pool")}

    def by_id(self, name, slot=0, cluster=None):
        """A key by id of a cache there."""
        return CacheKeyByIdAndIndex(self.there if cluster is None else cluster, self.ids[name], slot)

    def blocks_key(self, model=MODEL, cluster=None):
        """The key of blocks there."""
        return BlocksCacheKey(self.there if cluster is None else cluster, model)

    def refuses(self, code, names, method, *args, **kwargs):
        """Call the manager here; it is refused, and both sides are as before."""
        if code in (TypeError, ValueError):
            with pytest.raises(code) as caught:
                self.pair.here.call(invoke, method, *args, **kwargs)
            assert all(str(name) in str(caught.value) for name in names), caught.value
        else:
            refused(code, self.pair.here.call, invoke, method, *args, names=names, **kwargs)
        self.scene.check()
        assert [self.counts(process) for process in (self.pair.here, self.pair.there)] == self.held


@pytest.fixture(scope="module")
def stage(mode_pair):
    """The caches of a module; nothing changes them."""
    with mode_pair.scene() as scene:
        yield Stage(mode_pair, scene)


ROWS = {
    # name: (code, values that the text names, cache here, key, more arguments)
    "unknown id": (NOT_EXIST, [2**40], "dst", lambda s: CacheKeyByIdAndIndex(s.there, 2**40)),
    "id 0": (NOT_EXIST, [], "dst", lambda s: CacheKeyByIdAndIndex(s.there, 0)),
    "negative id": (NOT_EXIST, [], "dst", lambda s: CacheKeyByIdAndIndex(s.there, -5)),
    "unlinked": (NOT_LINKED, [STRANGER], "dst", lambda s: s.by_id("slots", cluster=STRANGER)),
    "own cluster": (INVALID, ["this one"], "dst", lambda s: s.by_id("slots", cluster=s.here)),
    "source slot": (NOT_EXIST, [3], "dst", lambda s: s.by_id("slots", 3)),
    "last source slot": (NOT_EXIST, [2**32 - 1], "dst", lambda s: s.by_id("slots", 2**32 - 1)),
    "destination slot": (INVALID, [2], "dst", lambda s: s.by_id("slots"), {"batch_index": 2}),
    "last destination slot": (INVALID, [2**32 - 1], "dst", lambda s: s.by_id("slots"), {"batch_index": 2**32 - 1}),
    "size": (INVALID, [65, 64], "dst", lambda s: s.by_id("slots"), {"size": 65}),
    "huge size": (INVALID, [2**63 - 1], "dst", lambda s: s.by_id("slots"), {"size": 2**63 - 1}),
    "size 0": (INVALID, [0], "dst", lambda s: s.by_id("slots"), {"size": 0}),
    "size -2": (INVALID, [-2], "dst", lambda s: s.by_id("slots"), {"size": -2}),
    "source too small": (INVALID, [65, 64], "wide", lambda s: s.by_id("slots")),
    "destination too small": (INVALID, [64, 63], "narrow", lambda s: s.by_id("slots"), {"size": 64}),
    "fewer tensors": (INVALID, [2, 4], "two tensors", lambda s: s.by_id("slots")),
    "more tensors": (INVALID, [5, 4], "five tensors", lambda s: s.by_id("slots")),
    "layers of the source only": (INVALID, [4, 2], "dst", lambda s: s.by_id("slots"),
                                  {"src_layer_range": range(1, 2)}),
    "layers of the destination only": (INVALID, [4, 2], "dst", lambda s: s.by_id("slots"),
                                       {"dst_layer_range": range(1, 2)}),
    "unequal layers": (INVALID, ["range(0, 1)", "range(0, 2)"], "dst", lambda s: s.by_id("slots"),
                       {"src_layer_range": range(1), "dst_layer_range": range(2)}),
    "source layers": (INVALID, [6, 4], "dst", lambda s: s.by_id("slots"),
                      {"src_layer_range": range(1, 3), "dst_layer_range": range(2)}),
    "destination layers": (INVALID, [6, 4], "dst", lambda s: s.by_id("slots"),
                           {"src_layer_range": range(2), "dst_layer_range": range(1, 3)}),
    "far layers": (INVALID, [2**32], "dst", lambda s: s.by_id("slots"),
                   {"src_layer_range": range(2**32, 2**32 + 1), "dst_layer_range": range(1)}),
    "step": (INVALID, ["range(0, 4, 2)"], "dst", lambda s: s.by_id("slots"), {"src_layer_range": range(0, 4, 2)}),
    "negative layer": (INVALID, ["range(-1, 1)"], "dst", lambda s: s.by_id("slots"), {"src_layer_range": range(-1, 1)}),
    "no whole layers": (INVALID, [5, 2], "five tensors", lambda s: s.by_id("slots"), {"src_layer_range": range(1)}),
    "no tensors per layer": (INVALID, [0], "dst", lambda s: s.by_id("slots"), {"tensor_num_per_layer": 0}),
    "layers of no range": (TypeError, ["src_layer_range"], "dst", lambda s: s.by_id("slots"),
                           {"src_layer_range": [0, 1]}),
    "from blocks": (INVALID, ["blocks"], "dst", lambda s: s.by_id("blocks")),
    "into blocks": (INVALID, ["blocks"], "dst blocks", lambda s: s.by_id("slots")),
    "size as float": (TypeError, ["size"], "dst", lambda s: s.by_id("slots"), {"size": 1.0}),
    "slot as text": (TypeError, ["batch_index"], "dst", lambda s: s.by_id("slots"), {"batch_index": "0"}),
    "negative slot": (ValueError, [-1], "dst", lambda s: s.by_id("slots"), {"batch_index": -1}),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_pull_cache(stage, row):
    code, names, cache, key, *more = row
    stage.refuses(code, names, "pull_cache", key(stage), Named(cache), **(more[0] if more else {}))


BLOCKS = {
    # name: (code, values that the text names, cache here, key, source blocks, destination blocks, more arguments)
    "unknown model": (NOT_EXIST, [], "dst blocks", lambda s: s.blocks_key(MODEL + 9), [0], [0]),
    "unknown request": (NOT_EXIST, [77], "dst blocks", lambda s: CacheKey(s.there, 77, MODEL), [], [0]),
    "request of another model": (NOT_EXIST, [REQ], "dst blocks", lambda s: CacheKey(s.there, REQ, 0), [], [0]),
    "prefix as request": (NOT_EXIST, [PREFIX], "dst blocks", lambda s: CacheKey(s.there, PREFIX, MODEL), [], [0]),
    "request as prefix": (NOT_EXIST, [REQ], "dst blocks", lambda s: CacheKey(s.there, NONE, MODEL, REQ), [], [0]),
    "request and prefix": (INVALID, [REQ, PREFIX], "dst blocks", lambda s: CacheKey(s.there, REQ, MODEL, PREFIX), [],
                           [0]),
    "neither": (INVALID, [NONE], "dst blocks", lambda s: CacheKey(s.there, NONE, MODEL), [], [0]),
    "unlinked": (NOT_LINKED, [STRANGER], "dst blocks", lambda s: s.blocks_key(cluster=STRANGER), [0], [0]),
    "own cluster": (INVALID, ["this one"], "dst blocks", lambda s: s.blocks_key(cluster=s.here), [0], [0]),
    "source block": (INVALID, [5], "dst blocks", lambda s: s.blocks_key(), [0, 5], [0, 1]),
    "destination block": (INVALID, [4], "dst blocks", lambda s: s.blocks_key(), [0, 1], [0, 4]),
    "far source block": (INVALID, [2**62], "dst blocks", lambda s: s.blocks_key(), [0, 2**62], [0, 1]),
    "far destination block": (INVALID, [2**62], "dst blocks", lambda s: s.blocks_key(), [0, 1], [0, 2**62]),
    "wrapping block": (ValueError, [2**63], "dst blocks", lambda s: s.blocks_key(), [0, 2**63], [0, 1]),
    "negative source block": (ValueError, [-1], "dst blocks", lambda s: s.blocks_key(), [0, -1], [0, 1]),
    "negative destination block": (ValueError, [-1], "dst blocks", lambda s: s.blocks_key(), [0, 1], [0, -1]),
    "negative in an array": (ValueError, [-1], "dst blocks", lambda s: s.blocks_key(), [0, 1],
                             np.array([0, -1], np.int32)),
    "fewer sources": (INVALID, [1, 2], "dst blocks", lambda s: s.blocks_key(), [0], [0, 1]),
    "more sources": (INVALID, [3, 2], "dst blocks", lambda s: s.blocks_key(), [0, 1, 2], [0, 1]),
    "no destination": (INVALID, ["dst_blocks"], "dst blocks", lambda s: s.blocks_key(), [0], []),
    "no source": (INVALID, ["src_blocks"], "dst blocks", lambda s: s.blocks_key(), [], [0]),
    "source blocks of a slot": (INVALID, ["src_blocks"], "dst blocks", lambda s: s.by_id("slots"), [0], [0]),
    "block of text": (TypeError, ["src_blocks"], "dst blocks", lambda s: s.blocks_key(), ["0"], [0]),
    "block of float": (TypeError, ["dst_blocks"], "dst blocks", lambda s: s.blocks_key(), [0], [0.0]),
    "blocks of None": (TypeError, ["src_blocks"], "dst blocks", lambda s: s.blocks_key(), None, [0]),
    "other block size": (INVALID, [64, 65], "wide blocks", lambda s: s.blocks_key(), [0], [0]),
    "into slots": (INVALID, ["contiguous"], "dst", lambda s: s.blocks_key(), [0], [0]),
    "blocks by id": (INVALID, ["blocks"], "dst blocks", lambda s: s.by_id("blocks"), [], [0]),
    "more blocks than the slot": (INVALID, [2, 1], "dst blocks", lambda s: s.by_id("slots"), [], [0, 1]),
    "block of the slot": (INVALID, [4], "dst blocks", lambda s: s.by_id("slots"), [], [4]),
    "short piece": (INVALID, [4], "wide blocks", lambda s: s.by_id("slots"), [], [4]),
    "slot": (NOT_EXIST, [3], "dst blocks", lambda s: s.by_id("slots", 3), [], [0]),
    "slots on the host": (NOT_ENABLED, [], "dst blocks", lambda s: s.by_id("host slots"), [], [0]),
    "layers": (INVALID, [6, 4], "dst blocks", lambda s: s.blocks_key(), [0], [0],
               {"src_layer_range": range(1, 3), "dst_layer_range": range(2)}),
    "unequal layers": (INVALID, [2, 4], "dst blocks", lambda s: s.blocks_key(), [0], [0],
                       {"src_layer_range": range(1, 2)}),
}


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS.keys())
def test_pull_blocks(stage, row):
    code, names, cache, key, src_blocks, dst_blocks, *more = row
    stage.refuses(code, names, "pull_blocks", key(stage), Named(cache), src_blocks, dst_blocks,
                  **(more[0] if more else {}))


KEYS = {
    "unknown request": (NOT_EXIST, [77], lambda s: CacheKey(s.there, 77, MODEL)),
    "request of another model": (NOT_EXIST, [REQ], lambda s: CacheKey(s.there, REQ, 0)),
    "request as prefix": (NOT_EXIST, [REQ], lambda s: CacheKey(s.there, NONE, MODEL, REQ)),
    "request and prefix": (INVALID, [REQ, PREFIX], lambda s: CacheKey(s.there, REQ, MODEL, PREFIX)),
    "neither": (INVALID, [NONE], lambda s: CacheKey(s.there, NONE, MODEL)),
    "unlinked": (NOT_LINKED, [STRANGER], lambda s: CacheKey(STRANGER, REQ, MODEL)),
    "own cluster": (INVALID, ["this one"], lambda s: CacheKey(s.here, REQ, MODEL)),
}


@pytest.mark.parametrize("row", KEYS.values(), ids=KEYS.keys())
def test_pull_cache_by_key(stage, row):
    """In remote-accessible mode no key but one by id is a key at all."""
    code, names, key = row
    if stage.pair.remote_accessible:
        code, names = TypeError, ["CacheKeyByIdAndIndex"]
    stage.refuses(code, names, "pull_cache", key(stage), Named("dst"))


PUSHES = {
    "unknown id": (NOT_EXIST, [2**40], "dst", lambda s: CacheKeyByIdAndIndex(s.there, 2**40)),
    "unlinked": (NOT_LINKED, [STRANGER], "dst", lambda s: s.by_id("slots", cluster=STRANGER)),
    "own cluster": (INVALID, ["this one"], "dst", lambda s: s.by_id("slots", cluster=s.here)),
    "destination slot": (INVALID, [3], "dst", lambda s: s.by_id("slots", 3)),
    "last destination slot": (INVALID, [2**32 - 1], "dst", lambda s: s.by_id("slots", 2**32 - 1)),
    "source slot": (INVALID, [2], "dst", lambda s: s.by_id("slots"), {"src_batch_index": 2}),
    "size": (INVALID, [64], "dst", lambda s: s.by_id("slots"), {"size": 64}),
    "wider": (INVALID, [65, 64], "wide", lambda s: s.by_id("slots")),
    "narrower": (INVALID, [63, 64], "narrow", lambda s: s.by_id("slots")),
    "from blocks": (INVALID, ["blocks"], "dst blocks", lambda s: s.by_id("slots")),
    "into blocks": (INVALID, ["blocks"], "dst", lambda s: s.by_id("blocks")),
    "more tensors": (INVALID, [5, 4], "five tensors", lambda s: s.by_id("slots"), {"tensor_num_per_layer": 1}),
    "source layers": (INVALID, [6, 4], "dst", lambda s: s.by_id("slots"),
                      {"src_layer_range": range(1, 3), "dst_layer_range": range(2)}),
    "destination layers": (INVALID, [6, 4], "dst", lambda s: s.by_id("slots"),
                           {"src_layer_range": range(2), "dst_layer_range": range(1, 3)}),
    "unequal layers": (INVALID, ["range(0, 1)", "range(0, 2)"], "dst", lambda s: s.by_id("slots"),
                       {"src_layer_range": range(1), "dst_layer_range": range(2)}),
    "empty layers": (INVALID, ["range(1, 1)"], "dst", lambda s: s.by_id("slots"), {"src_layer_range": range(1, 1)}),
    "not accessible there": (INVALID, ["accessible"], "dst", lambda s: s.by_id("private slots")),
    "not accessible here": (INVALID, ["accessible"], "private", lambda s: s.by_id("slots")),
}


@pytest.mark.parametrize("row", PUSHES.values(), ids=PUSHES.keys())
def test_push_cache(stage, row):
    code, names, cache, key, *more = row
    if not stage.pair.remote_accessible:
        code, names = INVALID, []           # no push at all in this mode
    stage.refuses(code, names, "push_cache", key(stage), Named(cache), **(more[0] if more else {}))


PUSHED_BLOCKS = {
    "unknown model": (NOT_EXIST, [], "dst blocks", MODEL + 9, [0], [0]),
    "source block": (INVALID, [4], "dst blocks", MODEL, [0, 4], [0, 1]),
    "destination block": (INVALID, [5], "dst blocks", MODEL, [0, 1], [0, 5]),
    "negative source block": (ValueError, [-1], "dst blocks", MODEL, [0, -1], [0, 1]),
    "negative destination block": (ValueError, [-1], "dst blocks", MODEL, [0, 1], [-1, 0]),
    "fewer sources": (INVALID, [1, 2], "dst blocks", MODEL, [0], [0, 1]),
    "more sources": (INVALID, [2, 1], "dst blocks", MODEL, [0, 1], [1]),
    "no destination": (INVALID, ["dst_blocks"], "dst blocks", MODEL, [0], []),
    "no source": (INVALID, ["src_blocks"], "dst blocks", MODEL, [], [0]),
    "other block size": (INVALID, [64, 65], "wide blocks", MODEL, [0], [0]),
    "from slots": (INVALID, ["contiguous"], "dst", MODEL, [0], [0]),
    "not accessible there": (INVALID, ["accessible"], "dst blocks", MODEL + 1, [0], [0]),
    "not accessible here": (INVALID, ["accessible"], "private dst blocks", MODEL, [0], [0]),
}


@pytest.mark.parametrize("row", PUSHED_BLOCKS.values(), ids=PUSHED_BLOCKS.keys())
def test_push_blocks(stage, row):
    code, names, cache, model, src_blocks, dst_blocks = row
    if not stage.pair.remote_accessible:
        code, names = INVALID, []
    stage.refuses(code, names, "push_blocks", stage.blocks_key(model), Named(cache), src_blocks, dst_blocks)


# ------------------------------------------------------------------------------------- memory that is not accessible

def test_pulls_of_memory_that_is_not_accessible(stage):
    """Refused in remote-accessible mode; the other mode does not ask."""
    pulls = [("pull_cache", stage.by_id("private slots"), "dst", (), "private slots"),
             ("pull_cache", stage.by_id("slots"), "private", (), "private"),
             ("pull_blocks", stage.blocks_key(MODEL + 1), "dst blocks", ([0], [0]), "private blocks"),
             ("pull_blocks", stage.blocks_key(), "private dst blocks", ([0], [0]), "private dst blocks")]
    for method, key, cache, blocks, refusing in pulls:
        if stage.pair.remote_accessible:
            stage.refuses(INVALID, ["accessible", stage.ids[refusing]], method, key, Named(cache), *blocks)


def test_private_memory_moves_in_two_sided_mode(stage):
    pair, scene = stage.pair, stage.scene
    spec = Spec(2, 3, (64,), is_registered=True, remote_accessible=pair.remote_accessible)
    made, source = scene.make(pair.there, "moved", spec)
    _, target = scene.make(pair.here, "moved to", spec._replace(num_slots=1, seed=1))
    pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(stage.there, made.cache_id, 2), Named("moved to"))
    reference.copy_slot(target, 0, source, 2, 64)
    scene.check()
    for name in ("moved", "moved to"):
        scene.forget(name)


# ---------------------------------------------------------------------------------------------- what is gone by now

SLOTS = Spec(2, 1, (64,))
PAGED = Spec(2, 4, (64,), is_blocks=True)


@pytest.mark.parametrize("is_registered", [False, True])
def test_source_is_gone(stage, is_registered):
    """Its id stays dead when its memory and its slot in the table serve another cache."""
    accessible = True if is_registered else None
    pair = stage.pair
    made = pair.there.call(make, "old", SLOTS._replace(is_registered=is_registered, remote_accessible=accessible))
    pair.there.call(drop, "old")
    key = CacheKeyByIdAndIndex(stage.there, made.cache_id)
    stage.refuses(NOT_EXIST, [made.cache_id], "pull_cache", key, Named("dst"))
    new = pair.there.call(make, "new", SLOTS._replace(is_registered=is_registered, remote_accessible=accessible))
    try:
        assert new.cache_id != made.cache_id
        refused(NOT_EXIST, pair.here.call, invoke, "pull_cache", key, Named("dst"), names=made.cache_id)
        stage.scene.check()
    finally:
        pair.there.call(drop, "new")


def test_blocks_key_is_gone_with_its_cache(stage):
    key = BlocksCacheKey(stage.there, MODEL + 5)
    stage.pair.there.call(make, "old", PAGED._replace(num_tensors=4, keys=(key,)))
    stage.pair.there.call(drop, "old")
    stage.refuses(NOT_EXIST, [], "pull_blocks", key, Named("dst blocks"), [0], [0])


@pytest.mark.parametrize("is_registered", [False, True])
@pytest.mark.parametrize("is_blocks", [False, True])
def test_destination_is_gone(stage, is_registered, is_blocks):
    """A dead handle is refused, and what has its memory now stays as it is."""
    pair = stage.pair
    spec = Spec(4, 4, (64,), is_blocks=is_blocks, is_registered=is_registered, seed=77)
    made = pair.here.call(make, "dead", spec)
    pair.here.call(bury, "dead")
    heir, _ = stage.scene.make(pair.here, "heir", spec._replace(is_registered=False, seed=78))
    assert heir.cache_id != made.cache_id
    method, key, blocks = ("pull_blocks", stage.blocks_key(), ([0], [1])) if is_blocks else \
        ("pull_cache", stage.by_id("slots"), ())
    refused(NOT_EXIST, pair.here.call, invoke, method, key, Named("dead"), *blocks, names=made.cache_id)
    stage.scene.check()
    stage.scene.forget("heir")


class Dead(NamedTuple):
    """What is left of a cache that was given back."""

    cache: Any


def bury(node, name):
    """Give a cache back and keep its handle."""
    cache = node.kept[name].cache
    drop(node, name)
    node.kept[name] = Dead(cache)


def test_push_into_a_cache_that_is_gone(stage):
    made = stage.pair.there.call(make, "old", SLOTS._replace(num_tensors=4))
    stage.pair.there.call(drop, "old")
    code, names = (NOT_EXIST, [made.cache_id]) if stage.pair.remote_accessible else (INVALID, [])
    stage.refuses(code, names, "push_cache", CacheKeyByIdAndIndex(stage.there, made.cache_id),
                  Named("dst"))


def test_deallocate_needs_a_cache_of_that_kind(stage):
    stage.refuses(INVALID, ["blocks"], "deallocate_cache", Named("dst blocks"))
    stage.refuses(INVALID, ["contiguous"], "deallocate_blocks_cache", Named("dst"))

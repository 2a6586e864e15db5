"""Caches of different data types: refused with both described, whichever way the call would have gone."""
import re

import pytest
from support import reference
from support.peer import Peers
from transfers.caches import Named, Spec, invoke
from transfers.pair import PATHS, linked_pair
from transfers.refusal import INVALID, refused
from transfers.tasks import transfer

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMParamInvalidError,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

HALF, FLOAT = DataType.DT_FLOAT16, DataType.DT_FLOAT
SLOTS = Spec(4, 2, (8, 16), HALF)
BLOCKS = Spec(4, 4, (8, 16), HALF, is_blocks=True)


def wide(spec):
    """The same bytes, said to be FP32."""
    return spec._replace(data_type=FLOAT, slot_shape=(8, 8))


@pytest.fixture(scope="module", params=[(remote, path) for remote in (False, True) for path in PATHS],
                ids=lambda param: f"{'remote_accessible' if param[0] else 'two_sided'}-{param[1]}")
def strict_pair(request):
    with Peers() as peers:
        yield linked_pair(peers, *request.param, llm_Strict="1")


@pytest.fixture
def scene(strict_pair):
    with strict_pair.scene() as scene:
        made, _ = scene.make(strict_pair.there, "slots", SLOTS._replace(keys=(CacheKey(1, 7),), seed=1))
        peer = strict_pair.there.cluster_id
        scene.slot_key = (CacheKeyByIdAndIndex(peer, made.cache_id, 0) if strict_pair.remote_accessible
                          else CacheKey(peer, 7))
        scene.make(strict_pair.there, "blocks", BLOCKS._replace(keys=(BlocksCacheKey(1),), seed=2))
        scene.make(strict_pair.here, "dst slots", wide(SLOTS))
        scene.make(strict_pair.here, "dst blocks", wide(BLOCKS))
        yield scene
        scene.check()
        for process in (strict_pair.here, strict_pair.there):
            assert process.settled()["pins"] == 0


HERE_IS, THERE_IS = "4 tensors of DT_FLOAT [{}, 8, 8]", "4 tensors of DT_FLOAT16 [{}, 8, 16]"


def refuse(pair, slots_here, slots_there, method, *args, **kwargs):
    """Both descriptions and the remedy are in the text, and nothing moved."""
    peer = pair.there.cluster_id
    text = refused(INVALID, pair.here.call, invoke, method, *args, names=(
        HERE_IS.format(slots_here), THERE_IS.format(slots_there), f"of cluster {peer}", "llm.Strict=0"), **kwargs)
    assert re.search(r"local cache \d+ has .*, but cache \d+ of cluster", text)


def test_pulls_are_refused(strict_pair, scene):
    pair, peer = strict_pair, strict_pair.there.cluster_id
    for _ in range(2):                              # the second time addresses are known
        refuse(pair, 2, 2, "pull_cache", scene.slot_key, Named("dst slots"))
        refuse(pair, 2, 2, "pull_cache", scene.slot_key, Named("dst slots"), size=16)
        refuse(pair, 4, 4, "pull_blocks", BlocksCacheKey(peer), Named("dst blocks"), [0, 3], [1, 2])
        refuse(pair, 4, 4, "pull_blocks", BlocksCacheKey(peer), Named("dst blocks"), [0], [1],
               src_layer_range=range(1), dst_layer_range=range(1, 2))
        refuse(pair, 4, 2, "pull_blocks", scene.slot_key, Named("dst blocks"), [], [1])
    assert pair.there.stats()["keys"] == 2          # not taken


def test_an_exception_says_what_was_not_filled(strict_pair, scene):
    peer = strict_pair.there.cluster_id
    with pytest.raises(LLMParamInvalidError) as caught:
        strict_pair.here.call(invoke, "pull_blocks", BlocksCacheKey(peer), Named("dst blocks"), [0, 3], [1, 2])
    error = caught.value
    assert (error.stage, error.peer, error.recoverable) == ("plan", peer, False)
    assert (error.failed_blocks, error.failed_layers) == ([1, 2], range(2))


def test_pushes_are_refused(strict_pair, scene):
    pair, peer = strict_pair, strict_pair.there.cluster_id
    if not pair.remote_accessible:
        pytest.skip("pushes are for remote-accessible caches")
    slots = scene.make(pair.there, "target", SLOTS._replace(seed=3))[0]
    layers = {"src_layer_range": range(2), "dst_layer_range": range(2)}
    refuse(pair, 2, 2, "push_cache", CacheKeyByIdAndIndex(peer, slots.cache_id, 1), Named("dst slots"), **layers)
    refuse(pair, 4, 4, "push_blocks", BlocksCacheKey(peer), Named("dst blocks"), [0], [1], **layers)


def test_layered_pushes_are_refused(strict_pair, scene):
    """By key, and by addresses that lie in caches of another type; also where only the last of them does."""
    pair, peer = strict_pair, strict_pair.there.cluster_id
    target = scene.make(pair.there, "target", SLOTS._replace(seed=3))[0]
    same = scene.make(pair.there, "same", wide(SLOTS)._replace(seed=4))[0]
    configs = [TransferConfig(peer, addrs, range(2))
               for addrs in (target.addrs, same.addrs[:3] + target.addrs[3:])]
    if pair.remote_accessible:
        configs.append(TransferWithCacheKeyConfig(
            CacheKeyByIdAndIndex(peer, target.cache_id, 0), range(2), range(2)))
    for config in configs:
        outcome = pair.here.call(transfer, "dst slots", [config])
        assert outcome.code is INVALID
        assert HERE_IS.format(2) in str(outcome.error) and THERE_IS.format(2) in str(outcome.error)
    if pair.remote_accessible:
        allowed = pair.here.call(transfer, "dst slots", [TransferConfig(peer, same.addrs, range(2))])
        assert allowed.code is LLMStatusCode.LLM_SUCCESS
        scene.lose("same")


def test_equal_types_of_other_shapes_go(strict_pair, scene):
    """Whatever the shapes: bytes of a slot decide, as before."""
    pair, peer = strict_pair, strict_pair.there.cluster_id
    _, target = scene.make(pair.here, "flat", Spec(4, 3, (128,), HALF))
    made, source = scene.make(pair.there, "deep", Spec(4, 1, (2, 2, 2, 2, 2, 2, 1, 2), HALF))
    pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(peer, made.cache_id, 0), Named("flat"), 2)
    reference.copy_slot(target, 2, source, 0, source.stride)
    scene.check()

"""A destination block that occurs twice in one request is refused, and nothing moves; a switch lets it through."""
import numpy as np
import pytest
from support.peer import Peers
from transfers.caches import Named, Spec, invoke
from transfers.pair import linked_pair
from transfers.refusal import INVALID, refused

from llm_datadist import BlocksCacheKey, CacheKeyByIdAndIndex


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(request):
    """A pair that is as strict as it is by default, on each way to ask the owner."""
    with Peers() as peers:
        yield linked_pair(peers, True, request.param, llm_Strict="1")


@pytest.fixture
def scene(pair):
    with pair.scene() as scene:
        yield scene


@pytest.mark.parametrize("call", ["pull_blocks", "push_blocks"])
@pytest.mark.parametrize("src, dst, repeated", [
    ([0, 1], [2, 2], 2), ([0, 1, 2, 3], [0, 1, 2, 1], 1), ((3, 2, 1), (3, 2, 3), 3),
    (np.arange(4), np.array([3, 0, 1, 0]), 0),
])
def test_blocks(pair, scene, call, src, dst, repeated):
    key = BlocksCacheKey(pair.there.cluster_id, 4)
    scene.make(pair.there, "there", Spec(2, 4, (16,), is_blocks=True, keys=(key,), seed=1))
    scene.make(pair.here, "here", Spec(2, 4, (16,), is_blocks=True, seed=2))
    error = refused(INVALID, pair.here.call, invoke, call, key, Named("here"), src, dst)
    assert f"block {repeated} occurs more than once in dst_blocks" in error and "llm.Strict" in error
    scene.check()


@pytest.mark.parametrize("dst", [[1, 1], [1, 0, 1]])
def test_a_slot_cut_into_blocks(pair, scene, dst):
    """The last piece is a short one, which shares its block with a whole one."""
    made, _ = scene.make(pair.there, "there", Spec(2, 1, (16 * len(dst) - 8,), seed=1))
    scene.make(pair.here, "here", Spec(2, 4, (16,), is_blocks=True, seed=2))
    key = CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id)
    assert "block 1 occurs more than once" in refused(
        INVALID, pair.here.call, invoke, "pull_blocks", key, Named("here"), [], dst)
    scene.check()


def test_a_source_may_repeat(pair, scene):
    key = BlocksCacheKey(pair.there.cluster_id, 4)
    _, source = scene.make(pair.there, "there", Spec(1, 4, (16,), is_blocks=True, keys=(key,), seed=1))
    _, target = scene.make(pair.here, "here", Spec(1, 4, (16,), is_blocks=True, seed=2))
    pair.here.call(invoke, "pull_blocks", key, Named("here"), [3, 3], [0, 2])
    blocks = np.frombuffer(target.tensors[0], np.uint8).reshape(4, 16)
    blocks[[0, 2]] = np.frombuffer(source.tensors[0], np.uint8).reshape(4, 16)[3]
    scene.check()

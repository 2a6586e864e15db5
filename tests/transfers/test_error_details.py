"""What the exception of a failed call with a peer says: with whom, how far it came, what is missing, what to do."""
import re
from pathlib import Path

import pytest
from support.peer import Peers
from transfers.caches import Named, Spec, invoke
from transfers.pair import linked_pair

from llm_datadist import (
    BlocksCacheKey,
    LLMException,
    LLMLinkError,
    LLMNotFoundError,
    LLMParamInvalidError,
)

NOBODY = 99
BLOCKS = Spec(4, 4, (16,), is_blocks=True)


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(request):
    with Peers() as peers:
        yield linked_pair(peers, True, request.param, llm_Strict="1")


@pytest.fixture
def scene(pair):
    with pair.scene() as scene:
        scene.make(pair.here, "here", BLOCKS)
        scene.make(pair.there, "there", BLOCKS._replace(keys=(BlocksCacheKey(1, 4),)))
        yield scene


def failure(process, *call, **kwargs):
    with pytest.raises(LLMException) as caught:
        process.call(invoke, *call, **kwargs)
    return caught.value


def check(error, kind, operation, peer, stage, recoverable, hint, blocks, layers):
    assert type(error) is kind, repr(error)
    assert (error.operation, error.peer, error.stage, error.recoverable) == (operation, peer, stage, recoverable)
    assert (error.failed_blocks, error.failed_layers) == (blocks, layers)
    if hint:
        assert hint in error.hint and str(error).endswith(f"Hint: {error.hint}.")


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_a_cache_that_is_not_there(pair, scene, operation):
    peer = pair.there.cluster_id
    error = failure(pair.here, operation, BlocksCacheKey(peer, 5), Named("here"), [0, 1], [3, 2])
    check(error, LLMNotFoundError, operation, peer, "resolve", False, "compute the cache again", [3, 2], range(2))


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_no_link(pair, scene, operation):
    error = failure(pair.here, operation, BlocksCacheKey(NOBODY, 4), Named("here"), [0], [3], src_layer_range=range(1),
                    dst_layer_range=range(1, 2))
    check(error, LLMLinkError, operation, NOBODY, "link", True, "link the peer", [3], range(1, 2))


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_blocks_that_do_not_fit(pair, scene, operation):
    peer = pair.there.cluster_id
    src, dst = (9, 0) if operation == "pull_blocks" else (0, 9)
    error = failure(pair.here, operation, BlocksCacheKey(peer, 4), Named("here"), [src], [dst])
    check(error, LLMParamInvalidError, operation, peer, "plan", False, None, [dst], range(2))


def test_the_own_cluster(pair, scene):
    own = pair.here.cluster_id
    error = failure(pair.here, "pull_blocks", BlocksCacheKey(own, 4), Named("here"), [0], [1])
    check(error, LLMParamInvalidError, "pull_blocks", own, "check", False, None, [1], range(2))


# They return codes, know the peer as one of many, or list what there is.
NO_PEER = {"link", "links", "unlink", "expect", "raise_for_peer", "__init__", "_open_all", "_open_record"}
ENGINE = Path(__file__).resolve().parents[2] / "llm_datadist" / "core" / "engine"


@pytest.mark.parametrize("path", sorted(ENGINE.glob("*.pyx")), ids=lambda path: path.stem)
def test_every_raising_site_that_knows_the_peer_names_it(path):
    """Functions of the engine that have a cluster at hand raise through ``raise_for_peer``."""
    functions = re.split(r"^(?:    )?(?:def|cdef) ", path.read_text(encoding="utf-8"), flags=re.M)
    guilty = []
    for function in functions[1:]:
        name = function.partition("(")[0].split()[-1]
        bare = re.findall(r"(?<!_)raise_(?:for|status)\((?!.*LDD_E_INTERRUPTED)", function)
        if "cluster_id" in function and bare and name not in NO_PEER:
            guilty.append(name)
    assert guilty == []

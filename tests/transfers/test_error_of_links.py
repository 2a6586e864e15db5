"""What the exception says when it is the link that fails; see ``test_error_details.py`` for the rest."""
import pytest
from support.link_steps import stopped
from support.peer import Peers, engine_options_v1
from transfers.caches import Named, Spec
from transfers.pair import linked_pair
from transfers.test_error_details import NOBODY, check, failure

from llm_datadist import CacheKey, CacheKeyByIdAndIndex, LLMLinkError, LLMRole, LLMTimeoutError

AGAIN = "repeat the call: it makes the link anew"


def test_a_peer_that_is_stopped():
    """The first call runs out of time, and breaks the link; the next ones say what became of it."""
    with Peers() as peers:
        pair = linked_pair(peers, False, "tcp", timeout_ms=300)
        peer = pair.there.cluster_id
        with pair.scene() as scene:
            scene.make(pair.here, "slot", Spec(4, 1, (16,)))
            with stopped(pair.there):
                error = failure(pair.here, "pull_cache", CacheKey(peer, 7), Named("slot"))
                assert error.stage in ("resolve", "transfer")
                check(error, LLMTimeoutError, "pull_cache", peer, error.stage, True, AGAIN, None,
                      range(2))
                error = failure(pair.here, "pull_cache", CacheKeyByIdAndIndex(peer, 1), Named("slot"))
                check(error, LLMLinkError, "pull_cache", peer, "link", True, AGAIN, None, range(2))
            pair.link_again()


def test_a_ping_of_nobody():
    with Peers() as peers:
        here = peers.here(1, engine_options_v1(listen=False), role=LLMRole.DECODER)
        with pytest.raises(LLMLinkError) as caught:
            here.node.dist.check_link_status(NOBODY)
        check(caught.value, LLMLinkError, "check_link_status", NOBODY, "ping", True, "link the peer", None, None)

"""Host names and IPv6 addresses, at the end that listens and at the one that links; bytes arrive either way."""
import socket

import pytest
from support.peer import Peers, engine_options
from transfers.caches import Spec
from transfers.pair import PATHS_VARIABLE, Pair, Scene

from llm_datadist import BlocksCacheKey, LLMClusterInfo, LLMStatusCode


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on the loopback interface")


@pytest.mark.parametrize("listens, heard, asked", [
    ("localhost:0", "127.0.0.1", "localhost"),
    pytest.param("[::1]:0", "::1", "::1", marks=needs_ipv6),
    pytest.param("[::1]:0", "::1", "[::1]", marks=needs_ipv6),
    pytest.param("[::]:0", "::", "::1", marks=needs_ipv6),
])
@pytest.mark.parametrize("path", ["shm", "tcp"])
def test_linked_and_pulled(listens, heard, asked, path):
    env = {PATHS_VARIABLE: path, "LLM_DATADIST_OPEN": "1"}
    with Peers() as peers:
        there = peers.start(7, engine_options(listen=False, llm_listenIpInfo=listens), env=env)
        here = peers.here(1, engine_options(listen=False), env=env)
        assert there.address[0] == heard and there.address[1] > 0
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = 7
        cluster.append_local_ip_info(asked, 0)
        cluster.append_remote_ip_info(asked, there.address[1])
        assert here.node.dist.link_clusters([cluster], 5000) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
        with Scene(Pair(peers, False, path, here, there)) as scene:
            key = BlocksCacheKey(7, 4)
            _, source = scene.make(there, "there", Spec(2, 4, (64,), is_blocks=True, keys=(key,), seed=1))
            _, target = scene.make(here, "here", Spec(2, 4, (64,), is_blocks=True, seed=2))
            here.node.cache_manager.pull_blocks(key, here.node.kept["here"].cache, [0, 1, 2, 3], [0, 1, 2, 3])
            for to, of in zip(target.tensors, source.tensors):
                to[:] = of
            scene.check()
        assert here.node.dist.unlink_clusters([cluster], 5000)[0] is LLMStatusCode.LLM_SUCCESS

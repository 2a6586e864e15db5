"""``append_*_ip_info`` lets None through, as in the original; linking refuses it before anything is tried."""
import pytest
from support.peer import engine_options, engine_options_v1

from llm_datadist import LLMClusterInfo, LLMRole


def description(local_ip, remote_ip):
    info = LLMClusterInfo()
    info.remote_cluster_id = 7
    info.append_local_ip_info(local_ip, 1)
    info.append_remote_ip_info(remote_ip, 1)
    return info


@pytest.mark.parametrize("options", [engine_options, engine_options_v1])
@pytest.mark.parametrize("local_ip, remote_ip", [(None, "127.0.0.1"), ("127.0.0.1", None)])
def test_link_clusters_refuses(peers, assert_raises, options, local_ip, remote_ip):
    here = peers.here(1, options(listen=False), role=LLMRole.DECODER)
    error = here.call(refused, assert_raises, description(local_ip, remote_ip))
    assert "ip_info_list" in str(error)


def refused(node, assert_raises, info):
    return assert_raises("TE", node.dist.link_clusters, [info], 1000)

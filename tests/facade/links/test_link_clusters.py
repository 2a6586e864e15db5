"""`link_clusters` and `unlink_clusters`: what they check, and the codes they give without raising.

Links that come to be are tested in ``links/``; here nobody listens.
"""
import socket
import threading

import pytest
from support.engines import CLUSTER, PEER
from support.peer import engine_options, engine_options_v1

from llm_datadist import LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode

S = LLMStatusCode
NOT_INT32 = [("1", "TE"), (1.0, "TE"), (None, "TE"), (2**31, "VE"), (-2**31 - 1, "VE")]
NO_TIMEOUT = [*NOT_INT32, (0, "PI"), (-1, "PI"), (-2**31, "PI")]


class Engines:
    """Engines of this process by name; the one that was asked for last is open."""

    def __init__(self):
        self.name = self.dist = None

    def __call__(self, name):
        if self.name != name:
            self.close()
            role, options = {
                "v2": (LLMRole.MIX, engine_options(device_pool=0, listen=False)),
                "v2 with local_comm_res": (LLMRole.MIX, engine_options(
                    device_pool=0, listen=False, llm_LocalCommRes='{"version": "1.3"}')),
                "v2 with empty local_comm_res": (LLMRole.MIX, engine_options(
                    device_pool=0, listen=False, llm_LocalCommRes="")),
                "decoder": (LLMRole.DECODER, engine_options_v1(device_pool=1 << 20, listen=False)),
                "prompt": (LLMRole.PROMPT, engine_options_v1(device_pool=1 << 20)),
                "mix": (LLMRole.MIX, engine_options_v1(device_pool=1 << 20, listen=False)),
            }[name]
            dist = LLMDataDist(role, CLUSTER)
            dist.init(options)
            self.name, self.dist = name, dist
        return self.dist

    def close(self):
        if self.dist is not None:
            self.dist.finalize()
        self.name = self.dist = None


@pytest.fixture(scope="module")
def engines():
    made = Engines()
    yield made
    made.close()


@pytest.fixture(scope="module")
def nowhere():
    """An address at which nobody listens, and nobody will: it is bound all the time."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()


def cluster(cluster_id=PEER, remote=(), local=(("127.0.0.1", 0),)):
    made = LLMClusterInfo()
    if cluster_id is not None:
        made.remote_cluster_id = cluster_id
    for address in remote:
        made.append_remote_ip_info(*address)
    for address in local:
        made.append_local_ip_info(*address)
    return made


def call(dist, operation, *args, **kwargs):
    """Call, and assert that no link came or went."""
    result = getattr(dist, operation)(*args, **kwargs)
    assert dist.links() == []
    return result


@pytest.mark.parametrize("engine", ["v2", "decoder", "prompt", "mix"])
@pytest.mark.parametrize("operation", ["link_clusters", "unlink_clusters"])
@pytest.mark.parametrize("timeout, kind", NO_TIMEOUT)
def test_timeout_is_checked_first(engines, assert_raises, engine, operation, timeout, kind):
    assert_raises(kind, getattr(engines(engine), operation), "clusters", timeout)
    assert_raises(kind, getattr(engines(engine), operation), [cluster()], timeout=timeout)


@pytest.mark.parametrize("engine", ["v2", "decoder", "prompt", "mix"])
@pytest.mark.parametrize("operation", ["link_clusters", "unlink_clusters"])
@pytest.mark.parametrize("clusters", [None, "clusters", cluster(), {1: cluster()}, {cluster()}, [None], [cluster(), 1],
                                      ["cluster"]], ids=lambda value: type(value).__name__)
def test_clusters_are_a_list_of_cluster_infos(engines, assert_raises, engine, operation, clusters):
    assert_raises("TE", getattr(engines(engine), operation), clusters)


@pytest.mark.parametrize("engine", ["v2", "decoder", "prompt", "mix"])
@pytest.mark.parametrize("force", [None, 1, "True"])
def test_force_is_a_bool(engines, assert_raises, engine, force):
    assert_raises("TE", engines(engine).unlink_clusters, [cluster()], 100, force)


@pytest.mark.parametrize("engine", ["v2", "decoder", "prompt", "mix"])
@pytest.mark.parametrize("operation", ["link_clusters", "unlink_clusters"])
@pytest.mark.parametrize("empty", [[], ()])
def test_no_clusters_at_all(engines, engine, operation, empty):
    assert call(engines(engine), operation, empty) == (S.LLM_PARAM_INVALID, [])


@pytest.mark.parametrize("engine, operation", [
    ("v2", "link_clusters"), ("v2", "unlink_clusters"), ("decoder", "unlink_clusters"), ("prompt", "unlink_clusters"),
])
def test_a_cluster_needs_an_id(engines, assert_raises, engine, operation, nowhere):
    assert_raises("TE", call, engines(engine), operation, [cluster(), cluster(None, [nowhere])], 100)


def test_v1_link_gives_a_code_for_a_missing_id(engines, nowhere):
    assert call(engines("decoder"), "link_clusters", [cluster(None, [nowhere])], 100) == (
        S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])


@pytest.mark.parametrize("engine, kind", [("v2", "PI"), ("v2 with empty local_comm_res", "PI"),
                                          ("v2 with local_comm_res", None)])
def test_v2_link_needs_a_local_address_or_local_comm_res(engines, assert_raises, engine, kind, nowhere):
    made = [cluster(local=[], remote=[nowhere])]
    if kind:
        assert_raises(kind, engines(engine).link_clusters, made, 100)
    else:
        assert call(engines(engine), "link_clusters", made, 100) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])


def test_local_address_is_checked_before_the_id(engines, assert_raises):
    assert_raises("PI", engines("v2").link_clusters, [cluster(None, local=[])], 100)


@pytest.mark.parametrize("engine", ["v2", "decoder"])
def test_an_address_without_ip_fails_before_anything_is_tried(engines, assert_raises, engine, nowhere):
    assert_raises("TE", call, engines(engine), "link_clusters",
                  [cluster(5, [nowhere]), cluster(6, [(None, nowhere[1])])], 100)


@pytest.mark.parametrize("remote, local", [([], 1), (2, 1), (1, 2)])
def test_v2_links_by_exactly_one_address(engines, nowhere, remote, local):
    remote = [nowhere] * remote if isinstance(remote, int) else remote
    made = cluster(remote=remote, local=[nowhere] * local)
    assert call(engines("v2"), "link_clusters", [made], 100) == (S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])


def test_v2_overall_is_the_last_failure_in_order(engines, nowhere):
    clusters = [cluster(5, [nowhere]), cluster(6, []), cluster(7, [nowhere])]
    assert call(engines("v2"), "link_clusters", clusters, 1000) == (
        S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED, S.LLM_PARAM_INVALID, S.LLM_LINK_FAILED])
    assert call(engines("v2"), "link_clusters", tuple(clusters[:2]), 1000) == (
        S.LLM_PARAM_INVALID, [S.LLM_LINK_FAILED, S.LLM_PARAM_INVALID])


def test_v2_second_mention_of_a_cluster(engines, nowhere):
    assert call(engines("v2"), "link_clusters", [cluster(5, [nowhere])] * 2, 1000) == (
        S.LLM_ALREADY_LINK, [S.LLM_LINK_FAILED, S.LLM_ALREADY_LINK])


@pytest.mark.parametrize("engine, code", [("v2", S.LLM_TIMEOUT), ("decoder", S.LLM_WAIT_PROCESS_TIMEOUT)])
def test_a_peer_that_accepts_and_says_nothing(engines, engine, code):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(4)
        overall, codes = call(engines(engine), "link_clusters", [cluster(5, [silent.getsockname()])], 100)
    assert codes == [code] and overall is (code if engine == "v2" else S.LLM_LINK_FAILED)


def test_v2_takes_more_than_16_clusters(engines, nowhere):
    clusters = [cluster(100 + index, [nowhere]) for index in range(17)]
    assert call(engines("v2"), "link_clusters", clusters, 2000) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED] * 17)


@pytest.mark.parametrize("remote, force, code", [
    (0, False, S.LLM_PARAM_INVALID), (2, False, S.LLM_PARAM_INVALID), (1, False, S.LLM_SUCCESS),
    (0, True, S.LLM_SUCCESS), (2, True, S.LLM_SUCCESS),
])
def test_v2_unlink_of_an_unknown_link(engines, nowhere, remote, force, code):
    made = [cluster(8, [nowhere] * remote)]
    assert call(engines("v2"), "unlink_clusters", made, 100, force) == (code, [code])


# ------------------------------------------------------------------------------------------- first generation

@pytest.mark.parametrize("engine", ["prompt", "mix"])
def test_v1_links_from_a_decoder_only(engines, nowhere, engine):
    assert call(engines(engine), "link_clusters", [cluster(remote=[nowhere])], 100) == (S.LLM_PARAM_INVALID, [])


@pytest.mark.parametrize("engine, operation", [("decoder", "link_clusters"), ("decoder", "unlink_clusters"),
                                               ("prompt", "unlink_clusters")])
def test_v1_takes_16_clusters(engines, nowhere, engine, operation):
    clusters = [cluster(100 + index, [nowhere]) for index in range(17)]
    overall, codes = call(engines(engine), operation, clusters, 100)
    assert overall is S.LLM_CLUSTER_NUM_EXCEED_LIMIT and len(codes) in (0, 17)
    overall, codes = call(engines(engine), operation, clusters[:16], 1000)
    assert overall is not S.LLM_CLUSTER_NUM_EXCEED_LIMIT and len(codes) == 16


@pytest.mark.parametrize("remote, local", [(0, 1), (1, 0), (2, 2), (2, 1), (0, 0)])
def test_v1_link_needs_an_address_per_device(engines, nowhere, remote, local):
    made = cluster(remote=[nowhere] * remote, local=[nowhere] * local)
    assert call(engines("decoder"), "link_clusters", [made], 100) == (S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])


def test_v1_repeated_cluster(engines, nowhere):
    overall, codes = call(engines("decoder"), "link_clusters", [cluster(5, [nowhere])] * 2, 1000)
    assert codes == [S.LLM_LINK_FAILED, S.LLM_REPEAT_REQUEST] and overall is S.LLM_LINK_FAILED
    overall, codes = call(engines("decoder"), "unlink_clusters", [cluster(5, [nowhere])] * 2, 1000)
    assert codes == [S.LLM_NOT_YET_LINK, S.LLM_REPEAT_REQUEST] and overall is not S.LLM_SUCCESS


@pytest.mark.parametrize("engine", ["decoder", "prompt", "mix"])
@pytest.mark.parametrize("force", [False, True])
def test_v1_unlink_of_an_unknown_link(engines, nowhere, engine, force):
    assert call(engines(engine), "unlink_clusters", [cluster(5, [nowhere]), cluster(6)], 100, force) == (
        S.LLM_SUCCESS, [S.LLM_NOT_YET_LINK] * 2)


def test_v1_one_link_operation_at_a_time(engines, assert_raises, nowhere):
    """A call that waits for a silent peer keeps the others away."""
    dist = engines("decoder")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(4)
        done = []
        thread = threading.Thread(target=lambda: done.append(
            dist.link_clusters([cluster(5, [silent.getsockname()])], 20000)))
        thread.start()
        connection, _ = silent.accept()                 # now the other call is under way
        with connection:
            for operation in ("link_clusters", "unlink_clusters"):
                overall, codes = getattr(dist, operation)([cluster(6, [nowhere])], 100)
                assert overall is S.LLM_PROCESSING_LINK and set(codes) <= {S.LLM_PROCESSING_LINK}
        thread.join()                                   # the peer hung up
    assert done == [(S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])]
    assert dist.links() == []


def test_v1_switch_role_while_linking(assert_raises, engines):
    engines.close()
    dist = LLMDataDist(LLMRole.DECODER, CLUSTER)
    dist.init({**engine_options_v1(device_pool=1 << 20, listen=False), "llm.EnableSwitchRole": "1"})
    try:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(4)
            thread = threading.Thread(target=dist.link_clusters, args=([cluster(5, [silent.getsockname()])], 20000))
            thread.start()
            connection, _ = silent.accept()
            with connection:
                assert_raises("PROCESSING_LINK", dist.switch_role, LLMRole.MIX)
            thread.join()
        dist.switch_role(LLMRole.MIX)
    finally:
        dist.finalize()

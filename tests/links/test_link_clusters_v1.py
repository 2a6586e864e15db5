"""`link_clusters`, `unlink_clusters` and `check_link_status` of the first generation between real processes."""
from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.link_steps import (
    TCP_ONLY,
    cluster,
    drop_links,
    fetch,
    fetch_code,
    link,
    links,
    offer,
    stopped,
    unlink,
    until,
    wait_links,
    withdraw,
)
from support.peer import engine_options_v1

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist.status import LLMException

S = LLMStatusCode
OK = (S.LLM_SUCCESS, [S.LLM_SUCCESS])


def start_prompt(peers, cluster_id):
    return peers.start(cluster_id, engine_options_v1(), role=LLMRole.PROMPT)


def start_decoder(peers, cluster_id, timeout_ms=10000):
    return peers.start(cluster_id, engine_options_v1(listen=False, timeout_ms=timeout_ms), role=LLMRole.DECODER,
                       env=TCP_ONLY)


@pytest.fixture(scope="module")
def processes(module_peers):
    prompts = start_prompt(module_peers, 1), start_prompt(module_peers, 2)
    decoder = start_decoder(module_peers, 3, timeout_ms=1000)
    for prompt in prompts:
        prompt.call(offer)
    yield prompts, decoder
    for prompt in prompts:
        prompt.call(withdraw)


@pytest.fixture
def linkable(processes):
    """Two prompts and a decoder, without links before and after."""
    yield processes
    prompts, decoder = processes
    decoder.call(drop_links)
    for process in (*prompts, decoder):
        assert process.call(wait_links, []) == []


@pytest.fixture
def raw_address():
    """Where the test listens and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock.getsockname()


def unused_address():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()


# ----------------------------------------------------------------------------------------------------------- link

def test_a_decoder_links_to_prompts(linkable):
    prompts, decoder = linkable
    targets = [(prompt.cluster_id, prompt.address) for prompt in prompts]
    assert decoder.call(link, *targets) == (S.LLM_SUCCESS, [S.LLM_SUCCESS] * 2)
    assert decoder.call(fetch, 1) and decoder.call(fetch, 2)
    assert prompts[0].call(links) == [(3, "peer", "active")]


def test_a_prompt_links_to_nobody(linkable):
    prompts, _ = linkable
    assert prompts[0].call(link, (2, prompts[1].address)) == (S.LLM_PARAM_INVALID, [])
    assert prompts[0].call(links) == []


def test_a_mix_links_to_nobody(linkable, peers):
    prompts, _ = linkable
    mix = peers.start(4, engine_options_v1(listen=False), role=LLMRole.MIX)
    assert mix.call(link, (1, prompts[0].address)) == (S.LLM_PARAM_INVALID, [])


def test_an_empty_list(linkable):
    assert linkable[1].call(link) == (S.LLM_PARAM_INVALID, [])
    assert linkable[1].call(unlink) == (S.LLM_PARAM_INVALID, [])


def test_already_linked_is_no_failure_overall(linkable):
    prompts, decoder = linkable
    decoder.call(link, (1, prompts[0].address))
    assert decoder.call(link, (1, prompts[0].address), (2, prompts[1].address)) \
        == (S.LLM_SUCCESS, [S.LLM_ALREADY_LINK, S.LLM_SUCCESS])


def test_more_than_sixteen(linkable):
    prompts, decoder = linkable
    overall, codes = decoder.call(link, *[(i + 1, prompts[0].address) for i in range(17)])
    assert overall is S.LLM_CLUSTER_NUM_EXCEED_LIMIT and S.LLM_SUCCESS not in codes
    overall, codes = decoder.call(unlink, *[(i + 1, prompts[0].address) for i in range(17)])
    assert overall is S.LLM_CLUSTER_NUM_EXCEED_LIMIT and S.LLM_SUCCESS not in codes
    assert decoder.call(links) == []


def test_the_same_cluster_twice(linkable):
    prompts, decoder = linkable
    assert decoder.call(link, (1, prompts[0].address), (1, prompts[0].address))[1] \
        == [S.LLM_SUCCESS, S.LLM_REPEAT_REQUEST]
    assert decoder.call(unlink, (1, prompts[0].address), (1, prompts[0].address))[1] \
        == [S.LLM_SUCCESS, S.LLM_REPEAT_REQUEST]


def link_infos(node, infos):
    return node.dist.link_clusters(infos, 1000)


@pytest.mark.parametrize("num_local, num_remote", [(1, 0), (0, 1), (2, 1), (1, 2), (0, 0)])
def test_one_address_for_each_device(linkable, num_local, num_remote):
    prompts, decoder = linkable
    info = cluster(1, *[prompts[0].address] * num_remote, local=[("127.0.0.1", 0)] * num_local)
    assert decoder.call(link_infos, [info]) == (S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])
    assert decoder.call(links) == []


def test_nobody_listens(linkable):
    """The cluster that fails is left without a link; those of the same call that worked stay."""
    prompts, decoder = linkable
    assert decoder.call(link, (1, prompts[0].address), (2, unused_address())) \
        == (S.LLM_LINK_FAILED, [S.LLM_SUCCESS, S.LLM_LINK_FAILED])
    assert decoder.call(links) == [(1, "local", "active")]
    assert decoder.call(fetch, 1)


def test_a_listener_that_never_answers(linkable, raw_address):
    _, decoder = linkable
    assert decoder.call(link, (1, raw_address), timeout_ms=200) == (S.LLM_LINK_FAILED, [S.LLM_WAIT_PROCESS_TIMEOUT])
    assert decoder.call(links) == []


def link_twice_at_once(node, silent, target):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(link, node, silent, timeout_ms=1000)
        until(lambda: node.dist._linker._busy.locked())
        second = link(node, target), unlink(node, target)
        return first.result()[0], [overall for overall, _ in second]


def test_another_link_is_being_made(linkable, raw_address):
    prompts, decoder = linkable
    assert decoder.call(link_twice_at_once, (9, raw_address), (1, prompts[0].address)) \
        == (S.LLM_LINK_FAILED, [S.LLM_PROCESSING_LINK] * 2)
    assert decoder.call(link, (1, prompts[0].address)) == OK


# --------------------------------------------------------------------------------------------------------- unlink

def test_a_decoder_tells_the_prompt(linkable):
    prompts, decoder = linkable
    decoder.call(link, (1, prompts[0].address))
    assert decoder.call(unlink, (1, prompts[0].address)) == OK
    assert decoder.call(links) == prompts[0].call(wait_links, []) == []
    assert decoder.call(fetch_code, 1) is S.LLM_NOT_YET_LINK


def test_an_unknown_link(linkable):
    prompts, decoder = linkable
    assert decoder.call(unlink, (1, prompts[0].address)) == (S.LLM_SUCCESS, [S.LLM_NOT_YET_LINK])
    decoder.call(link, (1, prompts[0].address))
    assert decoder.call(unlink, (2, prompts[1].address), (1, prompts[0].address)) \
        == (S.LLM_SUCCESS, [S.LLM_NOT_YET_LINK, S.LLM_SUCCESS])


@pytest.mark.parametrize("cluster_id", [3, 99])
def test_a_prompt_drops_its_own_side(linkable, cluster_id):
    """It knows its peer by address, whatever id it is given."""
    prompts, decoder = linkable
    decoder.call(link, (1, prompts[0].address))
    assert prompts[0].call(unlink, (cluster_id, ("127.0.0.1", 0))) == OK
    assert prompts[0].call(links) == []
    broken = [(1, "local", "broken")]
    assert decoder.call(wait_links, broken) == broken


def test_a_prompt_drops_the_one_decoder_of_several_at_one_address(linkable, peers):
    prompts, decoder = linkable
    other = start_decoder(peers, 4)
    for process in (decoder, other):
        process.call(link, (1, prompts[0].address))
    assert prompts[0].call(unlink, (3, ("127.0.0.1", 0))) == OK
    assert prompts[0].call(links) == [(4, "peer", "active")]
    assert other.call(fetch, 1)


def test_the_prompt_cannot_be_told(linkable, peers):
    """This side is closed all the same."""
    _, decoder = linkable
    prompt = start_prompt(peers, 7)
    decoder.call(link, (7, prompt.address))
    prompt.kill()
    assert decoder.call(unlink, (7, prompt.address)) == (S.LLM_UNLINK_FAILED, [S.LLM_NOTIFY_PROMPT_UNLINK_FAILED])
    assert decoder.call(links) == []


def test_the_prompt_does_not_answer(linkable, peers):
    _, decoder = linkable
    prompt = start_prompt(peers, 7)
    decoder.call(link, (7, prompt.address))
    with stopped(prompt):
        assert decoder.call(unlink, (7, prompt.address), timeout_ms=200) \
            == (S.LLM_UNLINK_FAILED, [S.LLM_WAIT_PROCESS_TIMEOUT])
    assert decoder.call(links) == []
    assert prompt.call(wait_links, []) == []


def during_a_pull_that_hangs(node, cluster_id, address):
    """What an unlink and a probe say while a pull waits for a prompt that stands still, and what the pull says."""
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(fetch_code, node, cluster_id)
        until(lambda: any(row["running"] for row in node.dist.links()))
        return unlink(node, (cluster_id, address)), check(node, cluster_id), pulling.result()


def test_unlinking_while_a_pull_runs(linkable):
    prompts, decoder = linkable
    decoder.call(link, (1, prompts[0].address))
    with stopped(prompts[0]):
        assert decoder.call(during_a_pull_that_hangs, 1, prompts[0].address) \
            == ((S.LLM_UNLINK_FAILED, [S.LLM_LINK_BUSY]), S.LLM_LINK_BUSY, S.LLM_WAIT_PROCESS_TIMEOUT)
        assert decoder.call(links) == [(1, "local", "broken")]
    assert decoder.call(wait_links, [(1, "local", "active")]) == [(1, "local", "active")]


# ---------------------------------------------------------------------------------------------------------- probe

def check(node, cluster_id):
    try:
        node.dist.check_link_status(cluster_id)
        return S.LLM_SUCCESS
    except LLMException as error:
        return error.status_code


def test_a_probe(linkable):
    prompts, decoder = linkable
    assert decoder.call(check, 1) is S.LLM_NOT_YET_LINK
    decoder.call(link, (1, prompts[0].address))
    assert decoder.call(check, 1) is S.LLM_SUCCESS
    assert prompts[0].call(check, 3) is S.LLM_PARAM_INVALID
    with stopped(prompts[0]):
        assert decoder.call(check, 1) is S.LLM_WAIT_PROCESS_TIMEOUT
        assert decoder.call(check, 1) is S.LLM_NOT_YET_LINK
    assert until(lambda: decoder.call(check, 1) is S.LLM_SUCCESS)


def test_the_prompt_is_gone(linkable, peers):
    _, decoder = linkable
    prompt = start_prompt(peers, 7)
    decoder.call(link, (7, prompt.address))
    prompt.kill()
    assert until(lambda: decoder.call(check, 7) is not S.LLM_SUCCESS)
    assert decoder.call(check, 7) is decoder.call(fetch_code, 7) is S.LLM_NOT_YET_LINK

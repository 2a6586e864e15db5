"""Pushes in vLLM: the prefill server writes while it computes, for a proxy that sends each request to both servers."""
from __future__ import annotations

import random
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from connectors.servers import SETTLE_S, SMALL_CACHE, PushServers, fetched, leave, needs_vllm, prompt_of
from support.link_steps import until

pytestmark = needs_vllm

CHUNKS = ["--max-num-batched-tokens", "512"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    made = PushServers(tmp_path_factory.mktemp("servers"), prefill_arguments=[*CHUNKS, *SMALL_CACHE])
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_held(request):
    yield
    if "servers" in request.fixturenames:
        request.getfixturevalue("servers").assert_nothing_held()


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 513, 1900])
def test_answers_are_those_of_one_server(servers, num_tokens):
    """Also of prompts that are computed in several steps."""
    prompt = prompt_of(num_tokens, 1)
    tokens, hits, num_bytes = fetched(servers, lambda: servers.pushed(prompt), "receive")
    assert tokens == servers.alone(prompt)
    assert hits == num_tokens
    assert num_bytes > 0
    assert servers.counts()[1:] == [0, 0]


def test_fifty_requests_at_once(servers):
    """On a prefill server with a small cache: some wait for room."""
    before = servers.counts()
    prompts = [prompt_of(20 + 13 * index % 400, index) for index in range(50)]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(servers.pushed, prompts))
        alone = list(pool.map(servers.alone, prompts))
    assert together == alone
    assert servers.counts() == [before[0] + 50, *before[1:]]


def test_only_missing_blocks_are_pushed(servers):
    prompt = prompt_of(900, 7)
    tokens, hits, first_bytes = fetched(servers, lambda: servers.pushed(prompt), "receive")
    assert hits == 900
    again, hits, num_bytes = fetched(servers, lambda: servers.pushed(prompt), "receive")
    assert again == tokens == servers.alone(prompt)
    assert hits == 900 - 7 * 128
    assert num_bytes * 8 == first_bytes


def test_a_proxy_that_knows_no_pushes_is_served_by_pulls(servers):
    prompt = prompt_of(300, 8)
    tokens, hits, num_bytes = fetched(servers, lambda: servers.both(prompt))
    assert tokens == servers.alone(prompt)
    assert hits == 300
    assert num_bytes > 0


def test_clients_that_leave_at_any_moment(servers):
    """The proxy tells both servers."""
    generator = random.Random(3)
    for index in range(10):
        leave(servers.decode, prompt_of(1500, 100 + index), 200, None, generator.uniform(0, 0.5), servers.proxy.port)
    servers.assert_nothing_held()
    prompt = prompt_of(300, 9)
    assert servers.pushed(prompt) == servers.alone(prompt)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_one_side_leaves(servers, side):
    """Without a proxy that could tell the other: either is told by its peer, once that has heard of the request."""
    generator = random.Random(4)
    workers = servers.decode.complete([1], 1, {"describe": True})["kv_transfer_params"]
    for index in range(4):
        prompt = prompt_of(1500, 120 + index)
        push = {"transfer_mode": "push", "transfer_id": secrets.randbits(52) | 1 << 52}
        asked = {"prefill": (servers.prefill, 1, {**workers, **push, "do_remote_decode": True}),
                 "decode": (servers.decode, 8, {**push, "do_remote_prefill": True})}
        leaver = asked.pop(side)
        (stays,) = asked.values()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(stays[0].tokens, prompt, *stays[1:])
            leave(leaver[0], prompt, *leaver[1:], generator.uniform(0, 0.35), is_known=True)
            tokens = answer.result(timeout=60)
        assert tokens == servers.alone(prompt, stays[1])
    servers.assert_nothing_held()


def test_a_prefill_server_killed_and_started_anew(servers):
    prompts = [prompt_of(1800, 200 + index) for index in range(6)]
    alone = [servers.alone(prompt) for prompt in prompts]
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(servers.pushed, prompt) for prompt in prompts[:5]]
        time.sleep(0.4)
        servers.prefill.kill()
        start = time.monotonic()
        assert [answer.result() for answer in answers] == alone[:5]
        assert time.monotonic() - start < 30                # no deadline of ours, and no lease
    servers.prefill.start()
    servers.prefill.wait_ready()
    before = servers.counts()
    assert servers.pushed(prompts[5]) == alone[5]
    assert servers.counts() == [before[0] + 1, *before[1:]]


def test_a_decode_server_killed_while_it_is_served(servers):
    stop = threading.Event()

    def ask(index):
        while not stop.is_set():
            try:
                servers.pushed(prompt_of(800, 400 + index))
            except Exception:
                return

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    servers.decode.kill()
    stop.set()
    for thread in threads:
        thread.join()
    assert until(lambda: servers.prefill.metrics()["vllm:num_requests_running"] == 0, SETTLE_S)
    servers.decode.start()
    servers.decode.wait_ready()
    prompts = [prompt_of(300, 10), prompt_of(300, 11)]
    answers = [servers.pushed(prompt) for prompt in prompts]    # the first finds that the old one is gone
    assert answers == [servers.alone(prompt) for prompt in prompts]
    assert servers.counts()[0] > 0


def test_several_groups_in_the_pool(tmp_path):
    """Sliding windows beside full attention, written into the shared mapping."""
    servers = PushServers(tmp_path, "hybrid", kv_in_pool=True, prefill_arguments=CHUNKS)
    try:
        for num_tokens in (5, 129, 700, 1500):
            prompt = prompt_of(num_tokens, 500)
            assert servers.pushed(prompt) == servers.alone(prompt), num_tokens
        assert servers.counts() == [4, 0, 0]
        servers.assert_nothing_held()
    finally:
        servers.close()

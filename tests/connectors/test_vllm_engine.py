"""The whole connector in vLLM: two servers in processes of their own, compared with what one computes alone.

Slow, as servers take their time to start: `make test-vllm`.
"""
from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from connectors.servers import (
    HELD,
    LEASE_MS,
    NEW_TOKENS,
    SETTLE_S,
    SMALL_CACHE,
    Servers,
    fetched,
    leave,
    needs_vllm,
    prompt_of,
)
from support.link_steps import until

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    made = Servers(tmp_path_factory.mktemp("servers"), decode_arguments=SMALL_CACHE)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_held(request):
    yield
    if "servers" in request.fixturenames:
        request.getfixturevalue("servers").assert_nothing_held()


@pytest.mark.parametrize("num_tokens", [1, 3, 127, 128, 129, 500, 1023, 1900])
def test_answers_are_those_of_one_server(servers, num_tokens):
    prompt = prompt_of(num_tokens)
    tokens, hits, num_bytes = fetched(servers, lambda: servers.both(prompt))
    assert tokens == servers.alone(prompt)
    assert hits == num_tokens
    assert num_bytes > 0


def test_fifty_requests_at_once(servers):
    prompts = [prompt_of(20 + 13 * index % 400, index) for index in range(50)]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(servers.both, prompts))
        alone = list(pool.map(servers.alone, prompts))
    assert together == alone


def test_requests_that_are_pushed_out_come_back(servers):
    """All prompts nearly fill their last block, so that each request needs another one while it runs."""
    prompts = [prompt_of(1016, index) for index in range(11)]
    before = servers.counted("vllm:num_preemptions_total")
    params = [servers.prefill.prefill(prompt) for prompt in prompts]
    with ThreadPoolExecutor(11) as pool:
        together = list(pool.map(lambda prompt, found: servers.decode.tokens(prompt, 150, found), prompts, params))
        alone = list(pool.map(lambda prompt: servers.alone(prompt, 150), prompts))
    assert servers.counted("vllm:num_preemptions_total") > before
    assert together == alone


def test_only_missing_blocks_are_fetched(servers):
    prompt = prompt_of(900, 7)
    tokens, hits, first_bytes = fetched(servers, lambda: servers.both(prompt))
    assert hits == 900
    again, hits, num_bytes = fetched(servers, lambda: servers.both(prompt))
    assert again == tokens == servers.alone(prompt)
    assert hits == 900 - 7 * 128
    assert num_bytes * 8 == first_bytes


def test_requests_that_nobody_waits_for_any_more(servers):
    """Clients go away at any moment, on either side."""
    generator = random.Random(3)
    for index in range(12):
        prompt = prompt_of(1500, 100 + index)
        if index % 3 == 0:
            leave(servers.prefill, prompt, 1, {"do_remote_decode": True}, generator.uniform(0, 0.4))
            continue
        params = servers.prefill.prefill(prompt)
        leave(servers.decode, prompt, 200, params, generator.uniform(0, 0.4))
    servers.assert_nothing_held()
    prompt = prompt_of(300, 9)
    assert servers.both(prompt) == servers.alone(prompt)


def test_a_prefill_server_killed_and_started_anew(servers):
    prompts = [prompt_of(700, 200 + index) for index in range(4)]
    alone = [servers.alone(prompt) for prompt in prompts]
    params = [servers.prefill.prefill(prompt) for prompt in prompts]
    assert servers.decode.tokens(prompts[0], NEW_TOKENS, params[0]) == alone[0]
    servers.prefill.kill()
    start = time.monotonic()
    assert servers.decode.tokens(prompts[1], NEW_TOKENS, params[1]) == alone[1]
    waited = time.monotonic() - start
    assert waited < 30                                      # no deadline of ours, and no lease
    failed = servers.counted("vllm:llm_datadist_failed_pulls_total")
    assert failed == 1
    servers.prefill.start()
    servers.prefill.wait_ready()
    assert servers.decode.tokens(prompts[2], NEW_TOKENS, params[2]) == alone[2]     # what the dead one said
    assert servers.counted("vllm:llm_datadist_failed_pulls_total") == failed + 1
    assert servers.both(prompts[3]) == alone[3]
    assert servers.counted("vllm:llm_datadist_failed_pulls_total") == failed + 1


def test_a_prefill_server_that_stands_still(servers):
    prompt = prompt_of(600, 300)
    alone, params = servers.alone(prompt), servers.prefill.prefill(prompt)
    servers.prefill.stop()
    try:
        assert servers.decode.tokens(prompt, NEW_TOKENS, params) == alone
    finally:
        servers.prefill.go_on()
    # Its blocks wait for the end of their lease, unless somebody says that nobody needs them.
    servers.decode.tokens(prompt, 1, params)


def test_a_decode_server_killed_while_it_is_served(servers):
    stop = threading.Event()

    def ask(index):
        while not stop.is_set():
            try:
                servers.both(prompt_of(800, 400 + index))
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
    servers.decode.start()
    servers.decode.wait_ready()
    # What the dead one did not fetch waits for the end of its lease.
    assert until(lambda: servers.prefill.metrics()[HELD] == 0, LEASE_MS / 1000 + SETTLE_S)
    prompt = prompt_of(300, 10)
    assert servers.both(prompt) == servers.alone(prompt)


@pytest.mark.parametrize("kind, options", [("hybrid", {}), ("mla", {}), ("tiny", {"kv_in_pool": True})])
def test_other_models_and_memory(tmp_path, kind, options):
    """Sliding windows beside full attention, latent attention, and the cache in the shared pool."""
    servers = Servers(tmp_path, kind, **options)
    try:
        for num_tokens in (5, 129, 700, 1500):
            prompt = prompt_of(num_tokens, 500)
            assert servers.both(prompt) == servers.alone(prompt), num_tokens
        assert servers.counted("vllm:external_prefix_cache_hits_total") == 5 + 129 + 700 + 1500
        assert servers.counted("vllm:llm_datadist_failed_pulls_total") == 0
        servers.assert_nothing_held()
    finally:
        servers.close()

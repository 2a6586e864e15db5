"""A prefill and a decode server of vLLM for tests, which make their model on the spot."""
from __future__ import annotations

import http.client
import json
import random
import time

import pytest
from connectors.halves import HAS_VLLM
from support.link_steps import until

needs_vllm = [
    pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed; make test-vllm installs and uses it"),
    pytest.mark.timeout(1500),
]

LEASE_MS = 60_000
SETTLE_S = 30
SMALL_CACHE = ["--num-gpu-blocks-override", "96"]       # blocks of 128 tokens: requests that grow push others out
NEW_TOKENS = 16
HELD = "vllm:kv_cache_usage_perc"


def prompt_of(num_tokens, seed=0):
    generator = random.Random(1000 * num_tokens + seed)
    return [generator.randrange(2, 2000) for _ in range(num_tokens)]


class Servers:
    """A prefill server, a decode server, and what one computes alone."""

    def __init__(self, directory, kind="tiny", decode_arguments=(), prefill_arguments=(), **options):
        from llm_datadist.tools.vllm.model import make_model, server_arguments
        from llm_datadist.tools.vllm.server import Server, connector_config

        model = make_model(directory, kind)
        self.prefill = Server(
            "prefill", model, directory, connector_config("kv_producer", lease_ms=LEASE_MS, **options), core=0,
            arguments=[*server_arguments(kind), *prefill_arguments])
        self.decode = Server(
            "decode", model, directory, connector_config("kv_consumer", pull_timeout_ms=2000, **options), core=1,
            arguments=[*server_arguments(kind), *decode_arguments])
        self._servers = [self.prefill, self.decode]
        try:
            for server in self._servers:
                server.start()
            for server in self._servers:
                server.wait_ready()
        except BaseException:
            self.close()
            raise

    def close(self):
        for server in self._servers:
            server.close()

    def both(self, prompt, num_tokens=NEW_TOKENS, **extra):
        """The answer when the prompt is computed by one server and continued by the other."""
        return self.decode.tokens(prompt, num_tokens, self.prefill.prefill(prompt), **extra)

    def alone(self, prompt, num_tokens=NEW_TOKENS):
        return self.prefill.tokens(prompt, num_tokens)

    def counted(self, name):
        return self.decode.metrics().get(name, 0)

    def assert_nothing_held(self):
        for server in self._servers:
            assert until(lambda server=server: server.metrics()[HELD] == 0, SETTLE_S), server.name


class PushServers(Servers):
    """The same with a proxy that sends each request to both at once."""

    def __init__(self, directory, kind="tiny", **options):
        from llm_datadist.tools.vllm.proxy import Proxy

        super().__init__(directory, kind, mode="push", **options)
        self.proxy = Proxy(f"http://127.0.0.1:{self.prefill.port}", f"http://127.0.0.1:{self.decode.port}", True)
        self.proxy.start()

    def close(self):
        if hasattr(self, "proxy"):
            self.proxy.close()
        super().close()

    def pushed(self, prompt, num_tokens=NEW_TOKENS):
        """The answer of the proxy."""
        return self.decode.tokens(prompt, num_tokens, port=self.proxy.port)

    def counts(self):
        """Requests that came by a push, that did not, and those that the proxy gave to the decode server alone."""
        return [self.counted("vllm:llm_datadist_receive_bytes_count"),
                self.counted("vllm:llm_datadist_failed_receives_total"), self.proxy.num_fallbacks]


def fetched(servers, call, what="pull"):
    """Tokens that the decode server counts as taken from elsewhere during a call, its result, and bytes pulled."""
    names = ("vllm:external_prefix_cache_hits_total", f"vllm:llm_datadist_{what}_bytes_sum")
    before = [servers.counted(name) for name in names]
    result = call()
    assert until(lambda: servers.counted("vllm:num_requests_running") == 0, SETTLE_S)
    time.sleep(0.2)
    return [result] + [servers.counted(name) - value for name, value in zip(names, before)]


def leave(server, prompt, num_tokens, params, after_s, port=None, is_known=False):
    """Ask, and close the connection after a while; with `is_known` not before the engine has heard of the request."""
    before = server.metrics()
    connection = http.client.HTTPConnection("127.0.0.1", port or server.port)
    body = {"model": "model", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "kv_transfer_params": params, "stream": num_tokens > 1}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    if is_known:
        assert until(lambda: is_busier(server.metrics(), before), SETTLE_S)
    time.sleep(after_s)
    connection.close()


def is_busier(now, before):
    """Whether an engine has a request, or has computed a prompt since."""
    return (now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"] > 0
            or now["vllm:prompt_tokens_total"] > before["vllm:prompt_tokens_total"])

"""``llm-datadist bench vllm``: the same engine, model and prompts with this package's connector and with vLLM's own."""
from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import random
import secrets
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .server import Server, ServerError, connector_config, free_port

PEER = "nixl"
CONNECTORS = ("pull", "pool", "push", PEER)
_RUNNING = 100
_NEW_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--connectors", default=",".join(CONNECTORS), metavar="NAMES",
                        help="pull: registered memory; pool: the shared pool; push: registered memory, written while a "
                             "prompt is computed; nixl: the peer (%(default)s)")
    parser.add_argument("--model", default="fat", choices=("tiny", "fat"), help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=1900, metavar="N", help="of a prompt (%(default)s)")
    parser.add_argument("--samples", type=int, default=9, metavar="N", help="single requests (%(default)s)")
    parser.add_argument("--concurrent", type=int, default=16, metavar="N", help="requests at once (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")


@dataclass
class Figures:
    """What was measured with one connector; medians, seconds.

    First tokens count from the answer of the prefill server on, but for `whole_first_token_s`, which begins with the
    request. `fallback_s` is from the end of the prefill server to the first token, less the prompt's own computation.
    """

    transfer_s: float
    first_token_s: float
    first_token_of_many_s: float
    whole_first_token_s: float
    tokens_per_s: float
    idle_processor: float
    fallback_s: Optional[float]
    wrong: int


def run(args: argparse.Namespace) -> int:
    """Measure each connector in turn.

    Returns
    -------
    int
        0: measured, and all answers equal; 1: an answer was wrong, or a server failed; 2: bad options, or no vLLM.
    """
    names = args.connectors.split(",")
    if not set(names) <= set(CONNECTORS):
        print(f"llm-datadist bench vllm: --connectors {args.connectors}: known are {', '.join(CONNECTORS)}",
              file=sys.stderr)
        return 2
    if importlib.util.find_spec("vllm") is None or (PEER in names and importlib.util.find_spec("nixl") is None):
        print("llm-datadist bench vllm: vLLM, or the peer, is not installed here; make bench-vllm installs both",
              file=sys.stderr)
        return 2
    from .model import make_model

    results: Dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="llm-datadist-vllm-") as kept:
        directory = Path(kept)
        place = make_model(directory, args.model)
        print(f"the connector's work in a step of the scheduler with {_RUNNING} running requests: "
              f"{_scheduler_step_us():.1f} us", flush=True)
        try:
            for name in names:
                results[name] = _measure(name, place, directory, args)
                print(f"{name}: {_text(results[name])}", flush=True)
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
    _print_table(results, args)
    if args.json:
        Path(args.json).write_text(json.dumps({"options": {k: v for k, v in vars(args).items() if k != "run"},
                                               "results": {k: asdict(v) for k, v in results.items()}}, indent=1,
                                              default=str), encoding="utf-8")
    return 1 if any(figures.wrong for figures in results.values()) else 0


def _configs(name: str) -> Tuple[Dict[str, Any], Dict[str, Any], Dict[str, str], Dict[str, str]]:
    """Transfer configs and environments of both servers."""
    if name != PEER:
        options = {"kv_in_pool": name == "pool", "mode": "push" if name == "push" else "pull"}
        return connector_config("kv_producer", **options), connector_config("kv_consumer", **options), {}, {}
    config = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu", "kv_load_failure_policy": "fail",
              "kv_connector_extra_config": {"backends": ["UCX"]}}
    environs = [{"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
                for _ in range(2)]
    return {**config, "kv_role": "kv_producer"}, {**config, "kv_role": "kv_consumer"}, environs[0], environs[1]


def _measure(name: str, model: Path, directory: Path, args: argparse.Namespace) -> Figures:
    prefill_config, decode_config, prefill_environ, decode_environ = _configs(name)
    arguments = ["--no-enable-prefix-caching"]
    cache_gib = 6 if args.model == "fat" else 1
    prefill = Server(f"{name}-prefill", model, directory, prefill_config, 0, cache_gib, arguments, prefill_environ)
    decode = Server(f"{name}-decode", model, directory, decode_config, 1, cache_gib, arguments, decode_environ)
    with prefill, decode:
        prefill.wait_ready()
        decode.wait_ready()
        pair = _Pair(prefill, decode, name == "push")
        prompts = [_prompt(args.tokens, seed) for seed in range(args.samples + args.concurrent + 3)]
        for prompt in prompts[:2]:                      # links, threads and memory that is touched the first time
            pair.ask(prompt)
        idle = _idle(decode)
        wrong = 0
        firsts, wholes, transfers = [], [], []
        counted = prefill if pair.push else decode
        for prompt in prompts[2:2 + args.samples]:
            before = _transfer_seconds(counted)
            tokens, first, whole = pair.ask(prompt)
            firsts.append(first)
            wholes.append(whole)
            transfers.append(_after(counted, before) - before[1])
            wrong += tokens != prefill.tokens(prompt, _NEW_TOKENS)
        many = prompts[2 + args.samples:-1]
        start = time.monotonic()
        answers = pair.ask_many(many)
        total = time.monotonic() - start
        return Figures(statistics.median(transfers), statistics.median(firsts),
                       statistics.median(first for _, first, _ in answers), statistics.median(wholes),
                       sum(len(tokens) for tokens, _, _ in answers) / total, idle,
                       None if name == PEER else pair.fallback(prompts[-1]), wrong)


class _Pair:
    """Both servers, asked as a proxy would."""

    def __init__(self, prefill: Server, decode: Server, push: bool) -> None:
        self._prefill = prefill
        self._decode = decode
        self.push = push
        self._workers: Dict[str, Any] = {}
        if push:
            self._workers = decode.complete([1], 1, {"describe": True})["kv_transfer_params"]

    def ask(self, prompt: Sequence[int]) -> Tuple[List[int], float, float]:
        """Tokens, and seconds to the first one from the prefill server's answer and from the request on."""
        start = time.monotonic()
        if not self.push:
            params = self._prefill.prefill(prompt)
            answered = time.monotonic()
            tokens, first = _stream(self._decode, prompt, params)
            return tokens, first, first + answered - start
        push = {"transfer_mode": "push", "transfer_id": secrets.randbits(52) | 1 << 52}
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(_stream, self._decode, prompt, {**push, "do_remote_prefill": True})
            self._prefill.complete(prompt, 1, {**self._workers, **push, "do_remote_decode": True})
            answered = time.monotonic()
            tokens, whole = stream.result()
        return tokens, whole - (answered - start), whole

    def ask_many(self, prompts: Sequence[Sequence[int]]) -> List[Tuple[List[int], float, float]]:
        """Several at once; those that are fetched, once all are computed."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            if self.push:
                return list(pool.map(self.ask, prompts))
            params = [self._prefill.prefill(prompt) for prompt in prompts]
            return [(tokens, first, first) for tokens, first in
                    pool.map(lambda pair: _stream(self._decode, *pair), zip(prompts, params))]

    def fallback(self, prompt: Sequence[int]) -> float:
        """What a request loses by the end of the prefill server, which is not started again."""
        if self.push:
            from .proxy import Proxy

            proxy = Proxy(f"http://127.0.0.1:{self._prefill.port}", f"http://127.0.0.1:{self._decode.port}", True)
            proxy.start()
            _stream(self._decode, prompt[1:], None, proxy.port)         # so that it knows the decode server
            with ThreadPoolExecutor(1) as pool:
                begin = time.monotonic()
                stream = pool.submit(_stream, self._decode, prompt, None, proxy.port)
                time.sleep(0.1)
                self._prefill.kill()
                killed = time.monotonic()
                waited = stream.result()[1] - (killed - begin)
            proxy.close()
        else:
            params = self._prefill.prefill(prompt)
            self._prefill.kill()
            waited = _stream(self._decode, prompt, params)[1]
        return waited - _stream(self._decode, prompt, None)[1]


def _scheduler_step_us(repeats: int = 2000) -> float:
    """The scheduler's half in one step: all requests run, in either mode, and one prompt is being pushed."""
    from types import SimpleNamespace

    from llm_datadist.connectors.vllm.metadata import Metadata
    from llm_datadist.connectors.vllm.push_scheduler import PushScheduler
    from llm_datadist.connectors.vllm.scheduler import SchedulerHalf

    pushes = PushScheduler((128,))
    half = SchedulerHalf(pushes)
    names = [f"request-{index}" for index in range(_RUNNING)]
    pushes.push(SimpleNamespace(request_id=names[-1], num_prompt_tokens=1 << 60), 1 << 40, (), Metadata())
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=names[-1], block_ids=([1],), num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=names, new_block_ids=[None] * _RUNNING,
                                              num_computed_tokens=[0] * _RUNNING, resumed_req_ids=set()),
        num_scheduled_tokens=dict.fromkeys(names, 1))
    half.take_metadata(output)
    output.scheduled_new_reqs = []
    start = time.perf_counter()
    for _ in range(repeats):
        half.take_metadata(output)
    return (time.perf_counter() - start) / repeats * 1e6


def _prompt(num_tokens: int, seed: int) -> List[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, 2000) for _ in range(num_tokens)]


def _stream(server: Server, prompt: Sequence[int], params: Optional[Dict[str, Any]],
            port: Optional[int] = None) -> Tuple[List[int], float]:
    """Tokens, and seconds until the first one."""
    body = {"model": "model", "prompt": list(prompt), "max_tokens": _NEW_TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True}
    if params is not None:
        body["kv_transfer_params"] = params
    connection = http.client.HTTPConnection("127.0.0.1", port or server.port, timeout=300)
    start = time.monotonic()
    first = 0.0
    tokens: List[int] = []
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(f"{server.name} answered {response.status}: {response.read()[:500]!r}")
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                new = choices[0].get("token_ids") or [] if choices else []
                if new and not tokens:
                    first = time.monotonic() - start
                tokens += new
    finally:
        connection.close()
    return tokens, first


def _transfer_seconds(server: Server) -> Tuple[float, float]:
    """How many transfers there were, and how long they took together."""
    metrics = server.metrics()
    names = ("vllm:llm_datadist_pull_seconds", "vllm:llm_datadist_push_seconds", "vllm:nixl_xfer_time_seconds")
    return (sum(metrics.get(f"{name}_count", 0) for name in names),
            sum(metrics.get(f"{name}_sum", 0) for name in names))


def _after(server: Server, before: Tuple[float, float]) -> float:
    """Seconds of all transfers, once there is one more than before."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        count, seconds = _transfer_seconds(server)
        if count > before[0]:
            return seconds
        time.sleep(0.05)
    raise ServerError(f"{server.name} has counted no transfer")


def _idle(server: Server, seconds: float = 3.0) -> float:
    """Processor time that all processes of an idle server take, as a share of one processor."""
    time.sleep(1)
    before = _processor_seconds(server)
    time.sleep(seconds)
    return (_processor_seconds(server) - before) / seconds


def _processor_seconds(server: Server) -> float:
    import psutil

    assert server.pid is not None
    total = 0.0
    for process in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def _text(figures: Figures) -> str:
    return (f"transfer {1000 * figures.transfer_s:.1f} ms, first token {1000 * figures.first_token_s:.0f} ms "
            f"({1000 * figures.first_token_of_many_s:.0f} ms of many), {figures.tokens_per_s:.0f} tokens/s, idle "
            f"{100 * figures.idle_processor:.0f} % of a processor, {figures.wrong} wrong answers")


def _print_table(results: Dict[str, Figures], args: argparse.Namespace) -> None:
    peer: Optional[Figures] = results.get(PEER)
    rows = (("transfer of one prompt, ms", "transfer_s", 1000.0),
            ("first token, one request, ms", "first_token_s", 1000.0),
            (f"first token, {args.concurrent} requests, ms", "first_token_of_many_s", 1000.0),
            ("first token with the prompt, ms", "whole_first_token_s", 1000.0),
            ("tokens/s", "tokens_per_s", 1.0), ("lost by a killed prefill, ms", "fallback_s", 1000.0),
            ("processor of an idle server, %", "idle_processor", 100.0))
    print(f"{args.model} model, prompts of {args.tokens} tokens; in brackets the ratio to {PEER}")
    print(f"{'':36}" + "".join(f"{name:>18}" for name in results))
    for label, field, scale in rows:
        cells = []
        for figures in results.values():
            value = getattr(figures, field)
            if value is None:
                cells.append("-")
                continue
            ratio = f" ({value / getattr(peer, field):.2f})" if peer is not None and getattr(peer, field) else ""
            cells.append(f"{scale * value:.1f}{ratio}")
        print(f"{label:36}" + "".join(f"{cell:>18}" for cell in cells))

"""``llm-datadist vllm-demo``: two vLLM servers share the work of each request, and every answer is checked."""
from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

_HELD = "vllm:kv_cache_usage_perc"
_FAILED_RECEIVES = "vllm:llm_datadist_failed_receives_total"
_SETTLE_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="at once, in each round (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N", help="of each answer (%(default)s)")
    parser.add_argument("--model", default="tiny", choices=("tiny", "fat", "hybrid", "mla"),
                        help="a random model that is made on the spot (%(default)s)")
    parser.add_argument("--pool", action="store_true", help="keep the KV caches in the shared pool")
    parser.add_argument("--push", action="store_true", help="prefill pushes while it computes")
    parser.add_argument("--keep", metavar="DIR", help="leave model and logs here (default: removed at the end)")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration.

    Returns
    -------
    int
        0 when all answers are right and nothing is left; 1 when not; 2 without vLLM.
    """
    if importlib.util.find_spec("vllm") is None:
        print("llm-datadist vllm-demo: vLLM is not installed here; make demo-vllm installs it into an environment of "
              "its own", file=sys.stderr)
        return 2
    from .server import ServerError

    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        directory, kept = Path(args.keep), None
    else:
        kept = tempfile.TemporaryDirectory(prefix="llm-datadist-vllm-")
        directory = Path(kept.name)
    try:
        return 0 if _Demo(args, directory).run() else 1
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if kept is not None:
            kept.cleanup()


@dataclass
class _Answer:
    """What a client saw of one request."""

    text: str
    first_s: float
    total_s: float
    num_tokens: int


class _Demo:
    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        from . import model
        from .proxy import Proxy
        from .server import Server, connector_config

        print(f"model {args.model}, logs and model in {directory}")
        place = model.make_model(directory, args.model)
        options: Dict[str, Any] = {"kv_in_pool": args.pool, "mode": "push" if args.push else "pull"}
        arguments = model.server_arguments(args.model)
        self._args = args
        self._prefill = Server("prefill", place, directory, connector_config("kv_producer", **options), core=0,
                               arguments=arguments)
        self._decode = Server("decode", place, directory, connector_config("kv_consumer", **options), core=1,
                              arguments=arguments)
        self._proxy = Proxy(f"http://127.0.0.1:{self._prefill.port}", f"http://127.0.0.1:{self._decode.port}",
                            args.push)
        self._good = True

    def run(self) -> bool:
        with self._prefill, self._decode:
            start = time.monotonic()
            self._prefill.wait_ready()
            self._decode.wait_ready()
            print(f"prefill and decode servers are up after {time.monotonic() - start:.0f} s")
            self._proxy.start()
            try:
                self._rounds()
            finally:
                self._proxy.close()
            self._leftovers()
        print("all answers are right, and nothing is left" if self._good else "FAILED")
        return self._good

    def _rounds(self) -> None:
        prompts = self._prompts(0)
        expected = self._ask(self._prefill.port, prompts)
        self._report("one server", expected)
        shared = self._ask(self._proxy.port, prompts)
        self._report("prefill + decode", shared)
        self._compare("prefill + decode", shared, expected)
        self._moved(len(prompts))
        others = self._prompts(1)
        expected = self._ask(self._prefill.port, others)
        answers = self._ask(self._proxy.port, others, kill_after_s=0.3)
        self._report("prefill killed", answers)
        self._compare("prefill killed", answers, expected)
        print(f"  {self._proxy.num_fallbacks} prompts were computed by the decode server itself, "
              f"{self._count('vllm:llm_datadist_failed_pulls_total') + self._count(_FAILED_RECEIVES):.0f} loads failed "
              "and were computed there too")
        self._prefill.start()
        self._prefill.wait_ready()
        fallbacks = self._proxy.num_fallbacks
        third = self._prompts(2)
        answers = self._ask(self._proxy.port, third)
        self._report("prefill restarted", answers)
        self._compare("prefill restarted", answers, self._ask(self._prefill.port, third))
        if self._proxy.num_fallbacks != fallbacks:
            self._fail("the prefill server that was started anew did not compute every prompt")

    def _prompts(self, seed: int) -> List[str]:
        text = (Path(__file__).parent.parent / "demo" / "paged_kv.txt").read_text(encoding="utf-8")
        prompts = []
        for index in range(self._args.requests):
            start = (997 * (index + seed * self._args.requests)) % (len(text) // 2)
            prompts.append(text[start:start + 40 + 151 * index % 2400])
        return prompts

    def _ask(self, port: int, prompts: List[str], kill_after_s: Optional[float] = None) -> List[_Answer]:
        return asyncio.run(self._ask_all(port, prompts, kill_after_s))

    async def _ask_all(self, port: int, prompts: List[str], kill_after_s: Optional[float]) -> List[_Answer]:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0,
                               timeout=120) as client:
            tasks = [asyncio.ensure_future(self._ask_one(client, prompt)) for prompt in prompts]
            if kill_after_s is not None:
                await asyncio.sleep(kill_after_s)
                self._prefill.kill()
            return list(await asyncio.gather(*tasks))

    async def _ask_one(self, client: Any, prompt: str) -> _Answer:
        start = time.monotonic()
        first = 0.0
        pieces: List[str] = []
        stream = await client.completions.create(
            model="model", prompt=prompt, max_tokens=self._args.new_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True})
        async for chunk in stream:
            if chunk.choices:
                first = first or time.monotonic() - start
                pieces.append(chunk.choices[0].text)
        return _Answer("".join(pieces), first, time.monotonic() - start, len(pieces))

    def _report(self, name: str, answers: List[_Answer]) -> None:
        firsts = sorted(answer.first_s for answer in answers)
        longest = max(answer.total_s for answer in answers)
        rate = sum(answer.num_tokens for answer in answers) / longest
        print(f"{name:>18}: {len(answers)} requests, first token after {1000 * firsts[len(firsts) // 2]:.0f} ms "
              f"(median; longest {1000 * firsts[-1]:.0f} ms), {rate:.0f} tokens/s")

    def _compare(self, name: str, answers: List[_Answer], expected: List[_Answer]) -> None:
        wrong = [index for index, (a, b) in enumerate(zip(answers, expected)) if a.text != b.text]
        if wrong:
            self._fail(f"{name}: answers {wrong} differ from those of one server")

    def _count(self, name: str) -> float:
        return self._decode.metrics().get(name, 0.0)

    def _moved(self, num_requests: int) -> None:
        what = "receive" if self._args.push else "pull"
        count = self._count(f"vllm:llm_datadist_{what}_bytes_count")
        num_bytes = self._count(f"vllm:llm_datadist_{what}_bytes_sum")
        hits = self._count("vllm:external_prefix_cache_hits_total")
        server, what = (self._prefill, "push") if self._args.push else (self._decode, "pull")
        seconds = server.metrics().get(f"vllm:llm_datadist_{what}_seconds_sum", 0.0)
        print(f"  {hits:.0f} tokens of {count:.0f} prompts taken from the prefill server, {num_bytes / 2**20:.1f} MiB, "
              f"{1000 * seconds / max(count, 1):.1f} ms each" + (" after it was computed" if self._args.push else ""))
        if count != num_requests:
            self._fail(f"only {count:.0f} of {num_requests} prompts were taken from the prefill server")

    def _leftovers(self) -> None:
        deadline = time.monotonic() + _SETTLE_S
        held = {"": 1.0}
        while any(held.values()) and time.monotonic() < deadline:
            held = {server.name: server.metrics()[_HELD] for server in (self._prefill, self._decode)}
            time.sleep(0.1)
        print("  still held: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in held.items()))
        if any(held.values()):
            self._fail("blocks are still held")

    def _fail(self, reason: str) -> None:
        self._good = False
        print(f"  WRONG: {reason}")

"""The decode process: pulls each request's keys and values both ways, continues it, and judges the result.

It starts the prefill process, and besides runs every request alone, without any transfer, to know what the tokens
should be.
"""
from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import wait

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMRole

from . import engine as engines
from . import kv, prefill, workload
from .model import Transformer, generate, greedy
from .outcome import Outcome, Transfer
from .report import Report

_BLOCKS_SEED = 22
_KILL_SECONDS = 10.0


class PrefillError(RuntimeError):
    """The prefill process failed, died or fell silent; the text says which, with its traceback when there is one."""


class PrefillProcess:
    """Owner of the prefill process; leaving the context ends it, whatever happened.

    Parameters
    ----------
    settings : Settings
    deadline : float
        `time.monotonic` value after which no answer is waited for.
    """

    def __init__(self, settings: workload.Settings, deadline: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._deadline = deadline
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=prefill.main, args=(theirs, settings), name="prefill", daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> PrefillProcess:
        return self

    def __exit__(self, exception_type, exception, trace) -> None:
        try:
            if exception_type is None:
                self._process.join(self._remaining())
                if self._process.exitcode != 0:
                    raise PrefillError(f"the prefill process did not end well: {self._state()}")
        finally:
            self._process.kill()
            self._process.join(_KILL_SECONDS)
            self._connection.close()

    def send(self, kind: str) -> None:
        self._connection.send((kind, None))

    def receive(self, kind: str) -> dict:
        """Return the content of the next message, which must be of this kind; raise PrefillError otherwise."""
        wait([self._connection, self._process.sentinel], self._remaining())
        try:
            if not self._connection.poll():
                raise PrefillError(f"no {kind!r} from the prefill process: {self._state()}")
            got, content = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(1.0)         # the pipe breaks a moment before the exit status is there
            raise PrefillError(f"the prefill process went away before {kind!r}: {self._state()}") from None
        if got == "failed":
            raise PrefillError(f"the prefill process failed:\n{content}")
        if got != kind:
            raise PrefillError(f"the prefill process sent {got!r}, expected {kind!r}")
        return content

    def _remaining(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _state(self) -> str:
        status = self._process.exitcode
        return "still running at the time limit" if status is None else f"exit status {status}"


class DecodeSide:
    """Caches and model of the decode process, and what it does with one request."""

    def __init__(self, manager, settings: workload.Settings, corrupt_request: int | None) -> None:
        self._manager = manager
        self._settings = settings
        self._corrupt_request = corrupt_request
        self._model = Transformer(settings.model)
        self._slot_desc = CacheDesc(settings.num_tensors, settings.slot_shape, DataType.DT_FLOAT)
        self._blocks_cache = manager.allocate_blocks_cache(
            CacheDesc(settings.num_tensors, settings.blocks_shape, DataType.DT_FLOAT)
        )
        self._blocks = self._blocks_cache.tensors()
        kv.poison(self._blocks)
        self._tables = kv.scatter_tables(
            [length + settings.num_new_tokens for length in settings.lengths],
            settings.block_tokens, settings.total_blocks, _BLOCKS_SEED,
        )

    def close(self) -> None:
        """Give the paged cache back."""
        self._blocks = []
        self._manager.deallocate_blocks_cache(self._blocks_cache)

    def run(self, request: int, filled: dict) -> tuple[Transfer, Transfer]:
        """Continue one request from its pulled cache, contiguous and paged."""
        expected = self._run_alone(request)
        return self._run_contiguous(request, filled, expected), self._run_paged(request, filled, expected)

    def _run_alone(self, request: int) -> list[int]:
        settings, prompt = self._settings, list(self._settings.prompts[request])
        model = settings.model
        store = kv.ContiguousKV.private(
            model.num_layers, len(prompt) + settings.num_new_tokens, model.num_heads, model.head_size
        )
        first_token = greedy(self._model.prefill(prompt, store))
        return generate(self._model, store, first_token, len(prompt), settings.num_new_tokens)

    def _run_contiguous(self, request: int, filled: dict, expected: list[int]) -> Transfer:
        settings = self._settings
        tensor_bytes = settings.lengths[request] * settings.model.token_bytes
        cache = self._manager.allocate_cache(self._slot_desc)
        try:
            slot = cache.tensors()
            kv.poison(slot)
            key = CacheKey(prompt_cluster_id=workload.PREFILL_CLUSTER_ID, req_id=request)
            seconds = _timed(lambda: self._manager.pull_cache(key, cache, batch_index=0, size=tensor_bytes))
            num_bytes = tensor_bytes * settings.num_tensors
            return self._judge(request, filled, expected, kv.ContiguousKV(slot), num_bytes, seconds)
        finally:
            self._manager.deallocate_cache(cache)

    def _run_paged(self, request: int, filled: dict, expected: list[int]) -> Transfer:
        settings, table = self._settings, self._tables[request]
        src_blocks = filled["block_table"]
        dst_blocks = table[: len(src_blocks)].tolist()
        key = BlocksCacheKey(workload.PREFILL_CLUSTER_ID, workload.BLOCKS_MODEL_ID)
        seconds = _timed(lambda: self._manager.pull_blocks(key, self._blocks_cache, src_blocks, dst_blocks))
        num_bytes = len(src_blocks) * settings.block_tokens * settings.model.token_bytes * settings.num_tensors
        return self._judge(request, filled, expected, kv.PagedKV(self._blocks, table), num_bytes, seconds)

    def _judge(
        self, request: int, filled: dict, expected: list[int], store, num_bytes: int, seconds: float
    ) -> Transfer:
        length = self._settings.lengths[request]
        if request == self._corrupt_request:
            kv.flip_byte(store, length)
        bytes_equal = kv.digest(store, length) == filled["digest"]
        tokens = generate(self._model, store, filled["first_token"], length, self._settings.num_new_tokens)
        return Transfer(num_bytes, seconds, bytes_equal, tokens_equal=tokens == expected)


def run(settings: workload.Settings, report: Report, timeout_s: float, corrupt_request: int | None = None) -> Outcome:
    """Run all requests through both processes.

    Parameters
    ----------
    settings : Settings
    report : Report
        Told of every step while the run goes on.
    timeout_s : float
        Limit on waiting for the prefill process, from now on to its end.
    corrupt_request : int, optional
        Damage one byte of this request's cache after each pull, to show that the verdicts notice.

    Raises
    ------
    PrefillError
        The prefill process failed, died or exceeded the limit. It is gone.
    LLMException, RuntimeError
        This side failed. The prefill process is gone.
    """
    outcome = Outcome()
    with PrefillProcess(settings, time.monotonic() + timeout_s) as peer:
        report.progress("starting")
        engine = engines.open_engine(LLMRole.DECODER, workload.DECODE_CLUSTER_ID, settings, num_slots=1)
        try:
            side = DecodeSide(engine.cache_manager, settings, corrupt_request)
            port = peer.receive("listening")["port"]
            engines.link(engine, workload.PREFILL_CLUSTER_ID, port)
            report.linked(peer.pid, f"{engines.ADDRESS}:{port}")
            for request, length in enumerate(settings.lengths):
                report.progress(f"request {request}: prefill of {length} tokens")
                filled = peer.receive("filled")
                for name, count in filled["counts"].items():
                    outcome.most_held[name] = max(count, outcome.most_held.get(name, 0))
                report.progress(f"request {request}: pull and decode")
                transfers = side.run(request, filled)
                outcome.transfers.append(transfers)
                report.row(request, length, transfers)
            side.close()
            engines.unlink(engine, workload.PREFILL_CLUSTER_ID, port)
            peer.send("finish")
            outcome.left["prefill"] = peer.receive("counts")
            outcome.left["decode"] = engines.counts(engine)
        finally:
            engine.finalize()
    return outcome


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

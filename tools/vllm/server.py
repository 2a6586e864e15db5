"""`vllm serve` as a child process: started, asked and ended."""
from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Type

__all__ = ["Server", "ServerError", "connector_config", "free_port"]

START_LIMIT_S = 600.0
END_GRACE_S = 20.0
REQUEST_LIMIT_S = 120.0
CONNECTOR = "LLMDataDistConnector"
CONNECTOR_MODULE = "llm_datadist.connectors.vllm"


class ServerError(RuntimeError):
    """A server did not start, or refused a request."""


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connector_config(role: str, failure_policy: str = "recompute", **options: Any) -> Dict[str, Any]:
    """Return vLLM's ``--kv-transfer-config`` for this package's connector with `options`."""
    return {"kv_connector": CONNECTOR, "kv_connector_module_path": CONNECTOR_MODULE, "kv_role": role,
            "kv_load_failure_policy": failure_policy, "kv_connector_extra_config": options}


class Server:
    """One `vllm serve` in a session of its own, which ends with this object.

    Parameters
    ----------
    name : str
        For its log, ``NAME.log`` in `directory`.
    model : Path
        Directory of the model.
    directory : Path
        Where the log goes.
    transfer_config : dict, optional
        Its ``--kv-transfer-config``.
    core : int, optional
        Processor that its threads compute on.
    cache_gib : float
        Memory of its KV cache.
    arguments : sequence of str
        More arguments.
    environ : mapping of str to str, optional
        More variables.
    """

    def __init__(self, name: str, model: Path, directory: Path, transfer_config: Optional[Mapping[str, Any]] = None,
                 core: Optional[int] = None, cache_gib: float = 1, arguments: Sequence[str] = (),
                 environ: Optional[Mapping[str, str]] = None) -> None:
        self.name = name
        self.port = free_port()
        self.log = directory.resolve() / f"{name}.log"
        self._environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "VLLM_NO_USAGE_STATS": "1",
                         "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **(environ or {})}
        if core is not None:
            self._environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
        # What `vllm serve` runs; that command itself looks for a distribution of the name vllm, which vllm-cpu is not.
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve()),
            "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model", "--dtype", "float32",
            "--enforce-eager", "--max-model-len", "2048", *arguments]
        if transfer_config is not None:
            self._command += ["--kv-transfer-config", json.dumps(transfer_config)]
        self._process: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        """Start it; `wait_ready` says when it answers."""
        with open(self.log, "ab") as output:
            # Not in the current directory, which Python would look for modules in: that may be a checkout of ours.
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=output,
                                             stderr=subprocess.STDOUT, env=self._environ, start_new_session=True,
                                             cwd=self.log.parent)

    def wait_ready(self) -> None:
        """Wait until it answers.

        Raises
        ------
        ServerError
            It ended, or needed too long; with the end of its log.
        """
        assert self._process is not None
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.3)
        tail = self.log.read_text(errors="replace").splitlines()[-30:]
        raise ServerError(f"{self.name} did not start; the end of {self.log}:\n" + "\n".join(tail))

    @property
    def pid(self) -> Optional[int]:
        """Process id of the server, which leads its group."""
        return None if self._process is None else self._process.pid

    def kill(self) -> None:
        """End all of its processes at once, without a word to anybody."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Ask it to end, and end what is left of it after a while."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(END_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def stop(self) -> None:
        """Stop all of its processes, as a debugger would; `go_on` lets them run again."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End a `stop`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                pass

    def __enter__(self) -> "Server":
        if self._process is None:
            self.start()
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- requests

    def complete(self, prompt: Sequence[int], max_tokens: int, transfer_params: Optional[Mapping[str, Any]] = None,
                 port: Optional[int] = None, **extra: Any) -> Dict[str, Any]:
        """Complete a prompt of token ids, greedily; at another `port` by a proxy.

        Returns
        -------
        dict
            The answer of ``/v1/completions``, with token ids.

        Raises
        ------
        ServerError
            The server refused it.
        OSError
            The server is gone.
        """
        body: Dict[str, Any] = {"model": "model", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
                                "return_token_ids": True, "ignore_eos": True, **extra}
        if transfer_params is not None:
            body["kv_transfer_params"] = dict(transfer_params)
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=REQUEST_LIMIT_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"{self.name} answered {response.status}: {text[:500]!r}")
        answer: Dict[str, Any] = json.loads(text)
        return answer

    def tokens(self, *args: Any, **kwargs: Any) -> List[int]:
        """Complete a prompt and return the token ids alone."""
        return list(self.complete(*args, **kwargs)["choices"][0]["token_ids"])

    def prefill(self, prompt: Sequence[int], **extra: Any) -> Dict[str, Any]:
        """Have a prompt computed for another engine, and return how that finds the blocks."""
        answer = self.complete(prompt, 1, {"do_remote_decode": True, "do_remote_prefill": False}, **extra)
        return dict(answer["kv_transfer_params"])

    def metrics(self) -> Dict[str, float]:
        """Return the server's counters and gauges, summed over their labels."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_LIMIT_S)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        sums: Dict[str, float] = {}
        for name, value in re.findall(r"^(\w+:?\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

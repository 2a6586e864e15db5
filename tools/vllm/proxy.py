"""The small proxy in front of a prefill and a decode server: each request goes to the first, then to the second.

The prefill server answers with how its blocks are found (``kv_transfer_params``), which the request takes along. Where
there is no such answer the decode server computes the prompt itself. With ``--push`` a request goes to both at once,
under a transfer id: the prefill server pushes its blocks into those that the decode server allocates for it. Run it by
itself with::

    python -m llm_datadist.tools.vllm.proxy --port 8000 --prefill http://HOST:PORT --decode http://HOST:PORT [--push]
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import threading
from typing import Any, Dict, Optional, Tuple

import aiohttp
from aiohttp import web

__all__ = ["Proxy"]

_PREFILL_LIMIT_S = 120
_PATHS = ("/v1/completions", "/v1/chat/completions")


class Proxy:
    """Routes of the proxy.

    Parameters
    ----------
    prefill, decode : str
        URLs of the servers.
    push : bool
        Whether prompts are pushed; both servers have ``"mode": "push"``.

    Attributes
    ----------
    num_fallbacks : int
        Requests that the prefill server did not compute.
    """

    def __init__(self, prefill: str, decode: str, push: bool = False) -> None:
        self._prefill = prefill
        self._decode = decode
        self._push = push
        self._decode_workers: Optional[Dict[str, Any]] = None       # how a prefill server reaches them
        self._session: Optional[aiohttp.ClientSession] = None
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread: Optional[threading.Thread] = None
        self.num_fallbacks = 0
        self.port = 0

    async def _start(self, host: str, port: int) -> web.AppRunner:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0),
                                              timeout=aiohttp.ClientTimeout(total=None))
        app = web.Application(client_max_size=1 << 26)
        for path in _PATHS:
            app.router.add_post(path, self._handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self._push:
            return await self._push_prompt(request, body)
        params = await self._compute_prompt(request.path, body, {})
        if params is not None:
            body["kv_transfer_params"] = params
        assert self._session is not None
        async with self._session.post(self._decode + request.path, json=body) as answer:
            return await _hand_on(request, answer, await answer.content.readany())

    async def _push_prompt(self, request: web.Request, body: Dict[str, Any]) -> web.StreamResponse:
        """Send a request to both servers. When the first fails before the second has said anything, ask that anew."""
        workers = await self._describe_decode(body)
        if workers is None:
            self.num_fallbacks += 1
            return await self._decode_alone(request, body)
        push = {"transfer_mode": "push", "transfer_id": secrets.randbits(52) | 1 << 52}
        awaited = {**body, "kv_transfer_params": {**push, "do_remote_prefill": True, "do_remote_decode": False}}
        prompt = asyncio.ensure_future(self._compute_prompt(request.path, body, {**push, **workers}))
        begun = asyncio.ensure_future(self._begin(request.path, awaited))
        try:
            await asyncio.wait({prompt, begun}, return_when=asyncio.FIRST_COMPLETED)
            if begun.done() or await prompt is not None:
                answer, first = await begun
                try:
                    return await _hand_on(request, answer, first)
                finally:
                    answer.close()
            self._decode_workers = None                 # it may be that server which was started anew
        finally:
            for task in (prompt, begun):
                task.cancel()                           # a client that left is told on to both
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        return await self._decode_alone(request, body)

    async def _begin(self, path: str, body: Dict[str, Any]) -> Tuple[aiohttp.ClientResponse, bytes]:
        """Ask the decode server; return its answer once that has its first bytes."""
        assert self._session is not None
        try:
            answer = await self._session.post(self._decode + path, json=body)
            try:
                return answer, await answer.content.readany()
            except BaseException:
                answer.close()
                raise
        except (aiohttp.ClientError, OSError):
            self._decode_workers = None                 # it went away: its successor has others
            raise

    async def _decode_alone(self, request: web.Request, body: Dict[str, Any]) -> web.StreamResponse:
        answer, first = await self._begin(request.path, body)
        try:
            return await _hand_on(request, answer, first)
        finally:
            answer.close()

    async def _describe_decode(self, body: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """How the decode server's workers are reached, which a request of one token tells; asked until it is known."""
        if self._decode_workers is None:
            asked = {"model": body.get("model"), "prompt": [1], "max_tokens": 1,
                     "kv_transfer_params": {"describe": True}}
            assert self._session is not None
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
                async with self._session.post(self._decode + _PATHS[0], json=asked) as answer:
                    found = (await answer.json()).get("kv_transfer_params") or {}
                    if found.get("transfer_mode") == "push":
                        self._decode_workers = {name: found[name] for name in ("remote_workers", "remote_layout")}
        return self._decode_workers

    async def _compute_prompt(self, path: str, body: Dict[str, Any],
                              push: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """Have the prompt computed, and return how its blocks are found; None when the server did not."""
        asked = {**body, "max_tokens": 1, "stream": False,
                 "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, **push}}
        asked.pop("stream_options", None)
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        assert self._session is not None
        try:
            async with self._session.post(self._prefill + path, json=asked,
                                          timeout=aiohttp.ClientTimeout(total=_PREFILL_LIMIT_S)) as answer:
                if answer.status == 200:
                    params = (await answer.json()).get("kv_transfer_params")
                    if params:
                        return dict(params)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            pass
        self.num_fallbacks += 1
        return None

    def start(self) -> None:
        """Serve on a free loopback port, in a thread."""
        ready = threading.Event()

        def serve() -> None:
            self._loop = asyncio.new_event_loop()
            runner = self._loop.run_until_complete(self._start("127.0.0.1", 0))
            ready.set()
            self._loop.run_forever()
            assert self._session is not None
            self._loop.run_until_complete(self._session.close())
            self._loop.run_until_complete(runner.cleanup())
            self._loop.close()

        self._thread = threading.Thread(target=serve, name="proxy", daemon=True)
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        """Stop serving."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()


async def _hand_on(request: web.Request, answer: aiohttp.ClientResponse, first: bytes) -> web.StreamResponse:
    """Give the client a server's answer, of which `first` was read already."""
    response = web.StreamResponse(status=answer.status)
    response.content_type = answer.content_type
    await response.prepare(request)
    await response.write(first)
    async for chunk in answer.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Send each request to a prefill server, then to a decode server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    parser.add_argument("--push", action="store_true", help='prompts are pushed; both servers have "mode": "push"')
    args = parser.parse_args()

    async def serve() -> None:
        await Proxy(args.prefill.rstrip("/"), args.decode.rstrip("/"), args.push)._start(args.host, args.port)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

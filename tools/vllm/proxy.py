"""The small proxy in front of a prefill and a decode server: each request goes to the first, then to the second.

The prefill server answers with how its blocks are found (``kv_transfer_params``), which the request takes along. Where
there is no such answer the decode server computes the prompt itself. Run it by itself with::

    python -m llm_datadist.tools.vllm.proxy --port 8000 --prefill http://HOST:PORT --decode http://HOST:PORT
"""
from __future__ import annotations

import argparse
import asyncio
import threading
from typing import Any, Dict, Optional

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

    Attributes
    ----------
    num_fallbacks : int
        Requests that the prefill server did not compute.
    """

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill = prefill
        self._decode = decode
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
        params = await self._compute_prompt(request.path, body)
        if params is not None:
            body["kv_transfer_params"] = params
        assert self._session is not None
        async with self._session.post(self._decode + request.path, json=body) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _compute_prompt(self, path: str, body: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """Have the prompt computed, and return how its blocks are found; None when the server did not."""
        asked = {**body, "max_tokens": 1, "stream": False,
                 "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
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


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Send each request to a prefill server, then to a decode server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    args = parser.parse_args()

    async def serve() -> None:
        await Proxy(args.prefill.rstrip("/"), args.decode.rstrip("/"))._start(args.host, args.port)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

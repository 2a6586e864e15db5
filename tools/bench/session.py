"""Starting, watching and ending the processes of a benchmark."""
from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection

from . import peer, worker
from .case import Case
from .channel import Channel, ChannelError

LOOPBACK = "127.0.0.1"
GREETING = "llm-datadist bench 1"
_CONNECT_SECONDS = 10.0
_END_SECONDS = 20.0


class Session:
    """A measuring process and its peers, restricted to one data path; `close` or `kill` ends them.

    Parameters
    ----------
    environ : dict of str to str
        Settings of the host provider, for all of the processes.
    num_peers : int
    remote : tuple of (str, int), optional
        Where ``llm-datadist bench --listen`` runs: the peers are started there. Default: on this host.
    """

    def __init__(self, environ: dict[str, str], num_peers: int, remote: tuple[str, int] | None = None) -> None:
        self._processes: list = []
        self._channel: Channel | None = None
        context = multiprocessing.get_context("spawn")
        peers: list[Connection] = []
        try:
            for number in range(num_peers):
                if remote is not None:
                    peers.append(call_remote(remote, environ))
                    continue
                ours, theirs = context.Pipe()
                peers.append(ours)
                self._start(context, peer.main, (theirs, environ, LOOPBACK), f"peer {number}")
                theirs.close()
            ours, theirs = context.Pipe()
            self._channel = Channel(ours, "the measuring process")
            self._start(context, worker.main, (theirs, peers, environ), "worker")
            theirs.close()
        except BaseException:
            self.kill()
            raise
        finally:
            for connection in peers:
                connection.close()              # only the worker holds it now: when the worker ends, so do the peers

    def _start(self, context, target, arguments: tuple, name: str) -> None:
        process = context.Process(target=target, args=arguments, name=f"bench {name}", daemon=True)
        self._processes.append(process)
        process.start()

    def close(self) -> None:
        """End all processes in order; those that do not end in time are killed."""
        try:
            self._channel.send(order="close")
            for process in self._processes:
                process.join(_END_SECONDS)
        except ChannelError:
            pass                                # it was over already, and said why when it was
        finally:
            self.kill()

    def kill(self) -> None:
        """End all processes at once."""
        for process in self._processes:
            process.kill()
            process.join(_END_SECONDS)
        if self._channel is not None:
            self._channel.close()

    def measure(self, case: Case, seconds: float, corrupt: bool, on_progress: Callable[[float], None]) -> dict:
        """Measure a case; see `rows.measure_case`."""
        return self._order(on_progress, order="case", case=case.to_dict(), seconds=seconds, corrupt=corrupt)

    def figure(self, name: str, seconds: float, on_progress: Callable[[float], None]) -> dict:
        """Measure a figure; see `figures`."""
        return self._order(on_progress, order="figure", figure=name, seconds=seconds)

    def _order(self, on_progress: Callable[[float], None], **order) -> dict:
        self._channel.send(**order)
        while True:
            answer = self._channel.receive()
            if "progress" in answer:
                on_progress(answer["progress"])
            elif "error" in answer:
                raise ChannelError(answer["error"])
            else:
                return answer["result"]


def call_remote(address: tuple[str, int], environ: dict[str, str]) -> Connection:
    """Have a listening benchmark start a peer, and return the connection to it."""
    try:
        connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise ChannelError(f"cannot reach {address[0]}:{address[1]}: {error}") from None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(None)
    raw = Connection(connection.detach())
    channel = Channel(raw, f"{address[0]}:{address[1]}")
    try:
        channel.ask(GREETING, timeout_s=_END_SECONDS, environ=environ)
    except BaseException:
        channel.close()
        raise
    return raw

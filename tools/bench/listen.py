"""``llm-datadist bench --listen``: owns the caches that a benchmark on another host reads and writes.

Whoever reaches the port can have this process take memory and serve it. So it listens where it is told and nowhere
else, takes few sessions, and lets callers set nothing but the data path.
"""
from __future__ import annotations

import multiprocessing
import socket
import sys
from multiprocessing.connection import Connection

from . import peer
from .case import MAX_LINKS
from .channel import Channel, ChannelError
from .engine import limit_paths
from .session import GREETING

_HELLO_SECONDS = 10.0
_ALLOWED = frozenset(limit_paths("", 1, 1))


def listen(ip: str, port: int) -> int:
    """Serve until interrupted.

    Returns
    -------
    int
        Exit status: 0 after an interrupt, 1 when the address cannot be had.
    """
    context = multiprocessing.get_context("spawn")
    sessions: list = []
    try:
        with socket.create_server((ip, port)) as server:
            print(f"listening on {ip}:{server.getsockname()[1]}; stop with Ctrl-C", flush=True)
            while True:
                accepted, caller = server.accept()
                sessions = [process for process in sessions if process.is_alive()]
                process = _admit(context, accepted, ip, len(sessions))
                if process is not None:
                    sessions.append(process)
                    print(f"session of {caller[0]}, process {process.pid}", flush=True)
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        print(f"llm-datadist bench: cannot listen on {ip}:{port}: {error.strerror}", file=sys.stderr)
        return 1
    finally:
        for process in sessions:
            process.kill()
            process.join()


def _admit(context, accepted: socket.socket, ip: str, num_sessions: int):
    """Start a peer for a caller that greets properly; None for one that does not."""
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    accepted.settimeout(None)
    local_ip = accepted.getsockname()[0] if ip in ("", "0.0.0.0") else ip
    connection = Connection(accepted.detach())
    channel = Channel(connection, "the caller")
    try:
        hello = channel.receive(_HELLO_SECONDS)
        environ = hello.get("environ")
        if hello.get("command") != GREETING:
            channel.send(error=f"{hello.get('command')!r} is not {GREETING!r}: use equal versions on both hosts")
        elif num_sessions >= MAX_LINKS:
            channel.send(error=f"{num_sessions} sessions are running, which is the limit")
        elif not isinstance(environ, dict) or not all(
            name in _ALLOWED and isinstance(value, str) for name, value in environ.items()
        ):
            channel.send(error=f"settings {environ!r}: only {', '.join(sorted(_ALLOWED))} can be set")
        else:
            process = context.Process(
                target=peer.main, args=(connection, environ, local_ip), name="bench peer", daemon=True)
            process.start()
            channel.send()
            return process
    except ChannelError as error:
        print(f"refused: {error}", file=sys.stderr)
    finally:
        channel.close()
    return None

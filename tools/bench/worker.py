"""The process that measures. It gets its peers' connections and its orders from the command, and reports on the way."""
from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from multiprocessing.connection import Connection

from .case import Case
from .channel import Channel, ChannelError


def main(connection: Connection, peers: list[Connection], environ: dict[str, str]) -> None:
    """Serve the command until it says "close" or is gone.

    Answers to an order are any number of ``{"progress": fraction}``, then ``{"result": dict}`` or ``{"error": text}``.
    """
    faulthandler.enable()
    os.environ.update(environ)
    command = Channel(connection, "the command")
    channels = [Channel(peer, f"peer {index}") for index, peer in enumerate(peers)]
    try:
        while True:
            order = command.receive(timeout_s=None)
            if order["order"] == "close":
                for channel in channels:
                    channel.ask("close")
                return
            try:
                command.send(result=_carry_out(order, channels, lambda fraction: command.send(progress=fraction)))
            except Exception:
                command.send(error=traceback.format_exc())
    except (ChannelError, KeyboardInterrupt):
        sys.exit(1)


def _carry_out(order: dict, peers: list[Channel], on_progress) -> dict:
    from .figures import FIGURES
    from .rows import measure_case

    if order["order"] == "case":
        return measure_case(
            Case.from_dict(order["case"]), peers, order["seconds"], order["corrupt"], on_progress)
    return FIGURES[order["figure"]].measure(peers, order["seconds"], on_progress)

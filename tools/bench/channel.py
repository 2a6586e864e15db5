"""Messages between the processes of a benchmark: JSON objects, also over TCP, and never pickle."""
from __future__ import annotations

import json
from multiprocessing.connection import Connection

MAX_MESSAGE_BYTES = 64 << 20
ANSWER_SECONDS = 300.0


class ChannelError(RuntimeError):
    """The other process is gone, fell silent, or failed; the text says which, with its traceback when there is one."""


class Channel:
    """One end of a connection.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        A pipe or a socket; the channel closes it.
    who : str
        The other end, for texts.
    """

    def __init__(self, connection: Connection, who: str) -> None:
        self._connection = connection
        self.who = who

    def send(self, **message) -> None:
        """Send one message."""
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise ChannelError(f"{self.who} is gone: {error}") from None

    def receive(self, timeout_s: float | None = ANSWER_SECONDS) -> dict:
        """Return the next message; None as time limit waits for ever."""
        try:
            if timeout_s is not None and not self._connection.poll(timeout_s):
                raise ChannelError(f"{self.who} has not answered for {timeout_s:g} s")
            message = json.loads(self._connection.recv_bytes(MAX_MESSAGE_BYTES))
        except (EOFError, OSError) as error:
            raise ChannelError(f"{self.who} is gone ({type(error).__name__})") from None
        except ValueError as error:
            raise ChannelError(f"{self.who} sent something else than JSON: {error}") from None
        if not isinstance(message, dict):
            raise ChannelError(f"{self.who} sent no object")
        return message

    def ask(self, command: str, timeout_s: float | None = ANSWER_SECONDS, **arguments) -> dict:
        """Send a command and return the answer; raises ChannelError with the other side's text when it failed."""
        self.send(command=command, **arguments)
        answer = self.receive(timeout_s)
        if "error" in answer:
            raise ChannelError(f"{self.who} failed to {command}:\n{answer['error']}")
        return answer

    def fileno(self) -> int:
        """Descriptor, for waiting on several channels."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close this end. Idempotent."""
        self._connection.close()


def serve(channel: Channel, handlers: dict) -> None:
    """Answer commands until the other end is gone or says "close".

    A handler takes the command's arguments and returns a dict. What it raises goes back as text and ends nothing: the
    other side decides what to do.
    """
    import traceback

    while True:
        try:
            message = channel.receive(timeout_s=None)
        except ChannelError:
            return
        command = message.pop("command", None)
        if command == "close":
            channel.send()
            return
        try:
            if command not in handlers:
                raise ValueError(f"unknown command {command!r}")
            answer = handlers[command](**message)
        except Exception:
            answer = {"error": traceback.format_exc()}
        channel.send(**answer)

"""A listener that cannot be opened leaves nothing open."""
from __future__ import annotations

import os
import socket

import pytest

from llm_datadist import LLMException

MOST_DATA_SERVERS = 16              # local addresses that one engine serves data at


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def test_a_listener_without_a_data_server_is_closed_again(peers):
    engine = peers.here(1).node.dist._require_engine()
    for number in range(2, MOST_DATA_SERVERS + 1):
        engine.set_listener((f"127.0.0.{number}", 0))
    engine.set_listener(None)
    before = open_fds()
    with socket.create_server(("127.0.0.100", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(LLMException, match="at most 16 local addresses"):
        engine.set_listener(("127.0.0.100", port))
    assert engine.listener is None
    assert open_fds() <= before                 # one of an earlier test may have gone meanwhile
    socket.create_server(("127.0.0.100", port)).close()

"""A server and its clients, for tests of fetches."""
import ctypes
import os

import pytest
import support.hixl_peer as hixl
from support.hixl_fetches import (
    CONTENT,
    SIZE,
    Raw,
    serving,
)


@pytest.fixture(scope="module")
def api():
    return hixl.Api()


@pytest.fixture(scope="module")
def peer():
    with serving() as running:
        yield running


@pytest.fixture
def own_peer():
    """A server that the test may kill."""
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def local(api):
    addr = api.alloc(SIZE)
    yield addr
    api.free(addr)


@pytest.fixture
def client(api, peer):
    with api.client(peer.port) as connected:
        yield connected.connect()


@pytest.fixture(autouse=True)
def serves_on(api, peer, local):
    """After every test: whatever has begun has ended once, and the server answers others."""
    yield
    token = os.urandom(16).hex()
    with api.client(peer.port, b'{"ldd_token":"%s"}' % token.encode()) as client:
        ctypes.memset(local, 0, 100)
        assert client.connect().fetch(hixl.fetch_request([[peer.addr, 100]]), [(local, 100)]) == (0, "")
        assert ctypes.string_at(local, 100) == CONTENT[:100]
    ends = peer.call("ended")
    assert [len(end) for end in ends] == [1] * len(ends)
    assert [end for (whose, *_), end in zip(peer.call("begun", 0), ends) if whose == token] == [[True]]


@pytest.fixture
def raw(peer):
    with Raw(peer.port) as made:
        yield made

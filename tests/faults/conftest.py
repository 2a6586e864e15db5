"""An owner and a reader with a network between them that a test can damage."""
from __future__ import annotations

import os
from typing import Dict, Iterator

import pytest
from faults import calls
from support.link_steps import fetch_code, until
from support.link_steps import offer as offer_blocks
from support.link_steps import withdraw as withdraw_blocks
from support.peer import Child, Peers, engine_options
from support.proxy import Proxy

from llm_datadist import LLMStatusCode

S = LLMStatusCode
TCP = {"LLM_DATADIST_HOST_PATHS": "tcp"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """These take minutes."""
    if not os.environ.get("LDD_FAULTS"):
        pytest.skip("takes minutes; make faults runs it")


class Broken:
    """An owner and a reader that is linked to it through a proxy; a blocks cache of the owner's shows that they work.

    Attributes
    ----------
    owner, reader : Child
    network : Proxy
    """

    def __init__(self, peers: Peers, timeout_ms: int, options: Dict[str, str], follows_data: bool = True) -> None:
        self.peers = peers
        self._timeout_ms, self._options = timeout_ms, options
        self.owner = self._start_owner()
        self.reader = self._start_reader()
        assert self.owner.address is not None
        self.network = Proxy(self.owner.address, follows_data)
        self._number = 0

    def _start_owner(self, **options: str) -> Child:
        owner = self.peers.start(calls.OWNER, engine_options(**self._options, **options), env=TCP)
        owner.call(offer_blocks)
        return owner

    def _start_reader(self) -> Child:
        reader = self.peers.start(calls.READER, engine_options(timeout_ms=self._timeout_ms, **self._options), env=TCP)
        reader.call(calls.prepare)
        return reader

    def number(self) -> int:
        """Of a key nobody used; the bytes of tensors are those of the numbers behind it."""
        self._number += calls.TENSORS
        return self._number

    def link(self) -> None:
        """Link through the proxy, and have every connection made."""
        assert self.reader.call(calls.link_to, self.network.address, 10000) in (S.LLM_SUCCESS, S.LLM_ALREADY_LINK)
        self.works()

    def forget_keys(self) -> None:
        """Remove the keys that calls may have left."""
        for number in range(calls.TENSORS, self._number + 1, calls.TENSORS):
            self.owner.call(calls.withdraw, number)
        assert self.owner.settled()["keys"] == 1

    def answers(self) -> None:
        """Within bounded time calls work."""
        codes = set()

        def is_well() -> bool:
            codes.add(self.reader.call(fetch_code, calls.OWNER))
            return S.LLM_SUCCESS in codes

        assert until(is_well), codes
        assert codes <= {S.LLM_SUCCESS, S.LLM_NOT_YET_LINK, S.LLM_TIMEOUT}, codes

    def works(self) -> None:
        """Within bounded time calls work, and nothing is pinned."""
        self.answers()
        for process in (self.owner, self.reader):
            assert process.settled()["pins"] == 0

    def start_owner_again(self) -> None:
        """A new process of the same cluster in place of one that was killed."""
        assert self.owner.address is not None
        self.owner = self._start_owner(llm_listenIpInfo="{}:{}".format(*self.owner.address))
        assert self.owner.address is not None
        self.network.owner_is_now(self.owner.address)

    def start_reader_again(self) -> None:
        """The same for the reader."""
        self.reader = self._start_reader()
        self.link()

    def close(self) -> None:
        """Give back what both hold, which then must be nothing."""
        self.network.restore()
        self.owner.call(withdraw_blocks)
        self.reader.call(calls.put_away)
        self.network.close()


@pytest.fixture(scope="module")
def broken() -> Iterator[Broken]:
    """A `Broken` whose reader gives up after a second."""
    with Peers() as peers:
        made = Broken(peers, 1000, {})
        made.link()
        yield made
        made.close()

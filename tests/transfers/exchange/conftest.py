"""Linked processes that reach each other by TCP alone."""
import pytest
from support.peer import Peers, engine_options, engine_options_v1
from transfers.exchange.steps import MIB, TCP, connect, linked, meet
from transfers.pair import HERE, THERE, Pair

from llm_datadist import LLMRole


@pytest.fixture(scope="module")
def two_sided():
    with Peers() as peers:
        yield connect(linked(peers))


@pytest.fixture(scope="module")
def accessible():
    with Peers() as peers:
        yield connect(linked(peers, remote_accessible=True))


@pytest.fixture(scope="module")
def first_generation():
    with Peers() as peers:
        there = peers.start(THERE, engine_options_v1(llm_Strict="0"), role=LLMRole.PROMPT, env=TCP)
        here = peers.start(HERE, engine_options_v1(listen=False, llm_Strict="0"), role=LLMRole.DECODER, env=TCP)
        peers.link(here, there)
        yield connect(Pair(peers, False, "tcp", here, there))


@pytest.fixture
def crowd():
    """An owner here, and two linked readers."""
    with Peers() as peers:
        owner = peers.here(THERE, engine_options(device_pool=256 * MIB), env=TCP)
        readers = [peers.start(number, engine_options(device_pool=160 * MIB), env=TCP) for number in (21, 22)]
        for reader in readers:
            peers.link(reader, owner)
            meet(owner, reader)
        yield peers, owner, readers

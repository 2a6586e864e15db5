"""Linking and unlinking while the network or the other process fails at each frame."""
from __future__ import annotations

import pytest
from faults import calls
from faults.conftest import Broken
from support.link_steps import fetch_code, links, wait_links
from support.peer import PeerError, Peers

from llm_datadist import LLMStatusCode

S = LLMStatusCode
OPTIONS = {"": {}, "secret ": {"llm_LinkSecret": "the-secret-of-these-tests"}}
STEPS = [("", step) for step in ("HELLO", "WELCOME", "data HELLO", "data WELCOME", "LIST request", "LIST reply")]
STEPS += [("secret ", step) for step in ("WELCOME", "PROOF")]
EACH_STEP = pytest.mark.parametrize("unlinked, step", STEPS, indirect=["unlinked"], ids=["".join(row) for row in STEPS])
NO_TIME_MS = 1000


@pytest.fixture(scope="module")
def pairs():
    """The two without and with a shared secret, not linked; each test leaves them so."""
    with Peers() as peers:
        made = {name: Broken(peers, 1000, options, follows_data=not options) for name, options in OPTIONS.items()}
        yield made
        for broken in made.values():
            broken.close()


@pytest.fixture
def unlinked(pairs, request):
    broken = pairs[getattr(request, "param", "")]
    yield broken
    broken.network.restore()
    broken.link()                               # whatever was before: they can link, and a call works
    assert broken.reader.call(calls.unlink_from, 10000) is S.LLM_SUCCESS
    assert broken.owner.call(wait_links, []) == [] and broken.reader.call(links) == []


def begin(broken, step, action, half):
    """Start to link, until the frame has come."""
    trap = broken.network.arm(step, action, half=half)
    finish = broken.reader.begin(calls.link_to, broken.network.address, NO_TIME_MS)
    trap.wait()
    return trap, finish


@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
@EACH_STEP
def test_a_cut_while_linking(unlinked, step, half):
    """It is said at once; nothing is left of the attempt on either side."""
    _, finish = begin(unlinked, step, "cut", half)
    assert finish() is S.LLM_LINK_FAILED
    assert unlinked.reader.call(links) == [] and unlinked.owner.call(wait_links, []) == []


@pytest.mark.parametrize("action, half", [("swallow", False), ("hold", True)], ids=["swallowed", "held"])
@EACH_STEP
def test_silence_while_linking(unlinked, step, action, half):
    trap, finish = begin(unlinked, step, action, half)
    assert finish() in (S.LLM_TIMEOUT, S.LLM_LINK_FAILED)
    unlinked.network.restore()
    trap.wait("passed")
    assert unlinked.reader.call(links) == [] and unlinked.owner.call(wait_links, []) == []


@EACH_STEP
def test_bytes_that_come_one_by_one_while_linking(unlinked, step):
    _, finish = begin(unlinked, step, "dribble", False)
    assert finish() in (S.LLM_SUCCESS, S.LLM_TIMEOUT, S.LLM_LINK_FAILED)
    unlinked.network.cut()


@EACH_STEP
def test_the_owner_is_killed_while_it_is_linked(unlinked, step):
    _, finish = begin(unlinked, step, "hold", True)
    unlinked.owner.kill()
    unlinked.network.cut()
    unlinked.network.restore()
    assert finish() is S.LLM_LINK_FAILED
    assert unlinked.reader.call(links) == []
    unlinked.start_owner_again()


@EACH_STEP
def test_the_reader_is_killed_while_it_links(unlinked, step):
    trap, finish = begin(unlinked, step, "hold", True)
    unlinked.reader.kill()
    unlinked.network.cut()
    unlinked.network.restore()
    trap.wait("passed")
    with pytest.raises(PeerError, match="ended"):
        finish()
    assert unlinked.owner.call(wait_links, []) == []
    unlinked.start_reader_again()


@pytest.mark.parametrize("action, half, says", [
    ("cut", False, S.LLM_UNLINK_FAILED), ("cut", True, S.LLM_UNLINK_FAILED), ("swallow", False, S.LLM_TIMEOUT),
    ("hold", True, S.LLM_TIMEOUT)], ids=["cut", "cut off", "swallowed", "held"])
@pytest.mark.parametrize("step", ["UNLINK", "ACK"])
def test_unlinking_while_the_network_fails(unlinked, step, action, half, says):
    """Whether the peer heard of it is not known: the link stays broken, and does not come back by itself."""
    unlinked.link()
    trap = unlinked.network.arm(step, action, half=half)
    finish = unlinked.reader.begin(calls.unlink_from, NO_TIME_MS)
    trap.wait()
    assert finish() is says
    unlinked.network.restore()
    trap.wait("passed")
    assert unlinked.owner.call(wait_links, []) == []
    assert unlinked.reader.call(fetch_code, calls.OWNER) is S.LLM_NOT_YET_LINK
    assert unlinked.reader.call(links) == [(calls.OWNER, "local", "broken")]
    assert unlinked.owner.settled()["pins"] == 0

"""Either process is killed, or stands still for a while, at each frame of each call; the network holds the frame.

The frame that is held says at which stage the call is. What went on before has arrived; what comes behind has not.
"""
from __future__ import annotations

import os
import signal

import pytest
from faults import calls
from faults.test_stages import END, FETCH, SEND, STEPS, begin, begin_send, keys_are, pull_of
from support.link_steps import links, stop, until
from support.peer import PeerError

from llm_datadist import LLMStatusCode

S = LLMStatusCode
PULLS = (*FETCH, "CONFIRM request", *STEPS, *END)


def dies(broken, process):
    """Kill a process; what the proxy holds goes nowhere."""
    process.kill()
    broken.network.cut()
    broken.network.restore()


@pytest.mark.parametrize("step", FETCH + STEPS + END)
def test_the_owner_is_killed_under_a_pull(broken, step):
    _, finish, number = begin(broken, pull_of(step), step, "hold", True)
    dies(broken, broken.owner)
    assert finish() is S.LLM_NOT_YET_LINK
    assert broken.reader.stats()["pins"] == 0
    broken.start_owner_again()
    broken.works()                              # without a word of ours
    assert broken.reader.call(calls.pull, number) is S.LLM_KV_CACHE_NOT_EXIST


@pytest.mark.parametrize("step", SEND + END)
def test_the_owner_is_killed_under_a_transfer(broken, step):
    _, finish, _, _ = begin_send(broken, step, "hold", True)
    dies(broken, broken.owner)
    assert finish() is S.LLM_NOT_YET_LINK
    assert broken.reader.stats()["pins"] == 0
    broken.start_owner_again()
    broken.works()


@pytest.mark.parametrize("step", PULLS)
def test_the_reader_is_killed_under_a_pull(broken, step):
    """The owner lets go of everything; the key is taken only where the reader had asked for that."""
    trap, finish, number = begin(broken, pull_of(step), step, "hold", False)
    if step == "CONFIRM request":
        assert finish() is S.LLM_SUCCESS
    dies(broken, broken.reader)
    trap.wait("passed")
    if step != "CONFIRM request":
        with pytest.raises(PeerError, match="ended"):
            finish()
    assert until(lambda: broken.owner.stats()["pins"] == 0 and not broken.owner.call(links))
    broken.start_reader_again()
    keys_are(broken, number, step != "ACK")


@pytest.mark.parametrize("step", SEND + END)
def test_the_reader_is_killed_under_a_transfer(broken, step):
    trap, finish, number, addrs = begin_send(broken, step, "hold", True)
    dies(broken, broken.reader)
    trap.wait("passed")
    with pytest.raises(PeerError, match="ended"):
        finish()
    assert until(lambda: broken.owner.stats()["pins"] == 0 and not broken.owner.call(links))
    broken.owner.call(calls.fill_memory, addrs, number)
    broken.start_reader_again()
    assert broken.owner.call(calls.memory_holds, addrs, number)
    broken.owner.call(calls.withdraw, number)


@pytest.mark.parametrize("step", FETCH + STEPS + END)
def test_the_owner_stands_still_under_a_pull(broken, step):
    trap, finish, _ = begin(broken, pull_of(step), step, "hold", False)
    stop(broken.owner.pid)
    try:
        broken.network.restore()                # what was on its way arrives, nothing else comes
        trap.wait("passed")
        code = finish()
    finally:
        os.kill(broken.owner.pid, signal.SIGCONT)
    # Frames of the owner's were sent before it stopped: the bytes may all be there.
    assert code is S.LLM_TIMEOUT or (code is S.LLM_SUCCESS and step in ("FETCH reply", "FETCH bytes", "ACK")), code
    broken.reader.call(calls.fill)
    broken.works()
    assert broken.reader.call(calls.holds, None)
    broken.forget_keys()


@pytest.mark.parametrize("step", PULLS)
def test_the_reader_stands_still_under_a_pull(broken, step):
    """Others are served meanwhile; it goes on where it was, or gives up at its deadline, with right bytes or none."""
    trap, finish, number = begin(broken, pull_of(step), step, "hold", False)
    stop(broken.reader.pid)
    try:
        broken.network.restore()
        trap.wait("passed")
        assert broken.owner.stats()["links"] == 1
    finally:
        os.kill(broken.reader.pid, signal.SIGCONT)
    code = finish()
    assert code in (S.LLM_SUCCESS, S.LLM_TIMEOUT), code
    if code is S.LLM_SUCCESS:
        assert broken.reader.call(calls.holds, number)
    broken.works()
    broken.forget_keys()

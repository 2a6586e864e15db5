"""The network fails at each frame of each call: cut, cut off, silent, slow, and how both sides are afterwards.

A call that lost its link begins again over a new one, so that most cuts are not seen at all. After a timeout the
destination is filled anew, and what the network still has goes on: not one byte of it lands.
"""
from __future__ import annotations

import pytest
from faults import calls

from llm_datadist import LLMStatusCode

S = LLMStatusCode
FETCH = ("FETCH request", "FETCH reply", "FETCH bytes")
STEPS = ("RESOLVE", "DESCRIPTOR", "GET request", "GET reply", "GET bytes")
SEND = ("RANGES", "LEASE", "PUT request", "PUT bytes", "PUT reply")
END = ("RELEASE", "ACK")
HALF = pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])

SILENT = pytest.mark.parametrize("action, half", [("swallow", False), ("hold", True)], ids=["swallowed", "held"])


def pull_of(step):
    """The call that has this step, and a key for it."""
    return calls.pull if step in (*FETCH, "CONFIRM request") else calls.pull_by_steps


def begin(broken, function, step, action, half):
    """Offer a key and pull it, until the frame has come; the trap, how to end the call, and the key."""
    number = broken.number()
    broken.owner.call(calls.offer, number)
    broken.reader.call(calls.fill)
    trap = broken.network.arm(step, action, half=half)
    finish = broken.reader.begin(function, number)
    trap.wait()
    return trap, finish, number


def keys_are(broken, number, left):
    """Whether the key is still there; then it is pulled after all."""
    assert broken.owner.settled()["keys"] == 1 + left
    broken.reader.call(calls.fill)
    assert broken.reader.call(calls.pull, number) is (S.LLM_SUCCESS if left else S.LLM_KV_CACHE_NOT_EXIST)
    assert broken.reader.call(calls.holds, number if left else None)
    assert broken.owner.settled()["keys"] == 1


@HALF
@pytest.mark.parametrize("step", FETCH + STEPS)
def test_a_pull_whose_connections_are_cut_begins_again(broken, step, half):
    _, finish, number = begin(broken, pull_of(step), step, "cut", half)
    assert finish() is S.LLM_SUCCESS
    assert broken.reader.call(calls.holds, number)
    broken.works()
    keys_are(broken, number, False)


@HALF
@pytest.mark.parametrize("step, left", [("RELEASE", True), ("ACK", False)])
def test_a_cut_while_the_key_is_released_is_said(broken, step, half, left):
    """Nobody knows on which side of the cut the key was taken: the call does not begin again by itself."""
    _, finish, number = begin(broken, calls.pull_by_steps, step, "cut", half)
    assert finish() is S.LLM_NOT_YET_LINK
    broken.works()
    keys_are(broken, number, left)


@HALF
@pytest.mark.parametrize("action", ["cut", "swallow"])
def test_a_confirmation_that_never_comes_takes_no_key(broken, action, half):
    """The reader has its bytes, and the owner what it had."""
    _, finish, number = begin(broken, calls.pull, "CONFIRM request", action, half)
    assert finish() is S.LLM_SUCCESS
    assert broken.reader.call(calls.holds, number)
    broken.network.restore()
    broken.works()
    keys_are(broken, number, True)


@HALF
def test_a_confirmation_that_comes_late_takes_the_key(broken, half):
    trap, finish, number = begin(broken, calls.pull, "CONFIRM request", "hold", half)
    assert finish() is S.LLM_SUCCESS
    assert broken.owner.stats()["keys"] == 2
    broken.network.restore()
    trap.wait("passed")
    broken.works()
    keys_are(broken, number, False)


@SILENT
@pytest.mark.parametrize("step", FETCH + STEPS + END)
def test_a_pull_in_silence_ends_and_nothing_lands_later(broken, step, action, half):
    """Held frames go on after the call has given up, swallowed ones do not."""
    trap, finish, number = begin(broken, pull_of(step), step, action, half)
    assert finish() is S.LLM_TIMEOUT
    broken.reader.call(calls.fill)
    broken.network.restore()
    trap.wait("passed")
    broken.works()
    assert broken.reader.call(calls.holds, None)
    keys_are(broken, number, step != "ACK" and (step != "RELEASE" or action == "swallow"))


@pytest.mark.parametrize("step", (*FETCH[:1], "CONFIRM request", *STEPS[:3], *END))
def test_frames_that_come_byte_by_byte(broken, step):
    """From one frame on that connection carries one byte at a time."""
    _, finish, number = begin(broken, pull_of(step), step, "dribble", False)
    assert finish() is S.LLM_SUCCESS
    assert broken.reader.call(calls.holds, number)
    assert broken.owner.settled()["keys"] == 1
    broken.network.cut()                        # a slow connection stays slow
    broken.works()
    keys_are(broken, number, False)


# --------------------------------------------------------------------------------------------------- the other way

def begin_send(broken, step, action, half):
    """Offer memory and send to it, until the frame has come; the key keeps the memory."""
    number = broken.number()
    addrs = broken.owner.call(calls.offer, number)
    broken.reader.call(calls.fill)
    trap = broken.network.arm(step, action, half=half)
    finish = broken.reader.begin(calls.send, addrs)
    trap.wait()
    return trap, finish, number, addrs


@HALF
@pytest.mark.parametrize("step", SEND + END)
def test_a_transfer_whose_connections_are_cut_fails(broken, step, half):
    _, finish, number, addrs = begin_send(broken, step, "cut", half)
    assert finish() is S.LLM_NOT_YET_LINK
    broken.works()
    if step in SEND[:2]:
        assert broken.owner.call(calls.memory_holds, addrs, number)
    elif step in (*SEND[4:], *END):
        assert broken.owner.call(calls.memory_holds, addrs, None)
    assert broken.reader.call(calls.send, addrs) is S.LLM_SUCCESS
    assert broken.owner.call(calls.memory_holds, addrs, None)
    broken.owner.call(calls.withdraw, number)


@SILENT
@pytest.mark.parametrize("step", SEND + END)
def test_a_transfer_in_silence_ends_and_nothing_lands_later(broken, step, action, half):
    trap, finish, number, addrs = begin_send(broken, step, action, half)
    assert finish() is S.LLM_TIMEOUT
    if action == "swallow":
        broken.network.restore()
    broken.answers()                            # over a new link, while old connections still have a frame that is held
    broken.owner.call(calls.fill_memory, addrs, number)
    broken.network.restore()
    trap.wait("passed")
    broken.works()
    assert broken.owner.call(calls.memory_holds, addrs, number)
    broken.owner.call(calls.withdraw, number)

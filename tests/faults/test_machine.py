"""Random operations of two processes, with faults between them, against a model of every byte, key and count.

``LDD_FAULT_STEPS`` sets how many steps there are in all, and has every run choose others; without it they are the same
each time.
"""
from __future__ import annotations

import os
from typing import Dict, Optional, Set

import pytest
from faults import calls
from faults.conftest import Broken
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.link_steps import stopped
from support.peer import Peers

from llm_datadist import LLMStatusCode

S = LLMStatusCode
STEPS = int(os.environ.get("LDD_FAULT_STEPS", "0"))
PER_RUN = 60
RUNS = max(1, (STEPS or 1800) // PER_RUN)
MOST_KEYS = 6
LOST = {S.LLM_TIMEOUT, S.LLM_NOT_YET_LINK}      # what a call may say that met a fault
FRAMES = ("FETCH request", "FETCH reply", "FETCH bytes", "RESOLVE", "DESCRIPTOR", "GET request", "GET bytes",
          "PUT bytes", "RELEASE", "ACK", "CONFIRM request")

_broken: Optional[Broken] = None                # one pair for all runs: what a run leaves would be seen by the next
_steps = {"calls": 0, "failed": 0, "faults": 0}


# What a step does depends on what calls answered, and that on when a fault met them; which steps there are does not,
# so that rules have no preconditions, and what has nothing to do does nothing.
class Machine(RuleBasedStateMachine):
    """The model: what each key must bring, which may be gone, what the destination holds, whether there is a link."""

    def __init__(self) -> None:
        super().__init__()
        assert _broken is not None
        self.both = _broken
        self.keys: Dict[int, int] = {}          # key to its bytes
        self.doubtful: Set[int] = set()         # nobody was told whether the key was taken
        self.addrs: Dict[int, list] = {}
        self.target: Optional[int] = None       # a number, or None for untouched
        self.is_linked = True

    @initialize()
    def begin(self) -> None:
        """Link, with nothing there."""
        self.both.network.restore()
        self.both.link()
        self.both.reader.call(calls.fill)

    # ------------------------------------------------------------------------------------------------ operations

    @rule()
    def offer(self) -> None:
        """A key of the owner's."""
        if len(self.keys) == MOST_KEYS:
            return
        self._offer()

    def _offer(self) -> None:
        number = self.both.number()
        self.addrs[number] = self.both.owner.call(calls.offer, number)
        self.keys[number] = number

    @rule(which=st.integers(0, MOST_KEYS - 1))
    def withdraw(self, which: int) -> None:
        """The owner removes a key."""
        number = self._key(which)
        self.both.owner.call(calls.withdraw, number)
        self._forget(number)

    @rule(which=st.integers(0, MOST_KEYS - 1), by_steps=st.booleans())
    def pull(self, which: int, by_steps: bool) -> None:
        """A pull: the bytes of the key, or a reason why not."""
        number = self._key(which)
        self.both.reader.call(calls.fill)
        code = self.both.reader.call(calls.pull_by_steps if by_steps else calls.pull, number)
        self._pulled(number, code, False)

    @rule(number=st.integers(1 << 40, 1 << 41))
    def pull_nothing(self, number: int) -> None:
        """A key that never was."""
        self.both.reader.call(calls.fill)
        code = self.both.reader.call(calls.pull, number)
        assert code is (S.LLM_KV_CACHE_NOT_EXIST if self.is_linked else S.LLM_NOT_YET_LINK) or (
            self.is_linked and code in LOST), code
        assert self.both.reader.call(calls.holds, None)

    @rule(which=st.integers(0, MOST_KEYS - 1))
    def send(self, which: int) -> None:
        """Layers in the background, to memory that a key keeps."""
        number = self._key(which)
        if number in self.doubtful:
            return                              # the memory may be gone with its key
        fresh = self.both.number()
        self.both.reader.call(calls.fill, fresh)
        code = self.both.reader.call(calls.send, self.addrs[number])
        if code is S.LLM_SUCCESS:
            assert self.is_linked
            self.keys[number] = fresh
        else:
            assert code in LOST, code
            self.both.owner.settled()
            self.both.owner.call(calls.fill_memory, self.addrs[number], self.keys[number])

    # ---------------------------------------------------------------------------------------------------- faults

    @rule(which=st.integers(0, MOST_KEYS - 1), frame=st.sampled_from(FRAMES), action=st.sampled_from(["cut", "hold"]),
          half=st.booleans(), by_steps=st.booleans(), dies=st.sampled_from([False] * 9 + [True]))
    def pull_under_a_fault(self, which: int, frame: str, action: str, half: bool, by_steps: bool, dies: bool) -> None:
        """A pull whose connections are cut at a frame, or that is cancelled while one is held, or whose owner dies."""
        if not self.is_linked:
            return
        number = self._key(which)
        self.both.reader.call(calls.fill)
        trap = self.both.network.arm(frame, action, half=half)
        finish = self.both.reader.begin(calls.pull_until if action == "hold" else
                                        calls.pull_by_steps if by_steps else calls.pull, number)
        code = finish()
        _steps["faults"] += trap.reached.is_set()
        self.both.network.restore()
        if trap.reached.is_set():
            trap.wait("passed")
        self._pulled(number, code, trap.reached.is_set() or (action == "hold" and code is S.LLM_FAILED))
        if dies:
            self._owner_dies()

    @rule()
    def cut(self) -> None:
        """Every connection is reset between calls."""
        self.both.network.cut()
        _steps["faults"] += 1

    @rule(which=st.integers(0, MOST_KEYS - 1), rare=st.sampled_from([False] * 5 + [True]))
    def time_out(self, which: int, rare: bool) -> None:
        """The owner stands still beyond the deadline."""
        if not rare or not self.is_linked:
            return
        number = self._key(which)
        self.both.reader.call(calls.fill)
        with stopped(self.both.owner):
            code = self.both.reader.call(calls.pull, number)
        _steps["faults"] += 1
        self._pulled(number, code, True)

    def _owner_dies(self) -> None:
        """A new process at its address, with nothing of the old one."""
        self.both.owner.kill()
        self.both.network.cut()
        self.both.start_owner_again()
        self.keys.clear()
        self.doubtful.clear()
        _steps["faults"] += 1

    @rule()
    def unlink(self) -> None:
        """The link ends; calls say so."""
        if not self.is_linked:
            return
        code = self.both.reader.call(calls.unlink_from, 5000)
        assert code in (S.LLM_SUCCESS, S.LLM_NOT_YET_LINK, S.LLM_UNLINK_FAILED, S.LLM_TIMEOUT), code
        self.is_linked = False

    @rule()
    def link(self) -> None:
        """And begins again."""
        self.both.link()
        self.is_linked = True

    # --------------------------------------------------------------------------------------------------- compare

    def _key(self, which: int) -> int:
        if not self.keys:
            self._offer()
        return sorted(self.keys)[which % len(self.keys)]

    def _forget(self, number: int) -> None:
        del self.keys[number]
        self.doubtful.discard(number)

    def _pulled(self, number: int, code: LLMStatusCode, met_a_fault: bool) -> None:
        """What a pull may say, and what then holds. The destination was untouched before it."""
        _steps["calls"] += 1
        holds = self.both.reader.call(calls.holds, self.keys[number])
        if code is S.LLM_SUCCESS:
            assert self.is_linked and holds
            if met_a_fault:
                self.doubtful.add(number)       # perhaps its confirmation was lost
            elif not self._has_keys_soon(len(self.keys) - 1):
                self.doubtful.add(number)
            else:
                self._forget(number)
            return
        _steps["failed"] += 1
        if code is S.LLM_KV_CACHE_NOT_EXIST:
            assert number in self.doubtful
            self._forget(number)
            return
        assert code in LOST or (met_a_fault and code is S.LLM_FAILED), code
        self.both.reader.call(calls.fill)       # it is as undefined as it was told to be: nothing lands from here on
        if met_a_fault:
            self.doubtful.add(number)

    def _has_keys_soon(self, count: int) -> bool:
        return self.both.owner.settled()["keys"] - 1 == count

    @invariant()
    def counts_are_those_of_the_model(self) -> None:
        """Keys, caches, pins of both sides."""
        if not hasattr(self, "keys"):
            return
        found = self.both.owner.settled()
        sure = len(self.keys) - len(self.doubtful)
        assert found["pins"] == 0 and self.both.reader.stats()["pins"] == 0
        assert sure <= found["keys"] - 1 <= len(self.keys), (found["keys"], self.keys, self.doubtful)
        assert found["caches"] == found["keys"]
        assert self.both.reader.stats()["caches"] == 1

    def teardown(self) -> None:
        """Every key brings its bytes, whatever happened; then there is nothing left."""
        self.both.network.restore()
        self.both.link()
        for number, seed in list(self.keys.items()):
            self.both.reader.call(calls.fill)
            code = self.both.reader.call(calls.pull, number)
            assert code is S.LLM_SUCCESS or number in self.doubtful, code
            assert self.both.reader.call(calls.holds, seed if code is S.LLM_SUCCESS else None)
            self.both.owner.call(calls.withdraw, number)
        assert self.both.owner.settled()["keys"] == 1


@pytest.mark.timeout(max(300, STEPS))
def test_random_operations_and_faults():
    global _broken
    with Peers() as peers:
        _broken = Broken(peers, 1000, {})
        _broken.link()
        try:
            run_state_machine_as_test(Machine, settings=settings(
                max_examples=RUNS, stateful_step_count=PER_RUN, deadline=None, phases=[Phase.generate],
                report_multiple_bugs=False,
                derandomize=STEPS == 0, database=None,
                suppress_health_check=list(HealthCheck)))
        except BaseException:
            for process in (_broken.owner, _broken.reader):
                process.leftovers_allowed = True        # of a run that failed, which then is what is told
            raise
        _broken.close()
        _broken = None
    print(_steps)
    assert _steps["calls"] > RUNS and _steps["faults"] > RUNS

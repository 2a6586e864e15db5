"""A client that takes longer to create than a transfer may is made all the same, once, and the next transfer has it."""
import pytest
from cann import steps
from support.link_steps import links, until
from support.peer import engine_options
from support.strict import Strict

CREATE_MS, TIMEOUT_MS = 1500, 500
_kept = []


def slow_owner(machines, create_ms=CREATE_MS, **env):
    """A process that needs its client first to pull from the one that linked to it; and that one, with a cache."""
    here = machines.start(1, options=engine_options(timeout_ms=TIMEOUT_MS), LDD_STRICT_CREATE_MS=str(create_ms), **env)
    there = machines.start(2)
    machines.peers.link(there, here)
    there.call(steps.allocate, "source", 3, key=True)
    here.call(steps.allocate, "target", 0)
    return here, there


def pulled_at_last(node, cluster_id, name):
    """Pull until it is no timeout any more; how many there were, and what came then: an error, or the bytes."""
    for timeouts in range(20):
        code, _, text = steps.pull_error(node, cluster_id, name)
        if code != "LLM_TIMEOUT":
            return timeouts, code or steps.bytes_of(node, name)
        assert "it goes on, for the next transfer" in text
    return timeouts, code


def called(node, function):
    """The codes of the calls of a function, -1 for one that has not returned."""
    return [call.code for call in Strict().calls() if call.function == function]


def until_returned(node, function):
    """Wait until each call of a function has returned; their codes."""
    until(lambda: called(node, function) and -1 not in called(node, function), 20.0)
    return called(node, function)


def left(child):
    """What the stand-in of a process still counts, but for devices that callers have set."""
    return {name: count for name, count in child.call(steps.strict_live).items() if name != "devices" and count}


def test_the_transfer_after_one_that_timed_out_has_its_client(machines):
    here, there = slow_owner(machines)
    timeouts, found = here.call(pulled_at_last, 2, "target")
    assert timeouts >= 1 and found == {3}
    assert here.call(called, "HixlCSClientCreate") == [0]
    assert here.call(links) == [(2, "peer", "active")]
    assert there.stats()["pins"] == 0                   # each of them gave its lease back
    there.call(steps.deallocate, "source")
    here.call(steps.deallocate, "target")
    here.finalize()
    assert left(here) == {}


def test_memory_registered_late_is_known_to_the_client_made_for_it(machines):
    here, there = slow_owner(machines)
    assert here.call(pulled_at_last, 2, "target")[1] == {3}
    here.call(steps.register, "late", 0)
    there.call(steps.allocate, "source again", 5, key=True)
    timeouts, found = here.call(pulled_at_last, 2, "late")
    assert timeouts >= 1 and found == {5}
    assert here.call(called, "HixlCSClientCreate") == [0, 0]
    assert here.call(steps.strict_noted, "clients") == 1
    here.call(steps.unregister, "late")
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source", "source again")


def test_memory_the_peer_registered_meanwhile_is_asked_for(machines):
    here, there = slow_owner(machines)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    assert here.call(until_returned, "HixlCSClientConnect") == [0]
    there.call(steps.deallocate, "source")
    there.call(steps.register, "later", 9, key=True)
    assert here.call(pulled_at_last, 2, "target") == (0, {9})
    assert here.call(called, "HixlCSClientCreate") == [0]
    there.call(steps.unregister, "later")
    here.call(steps.deallocate, "target")


def test_memory_that_is_unregistered_meanwhile_never_reaches_the_client(machines):
    here, there = slow_owner(machines, create_ms=3000)
    here.call(steps.register, "passing", 0)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    here.call(steps.unregister, "passing")
    assert here.call(called, "HixlCSClientCreate") == [-1]      # nobody had to wait for it
    assert here.call(pulled_at_last, 2, "target")[1] == {3}
    assert here.call(called, "HixlCSClientCreate") == [0]
    assert len(here.call(called, "HixlCSClientRegMem")) == 1    # the pool
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")


def test_memory_that_is_unregistered_while_the_client_learns_of_it_is_forgotten(machines):
    here, there = slow_owner(machines, create_ms=0, LDD_STRICT_REGISTER_MS="900")
    here.call(steps.register, "passing", 0)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    here.call(steps.unregister, "passing")
    registered, forgotten = (here.call(called, f"HixlCSClient{what}Mem") for what in ("Reg", "Unreg"))
    assert here.call(links) == [(2, "peer", "active")] and -1 not in registered
    assert (len(registered), forgotten) in ((2, [0]), (1, []))
    assert here.call(pulled_at_last, 2, "target")[1] == {3}
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")


def unlinked_by_the_peer(machines, here, there):
    machines.peers.unlink(there, here)


def unlinked_by_force(machines, here, there):
    machines.peers.unlink(there, here, force=True)


def unlinked_here(machines, here, there):
    machines.peers.unlink(here, there)


def killed(machines, here, there):
    there.kill()


@pytest.mark.parametrize("end", [unlinked_by_the_peer, unlinked_by_force, unlinked_here, killed])
def test_a_link_that_ends_meanwhile_leaves_no_client(machines, end):
    here, there = slow_owner(machines, create_ms=3000)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    if end is not killed:
        there.call(steps.deallocate, "source")
    end(machines, here, there)
    assert here.call(called, "HixlCSClientCreate") == [-1]
    assert here.call(until_returned, "HixlCSClientCreate") == [0]
    assert here.call(steps.until_no_clients) == 0
    assert here.call(called, "HixlCSClientConnect") == []
    here.call(steps.deallocate, "target")
    here.finalize()
    assert left(here) == {}


def test_a_link_that_ends_before_its_client_is_taken_leaves_none(machines):
    here, there = slow_owner(machines)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    assert here.call(until_returned, "HixlCSClientConnect") == [0]
    machines.peers.unlink(there, here)
    assert here.call(steps.until_no_clients) == 0
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")
    here.finalize()
    assert left(here) == {}


@pytest.mark.parametrize("taken", ["making", "made"])
def test_finalize_waits_for_a_client_nobody_took(machines, taken):
    here, there = slow_owner(machines)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    if taken == "made":
        assert here.call(until_returned, "HixlCSClientConnect") == [0]
    here.call(steps.deallocate, "target")
    here.finalize()
    assert here.call(called, "HixlCSClientCreate") == [0]
    assert left(here) == {}
    there.call(steps.deallocate, "source")


def keep_a_push(node, cluster_id, name):
    """Begin a push by layers, and never end it."""
    from llm_datadist.core.engine.layer_push import LayerPush
    _kept.append(LayerPush(node.dist._require_engine(), cluster_id, node.kept[name][0].cache_id))


def test_a_push_that_outlives_its_engine_keeps_no_client_that_nobody_took(machines):
    here, there = slow_owner(machines)
    here.call(keep_a_push, 2, "target")
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    assert here.call(until_returned, "HixlCSClientConnect") == [0]
    there.call(steps.deallocate, "source")
    here.finalize()
    assert here.call(steps.strict_noted, "clients") == 0


def test_finalize_does_not_wait_longer_than_it_may(machines):
    here, there = slow_owner(machines, create_ms=9000)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    here.call(steps.deallocate, "target")
    here.finalize()
    assert here.call(called, "HixlCSClientCreate") == [-1]
    assert here.call(until_returned, "HixlCSClientCreate") == [0]
    assert here.call(steps.until_no_clients) == 0
    there.call(steps.deallocate, "source")


def test_a_creation_that_fails_meanwhile_is_told_to_the_next_transfer(machines):
    here, there = slow_owner(machines)
    here.call(steps.fail, "HixlCSClientConnect", 1, 207018)
    assert here.call(steps.pull_error, 2, "target")[0] == "LLM_TIMEOUT"
    assert here.call(until_returned, "HixlCSClientConnect") == [207018]
    assert here.call(steps.pull_error, 2, "target")[:2] == ("LLM_OUT_OF_MEMORY", 207018)
    assert here.call(steps.strict_noted, "clients") == 0
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")

"""Calls of CANN's that take long hold up nobody but who waits for them, and end before their engine does."""
import threading

import pytest
from cann import steps
from support.link_steps import fetch, link, offer, until, withdraw
from support.peer import engine_options
from support.strict import Strict

ASKED = {"LLM_DATADIST_SHARED_TABLE": "0"}      # every pull asks the owner's service thread
_kept = []


def left(child):
    """What the stand-in of a process still counts, but for devices that callers have set."""
    return {name: count for name, count in child.call(steps.strict_live).items() if name != "devices" and count}


def ended_by_its_peer(machines):
    """An owner that had a client to a peer, which then unlinked; and another peer, linked."""
    owner = machines.start(1, LDD_STRICT_DESTROY_MS="4000", **ASKED)
    leaving, staying = (machines.start(number, options=engine_options(timeout_ms=1500), **ASKED) for number in (2, 3))
    source = owner.call(steps.allocate, "source", 7)
    leaving.call(offer)
    staying.call(steps.allocate, "target", 0)
    for peer in (leaving, staying):
        machines.peers.link(peer, owner)
    assert owner.call(fetch, 2)
    assert staying.call(steps.pull, 1, "target", source) == {7}
    leaving.call(withdraw)
    machines.peers.unlink(leaving, owner)
    return owner, staying, source


def test_the_end_of_a_client_holds_up_no_other_peer(machines):
    owner, staying, source = ended_by_its_peer(machines)
    assert staying.call(steps.pull, 1, "target", source) == {7}
    assert owner.call(steps.strict_noted, "clients") == 1       # its end takes longer than that
    assert owner.call(steps.until_no_clients) == 0
    owner.call(steps.deallocate, "source")
    staying.call(steps.deallocate, "target")


def test_finalize_waits_for_the_end_of_a_client(machines):
    owner, staying, _ = ended_by_its_peer(machines)
    owner.call(steps.deallocate, "source")
    owner.finalize()
    assert left(owner) == {}
    staying.call(steps.deallocate, "target")


def pull_while_another_client_registers(node, others, source):
    """Link to the second while pulling from the first; the bytes, and whether the registration had returned by then."""
    (first, _), second = others
    calls = Strict().calls
    linking = threading.Thread(target=link, args=(node, second))
    linking.start()
    try:
        assert until(lambda: any(call.function == "HixlCSClientRegMem" and call.code == -1 for call in calls()))
        found = steps.pull(node, first, "target", source)
        return found, any(call.function == "HixlCSClientRegMem" and call.code == -1 for call in calls())
    finally:
        linking.join()


def test_memory_that_is_slow_to_register_holds_up_no_other_link(machines):
    here = machines.start(9, strange=False, LDD_STRICT_REGISTER_MS="3000", **ASKED)
    others = [machines.start(number, **ASKED) for number in (1, 2)]
    source = others[0].call(steps.allocate, "source", 7)
    here.call(steps.allocate, "target", 0)
    machines.peers.link(here, others[0])
    found, is_going_on = here.call(
        pull_while_another_client_registers, [(other.cluster_id, other.address) for other in others], source)
    assert found == {7} and is_going_on
    others[0].call(steps.deallocate, "source")
    here.call(steps.deallocate, "target")


def test_a_slow_server_creation_does_not_outlive_the_deadline_of_its_link(machines):
    here = machines.start(2, options=engine_options(listen=False), LDD_STRICT_SERVER_MS="1500")
    there = machines.start(1)
    code, log = here.call(steps.link_error, 1, there.address, 300)
    assert code in ("LLM_TIMEOUT", "LLM_LINK_FAILED") and "creating the data server" in log
    assert here.call(steps.strict_noted, "servers") == 0
    machines.peers.link(here, there)
    there.call(offer)
    assert here.call(fetch, 1)
    assert here.call(steps.strict_noted, "servers") == 1
    there.call(withdraw)


def pull_late(node, cluster_id, name):
    """Pull what comes late; the code of the error, and how many batches had been moved when it was raised."""
    return steps.pull_error(node, cluster_id, name)[0], Strict().noted("moved")


def test_a_late_batch_does_not_hold_up_the_error(machines):
    here = machines.start(2, options=engine_options(timeout_ms=300), LDD_STRICT_LATE_MS="1900")
    there = machines.start(1)
    machines.peers.link(here, there)
    there.call(steps.allocate, "source", 3, key=True)
    here.call(steps.allocate, "target", 0)
    assert here.call(pull_late, 1, "target") == ("LLM_TIMEOUT", 0)
    here.call(steps.deallocate, "target")
    assert here.call(steps.until_unpinned) == 0
    there.call(steps.deallocate, "source")


def keep_a_push(node, cluster_id, name):
    """Begin a push by layers, and never end it."""
    from llm_datadist.core.engine.layer_push import LayerPush
    _kept.append(LayerPush(node.dist._require_engine(), cluster_id, node.kept[name][0].cache_id))


@pytest.mark.parametrize("unlinked_before", [False, True])
def test_a_push_that_outlives_its_engine_keeps_no_client(machines, unlinked_before):
    here, there = machines.pair(options=engine_options(timeout_ms=500))
    here.call(steps.allocate, "source", 7)
    here.call(keep_a_push, 1, "source")
    if unlinked_before:
        machines.peers.unlink(here, there)
    here.finalize()
    assert here.call(steps.strict_noted, "clients") == 0

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


def at(child, ip):
    """Where a process that listens at the wildcard address is reached by this one."""
    return ip, child.address[1]


def wildcard(machines, cluster_id, resources="", timeout_ms=10000, **env):
    """A process that makes its servers when peers come."""
    options = engine_options(timeout_ms=timeout_ms, llm_listenIpInfo="0.0.0.0:0", llm_GlobalResourceConfig=resources)
    return machines.start(cluster_id, options=options, LLM_DATADIST_OPEN="1", **env)


def linked_by(machines, here, there, ip, timeout_ms=10000):
    code, log = here.call(steps.link_error, there.cluster_id, at(there, ip), timeout_ms)
    return code if code == "LLM_SUCCESS" else log


def server_calls(node):
    return [call.code for call in Strict().calls() if call.function == "HixlCSServerCreate"]


def until_server_calls(node, *codes):
    return until(lambda: server_calls(node) == list(codes), 20.0)


def test_a_server_that_is_slow_to_be_made_holds_up_no_other_peer(machines):
    env = {**ASKED, "LLM_DATADIST_SECRET": "known-to-all-of-these"}
    owner = wildcard(machines, 1, LDD_STRICT_SERVER_MS="3000", **env)
    near, far, late = (machines.start(number, **env) for number in (2, 3, 4))
    source = owner.call(steps.allocate, "source", 7)
    near.call(steps.allocate, "target", 0)
    assert linked_by(machines, near, owner, "127.0.0.1") == "LLM_SUCCESS"
    coming = [threading.Thread(target=lambda peer=peer: results.append(linked_by(machines, peer, owner, "127.0.0.2")))
              for peer in (far, late)]
    results = []
    for thread in coming:
        thread.start()
    assert owner.call(until_server_calls, 0, -1)
    assert near.call(steps.pull, 1, "target", source) == {7}
    assert owner.call(server_calls) == [0, -1]                  # it is made still
    for thread in coming:
        thread.join()
    assert results == ["LLM_SUCCESS", "LLM_SUCCESS"]
    assert owner.call(server_calls) == [0, 0]                   # both had the one
    far.call(steps.allocate, "target", 0)
    assert far.call(steps.pull, 1, "target", source) == {7}
    for peer in (near, far):
        peer.call(steps.deallocate, "target")
    owner.call(steps.deallocate, "source")


def test_a_server_nobody_waits_for_any_more_is_there_for_the_next_try(machines):
    owner = wildcard(machines, 1, LDD_STRICT_SERVER_MS="1500")
    peer = machines.start(2)
    assert "127.0.0.1" in linked_by(machines, peer, owner, "127.0.0.1", timeout_ms=300)
    assert owner.call(until_server_calls, 0)
    assert linked_by(machines, peer, owner, "127.0.0.1") == "LLM_SUCCESS"
    assert owner.call(server_calls) == [0]


def test_why_there_is_no_server_is_told_and_it_is_tried_again(machines):
    owner = wildcard(machines, 1, LDD_STRICT_FAIL="HixlCSServerCreate:1:207005")
    peer = machines.start(2)
    assert "create a data server: HIXL status 207005" in linked_by(machines, peer, owner, "127.0.0.1")
    assert linked_by(machines, peer, owner, "127.0.0.1") == "LLM_SUCCESS"


def test_finalize_waits_for_a_server_that_is_made(machines):
    owner = wildcard(machines, 1, LDD_STRICT_SERVER_MS="1500")
    peer = machines.start(2)
    coming = threading.Thread(target=linked_by, args=(machines, peer, owner, "127.0.0.1"))
    coming.start()
    assert owner.call(until_server_calls, -1)
    owner.finalize()
    assert owner.call(server_calls) == [0]
    assert left(owner) == {}
    coming.join()


def test_finalize_waits_for_a_server_no_longer_than_it_may(machines):
    owner = wildcard(machines, 1, timeout_ms=500, LDD_STRICT_SERVER_MS="8000")
    peer = machines.start(2)
    coming = threading.Thread(target=linked_by, args=(machines, peer, owner, "127.0.0.1"))
    coming.start()
    assert owner.call(until_server_calls, -1)
    owner.finalize()
    assert owner.call(server_calls) == [-1]
    coming.join()
    assert owner.call(until_server_calls, 0)


def test_one_listen_port_is_for_one_local_address(machines):
    config = '{"comm_resource_config.listen_port": 16666}'
    owner = wildcard(machines, 1, config)
    near, far = (machines.start(number) for number in (2, 3))
    owner.call(offer)
    assert linked_by(machines, near, owner, "127.0.0.1") == "LLM_SUCCESS"
    log = linked_by(machines, far, owner, "127.0.0.2")
    assert "no data server at 127.0.0.2: there is one at 127.0.0.1, and the listen_port of" in log
    assert near.call(fetch, 1)
    assert linked_by(machines, far, owner, "127.0.0.1") == "LLM_SUCCESS"
    owner.call(withdraw)

"""Every call the core makes is made to fail in turn: the documented exception, nothing left, and the next try works."""
from collections import Counter

import pytest
from cann import steps
from support.link_steps import cluster
from support.peer import engine_options
from support.strict import Strict, comm_res

from llm_datadist import LLMException, LLMRole, LLMStatusCode

# Codes that CANN documents for a group of calls.
RUNTIME_CODES = (107000, 107002, 207001, 507000, 507899)
HIXL_CODES = (103900, 103901, 203900, 503900, 107002, 507046, 507053, 507057)
# Making one of these brings something into the world, and ending it takes it out again.
PAIRS = {"aclrtSetDevice": "aclrtResetDevice", "aclrtCreateContext": "aclrtDestroyContext",
         "aclrtCreateStream": "aclrtDestroyStream", "aclrtMalloc": "aclrtFree", "aclrtMallocHost": "aclrtFreeHost",
         "HixlCSServerCreate": "HixlCSServerDestroy", "HixlCSClientCreate": "HixlCSClientDestroy"}
TRIED_AGAIN = {"HixlCSServerListen"}     # at another port
# What the core has no use for an answer of: it only looks around, or cleans up.
UNANSWERED = {"aclrtGetCurrentContext", "aclrtSetCurrentContext", "aclrtGetDeviceInfo", "aclrtGetDevice",
              "aclrtGetVersion", "aclrtPointerGetAttributes",
              "HixlCSServerUnregMem", "HixlCSClientUnregMem", *PAIRS.values()}


def life(node, peer):
    """The life of an engine with all that it may do; the bytes it saw. Raises whatever any step raises."""
    address, cache_id = peer
    options = engine_options(host_pool=1 << 20, device_pool=1 << 20, remote_accessible=True, timeout_ms=3000)
    options["llm.LocalCommRes"] = comm_res("device-hccs")
    node.start(2, options, LLMRole.MIX)
    try:
        overall, _ = node.dist.link_clusters([cluster(1, address)], 3000)
        if overall is not LLMStatusCode.LLM_SUCCESS:
            raise LLMException("link_clusters", status_code=overall)
        steps.allocate(node, "target", 0)
        steps.allocate(node, "copy", 0)
        steps.pull(node, 1, "target", cache_id)
        steps.register(node, "registered", 0)
        node.cache_manager.copy_cache(node.kept["copy"][0], node.kept["target"][0])
        found = steps.bytes_of(node, "copy")
        found |= steps.pull(node, 1, "registered", cache_id)
        steps.unregister(node, "registered")
        node.dist.unlink_clusters([cluster(1)], 3000)
        return sorted(found)
    finally:
        node.finalize()


def one_failure(node, peer, function, nth, code):
    """One life in which a call fails: the name of the exception's code, or the bytes; and what is left."""
    strict = Strict()
    strict.forget()
    strict.fail(function, nth, code)
    try:
        outcome = life(node, peer)
    except LLMException as error:
        outcome = error.status_code.name
    finally:
        strict.fail("", 0, 0)
    return outcome, {name: count for name, count in strict.live().items() if count}


def functions_of_a_life(node, peer):
    """How often each function is called in a life, and which were not undone."""
    strict = Strict()
    strict.forget()
    assert life(node, peer) == [7]
    calls = strict.calls()
    made = Counter(call.function for call in calls if call.code == 0)
    return made, [name for name, end in PAIRS.items() if made[name] != made[end]]


@pytest.fixture(scope="module")
def ends(toolkit, module_peers):
    from cann.conftest import Machines
    machines = Machines(module_peers, toolkit)
    there = machines.start(1, options=engine_options(remote_accessible=True))
    here = module_peers.child(machines.env(strange=False))
    yield here, (there.address, there.call(steps.allocate, "source", 7))
    there.call(steps.deallocate, "source")


def test_whatever_is_made_is_undone_and_calls_come_in_order(ends):
    here, peer = ends
    made, unbalanced = here.call(functions_of_a_life, peer)
    assert unbalanced == []
    assert {"HixlCSServerRegMem", "HixlCSClientConnect", "HixlCSClientBatchGetAsync", "aclrtMemcpy"} <= set(made)
    calls = here.call(order_of_a_life, peer)
    for first, second in (("aclInit", "aclrtSetDevice"), ("aclrtSetDevice", "aclrtCreateContext"),
                          ("aclrtCreateContext", "HixlCSServerCreate"), ("HixlCSServerCreate", "HixlCSServerRegMem"),
                          ("HixlCSServerRegMem", "HixlCSServerListen"), ("HixlCSClientCreate", "HixlCSClientRegMem"),
                          ("HixlCSClientRegMem", "HixlCSClientConnect"),
                          ("HixlCSClientConnect", "HixlCSClientBatchGetAsync")):
        assert calls.index(first) < calls.index(second), (first, second)
    last = [len(calls) - 1 - calls[::-1].index(name) for name in (
        "HixlCSClientDestroy", "HixlCSServerDestroy", "aclrtFree", "aclrtDestroyStream", "aclrtDestroyContext",
        "aclrtResetDevice")]
    assert last == sorted(last)


def order_of_a_life(node, peer):
    strict = Strict()
    strict.forget()
    assert life(node, peer) == [7]
    return [call.function for call in strict.calls()]


def check(here, peer, function, nth, code):
    outcome, left = here.call(one_failure, peer, function, nth, code)
    assert left == {}, (function, nth, code, outcome)
    if outcome != [7]:
        assert outcome in LLMStatusCode.__members__, (function, nth, code, outcome)
        assert function not in UNANSWERED, (function, nth, code, outcome)
    return outcome


def test_each_call_fails_once(ends):
    here, peer = ends
    made, _ = here.call(functions_of_a_life, peer)
    failed = Counter()
    for function, count in made.items():
        if function in ("aclrtGetCurrentContext", "aclrtSetCurrentContext", "HixlCSClientQueryCompleteStatus"):
            count = min(count, 3)               # dozens of times, all alike
        for nth in range(1, count + 1):
            failed[function] += check(here, peer, function, nth, 507000) != [7]
    answered = set(made) - UNANSWERED - TRIED_AGAIN
    assert {function for function in answered if not failed[function]} == set()
    assert here.call(life, peer) == [7]


@pytest.mark.parametrize("code", sorted({*RUNTIME_CODES, *HIXL_CODES}))
def test_each_function_fails_with_each_code(ends, code):
    here, peer = ends
    made, _ = here.call(functions_of_a_life, peer)
    for function in made:
        if code in (HIXL_CODES if function.startswith("Hixl") else RUNTIME_CODES):
            check(here, peer, function, 1, code)
    assert here.call(life, peer) == [7]

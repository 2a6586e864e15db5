"""The two-process fixture itself: results, failures, hangs and deaths come back as they should."""
import os
import signal
import time

import pytest
from support import peer

from llm_datadist import CacheDesc, CacheKey, DataType, LLMException, LLMStatusCode
from llm_datadist.status import LLMParamInvalidError


def echo(node, *args, **kwargs):
    return os.getpid(), args, kwargs


def refuse(node):
    raise LLMParamInvalidError("block 7 is not allowed")


def refuse_strangely(node):
    raise OSError(lambda: None)


def die(node):
    os.write(2, b"farewell\n")
    os._exit(3)


def hang(node):
    time.sleep(600)


def allocate(node):
    node.kept["cache"] = node.cache_manager.allocate_cache(CacheDesc(2, [2, 16], DataType.DT_UINT8), [CacheKey(1, 7)])


def free(node):
    node.cache_manager.deallocate_cache(node.kept["cache"])
    node.cache_manager.remove_cache_key(CacheKey(1, 7))


def test_call_runs_in_the_child(peers):
    child = peers.child()
    assert child.call(echo, 1, two=[2]) == (child.pid, (1,), {"two": [2]})
    assert child.pid != os.getpid()


def test_begin_returns_before_the_result(peers):
    first, second = peers.child(), peers.child()
    pending = [first.begin(echo), second.begin(echo)]
    assert [finish()[0] for finish in pending] == [first.pid, second.pid]


def test_exception_keeps_class_code_and_traceback(peers):
    child = peers.child()
    with pytest.raises(LLMException) as caught:
        child.call(refuse)
    assert isinstance(caught.value, LLMParamInvalidError)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert "in refuse" in str(caught.value.__cause__)
    assert child.call(echo)[0] == child.pid


def test_exception_that_cannot_be_pickled(peers):
    with pytest.raises(peer.PeerError, match="OSError"):
        peers.child().call(refuse_strangely)


def test_death_tells_code_and_output(peers):
    child = peers.child()
    with pytest.raises(peer.PeerError, match=r"with 3\nfarewell"):
        child.call(die)
    assert not child.is_running


def test_hang_ends_with_the_stacks(peers):
    child = peers.child()
    child.call(echo)                                            # this module has been imported there
    with pytest.raises(peer.PeerError, match=r"(?s)within 0.5 s.*in hang"):
        child.call(hang, limit_s=0.5)
    assert not child.is_running


def test_kill(peers):
    child = peers.start(1)
    child.kill()
    assert not child.is_running
    with pytest.raises(peer.PeerError, match="was ended before"):
        child.call(echo)


def test_engine_in_both_processes(peers):
    owner, here = peers.start(1), peers.here(2)
    peers.link(here, owner)
    assert owner.stats()["links"] == here.stats()["links"] == 1
    assert owner.address[1] > 0


def test_close_ends_an_idle_child_that_nobody_asked():
    with peer.Peers() as group:
        child = group.start(1)
        pid = child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_close_reports_what_is_left():
    group = peer.Peers()
    child = group.start(1)
    child.call(allocate)
    with pytest.raises(AssertionError, match="cluster 1 still holds 1 caches, 1 keys, 8192 bytes of device_pool"):
        group.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_close_accepts_what_is_allowed_to_be_left(peers):
    child = peers.start(1)
    child.call(allocate)
    child.leftovers_allowed = True


def test_close_accepts_what_was_freed(peers):
    child = peers.start(1)
    child.call(allocate)
    child.call(free)


def test_close_reports_a_child_that_crashed():
    group = peer.Peers()
    child = group.start(1)
    child.signal(signal.SIGKILL)
    with pytest.raises(AssertionError, match=r"ended .*with -9"):
        group.close()


def test_close_ends_children_also_when_a_call_was_begun():
    with peer.Peers() as group:
        child = group.child()
        child.begin(echo)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)

"""Other ends of a layer-wise transfer than waiting for it: cancel, callbacks, a descriptor to select on, and await."""
import asyncio
import os
import select
import threading

import pytest
from support.link_steps import until
from transfers.refusal import NOT_EXIST
from transfers.tasks import DST, LAYERS, SRC, Gate, Recorder, layer, sent, transfer_through

from llm_datadist import CacheKeyByIdAndIndex, LLMException, LLMStatusCode, TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.managers import task as task_module

SUCCESS, FAILED = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_FAILED


def idle():
    """Whether every worker has come back from its job."""
    return task_module._workers._num_free == task_module._workers._num_threads


@pytest.fixture
def held_back(mode_pair, scene):
    """A transfer that waits at layer 1, its gate, and the models of both caches."""
    _, source = scene.make(mode_pair.here, "src", SRC)
    made, target = scene.make(mode_pair.there, "dst", DST)
    gate = Gate(1)
    configs = [TransferConfig(mode_pair.there.cluster_id, made.addrs),
               TransferConfig(mode_pair.there.cluster_id, layer(made.addrs, 0, 1), range(1))]
    task = mode_pair.here.call(transfer_through, gate, "src", configs)
    yield task, gate, source, target
    gate.open.set()
    task.synchronize()


def test_cancel(held_back, mode_pair, scene):
    """What was sent stays; nothing follows, also when the synchroniser answers later; the lease is given back."""
    task, gate, source, target = held_back
    assert not task.done() and task.progress == [(1, LAYERS), (1, 1)]
    assert task.cancel()
    assert task.done() and task.cancelled() and not task.cancel()
    assert mode_pair.there.stats()["pins"] == 0
    assert task.get_results(0) == [FAILED, SUCCESS] and task.synchronize(0) is FAILED
    assert task.failed_layers() == [range(1, LAYERS), None]
    error = task.exception(0)
    assert isinstance(error, LLMException) and error.recoverable and "cancelled" in str(error)
    gate.open.set()
    assert until(idle)
    sent(target, source, range(1))
    scene.check()


def test_cancel_from_within_the_synchroniser(mode_pair, scene):
    scene.make(mode_pair.here, "src", SRC)
    made, _ = scene.make(mode_pair.there, "dst", DST)
    begun, tasks = threading.Event(), []

    class Quitter(Recorder):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            assert begun.wait(30)
            return tasks[0].cancel()

    manager = mode_pair.here.node.cache_manager
    tasks.append(manager.transfer_cache_async(mode_pair.here.node.kept["src"].cache, Quitter(),
                                              [TransferConfig(mode_pair.there.cluster_id, made.addrs)]))
    begun.set()
    assert tasks[0].synchronize(30000) is FAILED and tasks[0].cancelled()
    assert until(idle)
    scene.check()


def test_cancel_of_what_has_ended(held_back):
    task, gate, _, _ = held_back
    gate.open.set()
    assert task.synchronize(30000) is SUCCESS
    assert not task.cancel() and not task.cancelled() and task.get_results() == [SUCCESS, SUCCESS]
    assert task.progress == [(LAYERS, LAYERS), (1, 1)] and task.failed_layers() == [None, None]


def test_callbacks(held_back):
    task, gate, _, _ = held_back
    called, all_called = [], threading.Event()

    def fail(_):
        raise ArithmeticError("logged, and nothing else")

    task.add_done_callback(lambda ended: called.append(ended is task and ended.done()))
    task.add_done_callback(fail)
    task.add_done_callback(lambda _: all_called.set())
    assert called == []
    gate.open.set()
    assert all_called.wait(30) and called == [True]
    task.add_done_callback(lambda _: called.append("at once"))
    assert called == [True, "at once"]


def test_a_descriptor_to_select_on(held_back):
    task, gate, _, _ = held_back
    fd = task.fileno()
    assert task.fileno() == fd and select.select([task], [], [], 0)[0] == []
    gate.open.set()
    assert select.select([task], [], [], 30)[0] == [task]
    assert task.done() and select.select([fd], [], [], 0)[0] == [fd]
    before = len(os.listdir("/proc/self/fd"))
    del task
    held_back = None
    assert len(os.listdir("/proc/self/fd")) <= before


def test_await(held_back):
    task, gate, _, _ = held_back

    async def opened():
        waiting = asyncio.ensure_future(_result(task))
        done, _ = await asyncio.wait([waiting], timeout=0.01)
        assert not done
        gate.open.set()
        return await waiting, await task

    assert asyncio.run(opened()) == (SUCCESS, SUCCESS)


async def _result(task):
    return await task


def test_a_waiter_that_gives_up_leaves_the_transfer_alone(held_back):
    task, gate, _, _ = held_back

    async def give_up():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_result(task), 0.01)

    asyncio.run(give_up())
    gate.open.set()
    assert task.synchronize(30000) is SUCCESS


def test_the_exception_says_what_is_missing(mode_pair, scene):
    """Layers and blocks of the destination, the peer, and how far it had come."""
    if not mode_pair.remote_accessible:
        pytest.skip("configs with a key need remote-accessible mode")
    scene.make(mode_pair.here, "src", SRC)
    key = CacheKeyByIdAndIndex(mode_pair.there.cluster_id, 10**6)
    task = mode_pair.here.node.cache_manager.transfer_cache_async(
        mode_pair.here.node.kept["src"].cache, Recorder(), [TransferWithCacheKeyConfig(key, range(1, 3), range(2))])
    assert task.synchronize(30000) is NOT_EXIST
    error = task.exception()
    assert (error.peer, error.stage, error.failed_layers) == (mode_pair.there.cluster_id, "resolve", range(2))
    assert task.failed_layers() == [range(1, 3)]

"""Waits for layer-wise transfers, and transfers that outlive their task, their source or their destination."""
import gc
import threading
import time
import weakref

import pytest
from support import reference
from transfers.caches import Named, deallocate, invoke
from transfers.refusal import INVALID, NOT_EXIST
from transfers.tasks import DST, LAYERS, SRC, STRIDE, Gate, Recorder, layer, sent, transfer, transfer_through

from llm_datadist import LLMStatusCode, TransferConfig
from llm_datadist.status import LLMNotFoundError

SUCCESS, TIMEOUT = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_TIMEOUT


# ---------------------------------------------------------------------------------------------------------- waiting

def test_waits_that_run_out(mode_pair, scene):
    """They say so and change nothing; the transfer goes on and ends well."""
    pair = mode_pair
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST)
    gate = Gate(1)
    configs = [TransferConfig(pair.there.cluster_id, layer(made.addrs, 0, 1), range(1)),
               TransferConfig(pair.there.cluster_id, layer(made.addrs, 1, 3), range(1, 3))]
    task = pair.here.call(transfer_through, gate, "src", configs)
    try:
        for timeout in (0, 1):
            assert task.synchronize(timeout) is TIMEOUT
            assert task.get_results(timeout) == [TIMEOUT, TIMEOUT]
            assert task.exception(timeout) is None
        sent(target, source, range(1))
        scene.check()
    finally:
        gate.open.set()
    for _ in range(2):
        assert task.synchronize(30000) is SUCCESS
        assert task.get_results(0) == [SUCCESS, SUCCESS]
    assert task.exception() is None
    sent(target, source, range(LAYERS))
    scene.check()


@pytest.mark.parametrize("timeout, error", [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), ("1", TypeError)])
def test_waits_of_no_uint32(mode_pair, scene, timeout, error):
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    task = pair.here.call(invoke, "transfer_cache_async", Named("src"), Recorder(),
                          [TransferConfig(pair.there.cluster_id, made.addrs)])
    for wait in (task.synchronize, task.get_results, task.exception):
        with pytest.raises(error):
            wait(timeout)
    assert task.synchronize(2**32 - 1) is SUCCESS


def test_results_are_the_callers_own(mode_pair, scene):
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    task = pair.here.call(invoke, "transfer_cache_async", Named("src"), Recorder(),
                          [TransferConfig(pair.there.cluster_id, made.addrs)])
    task.get_results().clear()
    assert task.get_results() == [SUCCESS]


# --------------------------------------------------------------------------------------------- what goes meanwhile

def finish(pair, gate, done):
    """Open the gate and wait until both sides have let go."""
    gate.open.set()
    deadline = time.monotonic() + 30
    while not done() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert done()


def unpinned(pair):
    return pair.here.stats()["pins"] == pair.there.stats()["pins"] == 0


def test_task_is_dropped_mid_flight(mode_pair, scene):
    """The transfer goes on without it, and keeps what it needs: here also the synchroniser and the configs."""
    pair = mode_pair
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST)
    gate = Gate(1)
    task = pair.here.call(transfer_through, gate, "src", [TransferConfig(pair.there.cluster_id, made.addrs)])
    assert pair.here.stats()["pins"] == 1 and pair.there.stats()["pins"] >= 1
    gone = weakref.ref(task)
    del task
    gc.collect()
    assert gone() is None
    finish(pair, gate, lambda: unpinned(pair))
    sent(target, source, range(LAYERS))
    scene.check()


def test_source_is_deallocated_mid_flight(mode_pair, scene):
    """Its memory stays until the transfer has ended."""
    pair = mode_pair
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST)
    gate = Gate(1)
    task = pair.here.call(transfer_through, gate, "src", [TransferConfig(pair.there.cluster_id, made.addrs)])
    used = pair.here.stats()["device_pool"]["free_bytes"]
    pair.here.call(deallocate_only, "src")
    assert pair.here.stats()["device_pool"]["free_bytes"] == used
    with pytest.raises(LLMNotFoundError):
        pair.here.call(invoke, "copy_cache", Named("src"), Named("src"))
    gate.open.set()
    assert task.synchronize(30000) is SUCCESS
    assert pair.here.stats()["device_pool"]["free_bytes"] > used
    sent(target, source, range(LAYERS))
    scene.lose("src")
    scene.check()


def test_destination_is_deallocated_mid_flight(mode_pair, scene):
    """What has begun may go on: the peer keeps the memory until it ends, and gives it to nobody."""
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    gate = Gate(1)
    config = [TransferConfig(pair.there.cluster_id, made.addrs)]
    task = pair.here.call(transfer_through, gate, "src", config)
    before = pair.there.stats()["device_pool"]["free_bytes"]
    pair.there.call(deallocate_only, "dst")
    assert pair.there.stats()["device_pool"]["free_bytes"] == before
    scene.lose("dst")
    scene.make(pair.there, "heir", DST)
    gate.open.set()
    assert task.synchronize(30000) is SUCCESS
    assert pair.there.stats()["device_pool"]["free_bytes"] != before
    scene.check()
    assert pair.here.call(transfer, "src", config).results == [INVALID]
    scene.check()


def deallocate_only(node, name):
    """Give up the handle alone; `drop` may follow."""
    held = node.kept[name]
    held.guards.clear()
    deallocate(node.cache_manager, held.cache)


def test_destination_is_deallocated_between_layers_of_two_tasks(mode_pair, scene):
    """A second transfer that begins after the deallocation finds nothing."""
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    config = [TransferConfig(pair.there.cluster_id, made.addrs)]
    gate = Gate(0)
    late = pair.here.call(transfer_through, gate, "src", config)
    scene.forget("dst")
    gate.open.set()
    assert late.get_results(30000) == [INVALID]


def test_many_transfers_at_once(mode_pair, scene):
    """More than there are workers, each to its own slot and each waiting for its turn at a gate."""
    pair, number = mode_pair, 40
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST._replace(num_slots=number))
    turn = threading.Event()

    class Together(Recorder):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return turn.wait(30)

    tasks = [pair.here.call(invoke, "transfer_cache_async", Named("src"), Together(),
                            [TransferConfig(pair.there.cluster_id, [addr + slot * STRIDE for addr in made.addrs], None,
                                            slot % 2)])
             for slot in range(number)]
    turn.set()
    assert [task.synchronize(30000) for task in tasks] == [SUCCESS] * number
    for slot in range(number):
        reference.copy_slot(target, slot, source, slot % 2, STRIDE)
    scene.check()


def test_source_is_gone(mode_pair, scene):
    pair = mode_pair
    made, _ = scene.make(pair.there, "dst", DST)
    scene.make(pair.here, "src", SRC)
    gate = Gate(0)
    late = pair.here.call(transfer_through, gate, "src", [TransferConfig(pair.there.cluster_id, made.addrs)])
    scene.forget("src")
    gate.open.set()
    assert late.get_results(30000) == [NOT_EXIST]

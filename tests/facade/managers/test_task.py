"""`CacheTask` and its jobs: when the synchroniser is asked, what each config reports, and how waits end.

The bytes of every shape of transfer are compared in ``transfers/``.
"""
import gc
import threading
import weakref

import numpy as np
import pytest
from support.engines import BYTES, NO_ID, SLOT_BYTES, SLOTS, Synchronizer
from support.peer import engine_options
from transfers.caches import Spec, bytes_at, contents, drop, make

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.managers.task import (
    MAX_WORKERS,
    CacheTask,
    TransferAsyncThread,
    TransferCacheJob,
    TransferCacheParameters,
    _Workers,
)

S = LLMStatusCode
HERE, THERE, NOWHERE = 1, 2, 77
LAYERS = 3
SPEC = Spec(2 * LAYERS, SLOTS, (SLOT_BYTES,))
NOT_UINT32 = [("1", "TE"), (1.0, "TE"), ([1], "TE"), (-1, "VE"), (2**32, "VE")]


class Pair:
    """This process and a linked one, each with a contiguous cache; `addrs` are those of the other's."""

    def __init__(self, module_peers):
        self.here = module_peers.here(HERE, engine_options())
        self.there = module_peers.start(THERE)
        module_peers.link(self.here, self.there)
        self.manager = self.here.node.cache_manager

    def __enter__(self):
        self.here.call(make, "src", SPEC)
        self.addrs = self.there.call(make, "dst", SPEC._replace(seed=1)).addrs
        self.source = self.here.node.kept["src"].cache
        return self

    def __exit__(self, *_):
        self.source = None
        self.here.call(drop, "src")
        self.there.call(drop, "dst")

    def config(self, layers=None, cluster_id=THERE, slot=0, to_layer=None):
        """A config that sends `layers` to slot 0 of the same layers, or from `to_layer` on."""
        covered = range(LAYERS) if layers is None else layers
        first = 2 * (covered.start if to_layer is None else to_layer)
        return TransferConfig(cluster_id, self.addrs[first:first + 2 * len(covered)], layers, slot)

    def start(self, configs, synchronizer=None, *args):
        return self.manager.transfer_cache_async(
            self.source, Synchronizer() if synchronizer is None else synchronizer, configs, *args)

    def arrived(self):
        """Which layers of slot 0 are now those of the source, slot 0."""
        mine, theirs = SPEC.fill(), self.there.call(contents, "dst")
        same = [theirs[i][:SLOT_BYTES] == mine[i][:SLOT_BYTES] for i in range(2 * LAYERS)]
        before = SPEC._replace(seed=1).fill()
        assert all(same[i] or theirs[i] == before[i] for i in range(2 * LAYERS))
        return [layer for layer in range(LAYERS) if same[2 * layer] and same[2 * layer + 1]]


@pytest.fixture(scope="module")
def linked(module_peers):
    return Pair(module_peers)


@pytest.fixture
def pair(linked):
    with linked:
        yield linked


# ------------------------------------------------------------------------------------- layers and the synchroniser

def test_every_layer_is_asked_for_once_in_order(pair):
    synchronizer = Synchronizer()
    task = pair.start([pair.config(), pair.config()], synchronizer)
    assert task.synchronize() is S.LLM_SUCCESS
    assert synchronizer.layers == [(0, None), (1, None), (2, None)]
    assert task.get_results() == [S.LLM_SUCCESS] * 2 and task.exception() is None
    assert pair.arrived() == [0, 1, 2]


@pytest.mark.parametrize("ranges, asked", [
    ([range(1, 2)], [1]), ([range(2, 3), range(1)], [0, 2]), ([range(2), range(1, 3)], [0, 1, 2]),
])
def test_only_layers_that_a_config_wants_are_asked_for(pair, ranges, asked):
    synchronizer = Synchronizer()
    task = pair.start([pair.config(layers) for layers in ranges], synchronizer)
    assert task.get_results() == [S.LLM_SUCCESS] * len(ranges)
    assert [layer for layer, _ in synchronizer.layers] == asked and pair.arrived() == asked


def test_nothing_is_sent_before_its_layer_is_complete(pair):
    seen = []

    class Watching(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            seen.append(pair.arrived())
            return True

    assert pair.start([pair.config()], Watching()).synchronize() is S.LLM_SUCCESS
    assert seen == [[], [0], [0, 1]]


@pytest.mark.parametrize("answer", [False, None, 0, ""])
def test_a_false_answer_ends_the_transfer(pair, answer):
    class Refusing(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            super().synchronize_layer(layer_index, timeout_in_millis)
            return True if layer_index == 0 else answer

    synchronizer = Refusing()
    configs = [pair.config(range(1)), pair.config(range(2)), pair.config(range(2, 3))]
    task = pair.start(configs, synchronizer)
    assert task.get_results() == [S.LLM_SUCCESS, S.LLM_PARAM_INVALID, None]
    assert task.synchronize() is S.LLM_PARAM_INVALID
    assert [layer for layer, _ in synchronizer.layers] == [0, 1] and pair.arrived() == [0]
    assert "layer 1" in str(task.exception())


def test_an_exception_of_the_synchroniser_reaches_the_caller(pair):
    class Failing(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            if layer_index == 1:
                raise KeyError("lost")
            return True

    task = pair.start([pair.config(range(1)), pair.config(), pair.config(range(2, 3))], Failing())
    assert task.synchronize() is S.LLM_FAILED
    assert task.get_results() == [S.LLM_SUCCESS, S.LLM_FAILED, None]
    assert isinstance(task.exception(), KeyError) and pair.arrived() == [0]
    assert pair.start([pair.config()]).synchronize() is S.LLM_SUCCESS           # the worker lives on


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_no_exception_ends_a_worker(pair, error):
    class Failing(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            raise error

    for _ in range(MAX_WORKERS + 1):
        assert pair.start([pair.config()], Failing()).synchronize() is S.LLM_FAILED
    assert pair.start([pair.config()]).synchronize() is S.LLM_SUCCESS


# ----------------------------------------------------------------------------------------------------- results

def test_a_failure_stops_what_comes_after_it(pair):
    configs = [pair.config(range(1)), pair.config(cluster_id=NOWHERE), pair.config()]
    task = pair.start(configs)
    assert task.get_results() == [S.LLM_SUCCESS, S.LLM_NOT_YET_LINK, None]
    assert task.synchronize() is S.LLM_NOT_YET_LINK
    assert task.exception().status_code is S.LLM_NOT_YET_LINK


def test_two_configs_for_one_cluster_report_for_themselves(pair):
    outside = TransferConfig(THERE, [16] * 2, range(1, 2))
    task = pair.start([pair.config(range(1)), outside, pair.config(range(2, 3))])
    assert task.get_results() == [S.LLM_SUCCESS, S.LLM_PARAM_INVALID, None]
    assert pair.arrived() == [0]


def test_results_may_be_asked_for_again_and_are_copies(pair):
    task = pair.start([pair.config()])
    for timeout in (None, 0, 5, 2**32 - 1):
        assert task.synchronize(timeout) in (S.LLM_SUCCESS, S.LLM_TIMEOUT)
        task.synchronize()
    results = task.get_results()
    results.clear()
    assert task.get_results() == [S.LLM_SUCCESS]


@pytest.mark.parametrize("method", ["synchronize", "get_results", "exception"])
@pytest.mark.parametrize("value, kind", NOT_UINT32)
def test_a_timeout_is_uint32(pair, assert_raises, method, value, kind):
    task = pair.start([pair.config()])
    assert_raises(kind, getattr(task, method), value)
    task.synchronize()


def test_a_wait_that_runs_out_says_so_and_the_transfer_goes_on(pair):
    event = threading.Event()

    class Blocked(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return event.wait(30)

    try:
        task = pair.start([pair.config(), pair.config()], Blocked())
        assert task.synchronize(0) is S.LLM_TIMEOUT and task.synchronize(timeout_in_millis=1) is S.LLM_TIMEOUT
        assert task.get_results(1) == [S.LLM_TIMEOUT] * 2 and task.exception(1) is None
    finally:
        event.set()
    assert task.synchronize() is S.LLM_SUCCESS and pair.arrived() == [0, 1, 2]


def test_many_transfers_at_once(pair):
    """More than there are workers: all are carried out, none waits for one that was started later."""
    gate = threading.Semaphore(0)

    class Gated(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return gate.acquire(timeout=30)

    tasks = [pair.start([pair.config(range(1))], Gated()) for _ in range(MAX_WORKERS + 8)]
    assert all(task.synchronize(0) is S.LLM_TIMEOUT for task in tasks)
    for _ in tasks:
        gate.release()
    assert [task.synchronize() for task in tasks] == [S.LLM_SUCCESS] * len(tasks)


def test_workers_are_kept_and_few(pair):
    def workers():
        return {thread.ident for thread in threading.enumerate() if thread.name.startswith("llm_datadist-transfer")}

    before = workers()
    for _ in range(20):
        assert pair.start([pair.config()]).synchronize() is S.LLM_SUCCESS
    assert len(workers()) <= MAX_WORKERS and len(workers() - before) <= 1


class Job:
    """What the workers need of a job."""

    def __init__(self, gate=None):
        self.gate = gate
        self.ended = threading.Event()

    def run(self):
        if self.gate is not None:
            self.gate.wait(30)
        self.ended.set()


def test_a_worker_is_started_only_where_none_is_idle():
    workers = _Workers()
    for _ in range(5):
        job = Job()
        workers.submit(job)
        assert job.ended.wait(30)
        while workers._num_free < 1:                        # it counts itself just after the job
            threading.Event().wait(0.001)
        assert (workers._num_threads, workers._num_free) == (1, 1)
    gate = threading.Event()
    try:
        jobs = [Job(gate) for _ in range(3)]
        for job in jobs:
            workers.submit(job)
        assert workers._num_threads == 3
    finally:
        gate.set()
    assert all(job.ended.wait(30) for job in jobs)


# ------------------------------------------------------------------------------------------- what a call captures

def test_configs_and_lists_may_be_changed_once_the_call_returned(pair):
    event = threading.Event()

    class Blocked(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return event.wait(30)

    configs = [pair.config()]
    addrs = list(configs[0].dst_addrs)
    configs[0].dst_addrs = addrs
    try:
        task = pair.start(configs, Blocked())
        assert configs[0].src_layer_range == range(LAYERS)
        configs[0].dst_cluster_id, configs[0].src_layer_range, configs[0].src_batch_index = NOWHERE, range(1), 9
        addrs[:] = [16] * len(addrs)
        configs.append(None)
    finally:
        event.set()
    assert task.get_results() == [S.LLM_SUCCESS] and pair.arrived() == [0, 1, 2]


def test_nothing_stays_pinned_after_success_or_failure(pair):
    for configs in ([pair.config()], [TransferConfig(THERE, [16] * 2 * LAYERS)], [pair.config(cluster_id=NOWHERE)],
                    [pair.config(slot=SLOTS)]):
        task = pair.start(configs)
        task.synchronize()
        assert pair.here.stats()["pins"] == pair.there.stats()["pins"] == 0
        assert task.exception() is None or task.get_results() != [S.LLM_SUCCESS]


def test_a_source_that_is_deallocated_meanwhile_keeps_its_bytes(pair):
    event = threading.Event()

    class Second(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return layer_index == 0 or event.wait(30)

    desc = CacheDesc(4, [1, SLOT_BYTES], BYTES)
    cache = pair.manager.allocate_cache(desc)
    for index, address in enumerate(cache.tensor_addrs):
        bytes_at(address, SLOT_BYTES)[:] = index + 1
    task = pair.manager.transfer_cache_async(cache, Second(), [TransferConfig(THERE, pair.addrs[:4])])
    try:
        while not any(tensor[:SLOT_BYTES] == b"\x01" * SLOT_BYTES for tensor in pair.there.call(contents, "dst")):
            assert task.synchronize(1) is S.LLM_TIMEOUT
        pair.manager.deallocate_cache(cache)
        other = pair.manager.allocate_cache(desc)           # the pages of the source are not given away
        for address in other.tensor_addrs:
            bytes_at(address, SLOT_BYTES)[:] = 0xEE
    finally:
        event.set()
    assert task.synchronize() is S.LLM_SUCCESS
    assert [tensor[0] for tensor in pair.there.call(contents, "dst")[:4]] == [1, 2, 3, 4]
    pair.manager.deallocate_cache(other)


def test_a_source_that_is_gone_before_the_transfer_starts(pair):
    cache = pair.manager.allocate_cache(SPEC.desc)
    gate = threading.Event()

    class Blocked(Synchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return gate.wait(30)

    task = pair.manager.transfer_cache_async(cache, Blocked(), [pair.config()])
    pair.manager.deallocate_cache(cache)
    gate.set()
    assert task.synchronize() is S.LLM_KV_CACHE_NOT_EXIST


def test_a_finished_task_does_not_keep_its_client_alive(pair):
    synchronizer = Synchronizer()
    alive = weakref.ref(synchronizer)
    task = pair.start([pair.config()], synchronizer)
    task.synchronize()
    del synchronizer
    for _ in range(100):                                    # the worker lets go just after it said so
        gc.collect()
        if alive() is None:
            break
        threading.Event().wait(0.01)
    assert alive() is None and task.get_results() == [S.LLM_SUCCESS]


# --------------------------------------------------------------------------------------------------- parameters

def parameters(configs, *lists, desc=None, is_blocks=False):
    return TransferCacheParameters(1, SPEC.desc if desc is None else desc, is_blocks, configs, *lists)


def test_parameters_of_a_config_by_key():
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(9, 3, 2), range(1, 3), range(4, 6), 2)
    (target,) = parameters([config]).targets
    assert (target.cluster_id, target.layers, target.first_layer, target.batch_index) == (9, range(1, 3), 4, 2)
    assert target.key == (3, 3, 0, 2) and target.addrs == ()
    config.src_layer_range = config.dst_layer_range = None
    (target,) = parameters([config]).targets
    assert (target.layers, target.first_layer) == (range(LAYERS), 0) and config.src_layer_range == range(LAYERS)
    (target,) = parameters([TransferWithCacheKeyConfig(BlocksCacheKey(NO_ID, NO_ID), range(1), range(1))]).targets
    assert (target.cluster_id, target.key) == (NO_ID, (2, NO_ID, NO_ID, 0))


@pytest.mark.parametrize("lists, is_blocks, expected", [
    ((), False, (0, SLOT_BYTES)), ((None, None, 0), False, (0, SLOT_BYTES)), ((), True, (0, SLOT_BYTES)),
    ((None, (2, 5), 4), False, (8, 16)), (([1, 0], [7, 3]), True, (3 * SLOT_BYTES, 5 * SLOT_BYTES)),
    (([1], [0], SLOT_BYTES), True, (0, SLOT_BYTES)), ((None, [0], SLOTS * SLOT_BYTES), False, (0, SLOTS * SLOT_BYTES)),
])
def test_bytes_that_may_be_written(lists, is_blocks, expected):
    assert parameters([], *lists, is_blocks=is_blocks).dst_range() == expected


@pytest.mark.parametrize("lists, is_blocks", [
    (([0], [0]), False), ((None, [0]), False), ((None, [0], 4), True), (([0], [0], 8), True),
    ((None, [0], SLOTS * SLOT_BYTES + 1), False),
    ((None, [2**62], 4), False), (([0], [2**62]), True),
])
def test_shapes_that_do_not_exist(assert_raises, lists, is_blocks):
    assert_raises("PI", parameters([], *lists, is_blocks=is_blocks).dst_range)


def test_the_classes_fit_together(pair):
    """As the older modules name them: parameters, job, thread, task."""
    job = TransferCacheJob(pair.manager._llm_engine, TransferCacheParameters(
        pair.source.cache_id, pair.source.cache_desc, False, [pair.config()]), Synchronizer())
    thread = TransferAsyncThread(job, S.LLM_WAIT_PROCESS_TIMEOUT)
    task = CacheTask(thread)
    assert task.synchronize(0) is S.LLM_WAIT_PROCESS_TIMEOUT and job.results == [None]
    thread.start()
    assert task.synchronize() is S.LLM_SUCCESS and pair.arrived() == [0, 1, 2]


def test_named_sources_work_for_the_peer_too(linked):
    """A link serves both directions: the listening end sends, too."""
    with linked as pair:
        assert np.all(pair.source.tensors()[0][0] == np.frombuffer(SPEC.fill()[0][:SLOT_BYTES], np.uint8))
        back = pair.here.call(make, "back", SPEC._replace(seed=2)).addrs
        codes = pair.there.call(send_back, back)
        assert codes == [S.LLM_SUCCESS]
        mine, theirs = pair.here.call(contents, "back"), SPEC._replace(seed=1).fill()
        assert [tensor[:SLOT_BYTES] for tensor in mine] == [tensor[:SLOT_BYTES] for tensor in theirs]
        pair.here.call(drop, "back")


def send_back(node, addrs):
    cache = node.kept["dst"].cache
    return node.cache_manager.transfer_cache_async(cache, Synchronizer(), [TransferConfig(HERE, addrs)]).get_results()

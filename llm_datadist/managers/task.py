"""Transfers that follow the layers of a running model: their jobs, and the workers that run them.

A job walks over the layers of its source, asks the client's synchroniser for each layer that a config wants, and
writes it to every config's destination. A few long-lived daemon threads run all jobs of a process.
"""
from __future__ import annotations

import os
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence, Tuple, Type, Union

from llm_datadist.caches.descriptors import CacheDesc, Placement
from llm_datadist.caches.handles import Cache, KvCache
from llm_datadist.caches.held_blocks import HeldBlocksKey
from llm_datadist.caches.keys import BlocksCacheKey
from llm_datadist.managers.base import RemoteKey, check_no_repeats, check_tensors_per_layer, cluster_of, remote_key
from llm_datadist.managers.cache_task import CacheTask
from llm_datadist.managers.cancel import CancelScope
from llm_datadist.managers.transfer_config import LayerSynchronizer, TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.status import LLMException, LLMParamInvalidError, LLMStatusCode
from llm_datadist.utils import log
from llm_datadist.utils.utils import check_isinstance, check_uint64

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine
    from llm_datadist.core.engine.layer_push import LayerPush

__all__ = ["CacheTask", "TransferAsyncThread", "TransferCacheJob", "TransferCacheParameters", "transfer_cache_async"]

TENSORS_PER_LAYER = 2
MAX_WORKERS = 32
UINT64_MAX = 2**64 - 1

AnyConfig = Union[TransferConfig, TransferWithCacheKeyConfig]
Blocks = Sequence[int]


@dataclass(frozen=True)
class _Target:
    """Where one config sends to; a copy, for the client may use its config again at once."""

    cluster_id: int
    layers: range                       # of the source
    first_layer: int                    # of the destination, for the first of `layers`
    batch_index: int
    key: Optional[RemoteKey]            # None: by address
    ends_hold: bool                     # whether `key` ends with the last layer, as one of held blocks does
    addrs: Tuple[int, ...]


class TransferCacheParameters:
    """What one transfer sends and where to, checked and copied.

    Parameters
    ----------
    cache_id : int
        The source in this process.
    cache_desc : CacheDesc
        Its descriptor: placement DEVICE.
    is_blocks_cache : bool
        Whether its ``shape[0]`` counts blocks.
    configs : sequence of TransferConfig or TransferWithCacheKeyConfig
        One destination each. A ``src_layer_range`` of None is set to all layers.
    src_block_indices, dst_block_indices : list or tuple of int, optional
        Both: blocks to blocks, paired by position. Only the latter: a batch slot cut into blocks. A blocks cache
        without either sends its block 0.
    dst_block_memory_size : int, optional
        Bytes of a destination block; 0 counts as absent.
    tensors_per_layer : int
        Tensors that follow each other and are sent together.

    Raises
    ------
    TypeError, ValueError
        A number is no int, or outside its integer range.
    LLMParamInvalidError
        The arguments contradict each other or the descriptor.
    """

    def __init__(
        self, cache_id: int, cache_desc: CacheDesc, is_blocks_cache: bool, configs: Sequence[AnyConfig],
        src_block_indices: Optional[Blocks] = None, dst_block_indices: Optional[Blocks] = None,
        dst_block_memory_size: Optional[int] = None, tensors_per_layer: int = TENSORS_PER_LAYER,
    ) -> None:
        from llm_datadist.core.engine.layer_push import parse_indices

        if cache_desc.num_tensors % tensors_per_layer:
            raise LLMParamInvalidError(f"num_tensors={cache_desc.num_tensors} is not allowed; a layer has "
                                       f"{tensors_per_layer} tensors")
        self.tensors_per_layer = tensors_per_layer
        self.cache_id = cache_id
        self.num_layers = cache_desc.num_tensors // tensors_per_layer
        self.tensor_bytes = cache_desc.size
        self.stride_bytes = cache_desc.size // cache_desc.shape[0]
        self.is_blocks_cache = is_blocks_cache
        from_blocks = is_blocks_cache or bool(src_block_indices)
        self.targets = [_target(config, self.num_layers, from_blocks, tensors_per_layer) for config in configs]
        self.block_bytes = dst_block_memory_size or 0
        self.src_blocks = parse_indices(src_block_indices, "src_block_indices") if src_block_indices else None
        self.dst_blocks = parse_indices(dst_block_indices, "dst_block_indices") if dst_block_indices else None
        self.dst_block_numbers = list(dst_block_indices) if dst_block_indices else None
        self.first_dst_block = min(dst_block_indices) if dst_block_indices else 0
        self.last_dst_block = max(dst_block_indices) if dst_block_indices else 0

    def dst_range(self) -> Tuple[int, int]:
        """Return the first byte, from the address of a destination tensor on, and the bytes that may be written.

        Raises
        ------
        LLMParamInvalidError
            What is to be sent has no such form: it ends the transfer, and is reported by its task.
        """
        if self.is_blocks_cache and self.dst_blocks is not None and self.src_blocks is None:
            raise LLMParamInvalidError("src_block_indices is empty, but the source is a blocks cache")
        if self.src_blocks is not None and not self.is_blocks_cache:
            raise LLMParamInvalidError("src_block_indices is given, but the source is a contiguous cache")
        if self.src_blocks is not None and self.block_bytes not in (0, self.stride_bytes):
            raise LLMParamInvalidError(f"dst_block_memory_size={self.block_bytes} is not allowed; "
                                       f"a block of the source has {self.stride_bytes} bytes")
        if self.src_blocks is None and self.dst_blocks is not None and not 0 < self.block_bytes <= self.tensor_bytes:
            raise LLMParamInvalidError(f"dst_block_memory_size={self.block_bytes} is not allowed; "
                                       f"it must be in [1, {self.tensor_bytes}], the bytes of a source tensor")
        unit_bytes = self.stride_bytes if self.src_blocks is not None else self.block_bytes or self.stride_bytes
        first, stop = self.first_dst_block * unit_bytes, (self.last_dst_block + 1) * unit_bytes
        if stop > UINT64_MAX:
            raise LLMParamInvalidError(f"dst_block_indices: block {self.last_dst_block} of {unit_bytes} bytes is not "
                                       f"allowed; it ends outside the address space")
        return first, stop - first


def _target(config: AnyConfig, num_layers: int, from_blocks: bool, tensors_per_layer: int) -> _Target:
    """Check one config and copy it."""
    if config.src_layer_range is None:
        config.src_layer_range = range(num_layers)
    layers = config.src_layer_range
    if from_blocks and config.src_batch_index != 0:
        raise LLMParamInvalidError(f"src_batch_index={config.src_batch_index} is not allowed for blocks; it must be 0")
    if not 0 <= layers.start < layers.stop <= num_layers:
        raise LLMParamInvalidError(f"src_layer_range={layers} is not allowed; the source has {num_layers} layers")
    if isinstance(config, TransferConfig):
        if len(config.dst_addrs) != tensors_per_layer * len(layers):
            raise LLMParamInvalidError(f"dst_addrs has {len(config.dst_addrs)} addresses; "
                                       f"{len(layers)} layers need {tensors_per_layer * len(layers)}")
        return _Target(config.dst_cluster_id, layers, 0, config.src_batch_index, None, False, tuple(config.dst_addrs))
    # The setters of a config check one value at a time, so what must fit together is checked here once more.
    key, dst_layers = config.cache_key, config.dst_layer_range
    if key is None:
        raise TypeError("cache_key of a config only support type BlocksCacheKey or CacheKeyByIdAndIndex "
                        "or HeldBlocksKey, but got NoneType")
    if dst_layers is None:
        dst_layers = range(len(layers))
    if dst_layers.stop - dst_layers.start != len(layers):
        raise LLMParamInvalidError(f"src_layer_range={layers} and dst_layer_range={dst_layers} differ in length")
    held = isinstance(key, HeldBlocksKey)
    if (held or isinstance(key, BlocksCacheKey)) and config.src_batch_index != 0:
        raise LLMParamInvalidError(f"src_batch_index={config.src_batch_index} is not allowed with a "
                                   f"{type(key).__name__}; it must be 0")
    return _Target(cluster_of(key), layers, dst_layers.start, config.src_batch_index, remote_key(key),
                   held and config.release, ())


class TransferCacheJob:
    """One transfer: its state, and its results per config.

    Parameters
    ----------
    engine : Engine
        The engine to write through.
    parameters : TransferCacheParameters
        What is sent.
    layer_synchronizer : LayerSynchronizer
        Asked before each layer.

    Attributes
    ----------
    results : list of LLMStatusCode or None
        One per config; None for one that has not finished.
    layers_sent : list of int
        How many layers of each config have arrived.
    error : BaseException or None
        What ended the job early.
    is_cancelled : bool
        Whether `cancel` did.
    """

    def __init__(
        self, engine: "Engine", parameters: TransferCacheParameters, layer_synchronizer: LayerSynchronizer,
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._synchronizer: Optional[LayerSynchronizer] = layer_synchronizer
        self._puts: Dict[int, "LayerPush"] = {}
        self._done = threading.Event()
        self._moving = threading.Lock()         # held while a layer is on its way and while results change
        self._finishing = threading.Lock()
        self._scope = CancelScope()             # ends the layer that is on its way
        self._callbacks: List[Callable[[], None]] = []
        self.is_cancelled = False
        self.layers_sent = [0] * len(parameters.targets)
        self.results: List[Optional[LLMStatusCode]] = [None] * len(parameters.targets)
        self.error: Optional[BaseException] = None

    def wait(self, timeout_s: Optional[float]) -> bool:
        """Return whether the job has ended, after at most `timeout_s` seconds (None: no limit)."""
        return self._done.wait(timeout_s)

    @property
    def layers_wanted(self) -> List[range]:
        """The layers of the source that each config wants."""
        return [target.layers for target in self._parameters.targets]

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the job has ended, on the thread that ends it; at once when it has ended already."""
        with self._finishing:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def cancel(self) -> bool:
        """Stop, in the middle of a layer, too. False when the job had ended; no byte lands after it returned."""
        if self._done.is_set() or self.is_cancelled:
            return False
        self._scope.cancel(0)
        with self._moving:
            self._end_cancelled()
        if self.is_cancelled:
            self._finish()
        return self.is_cancelled

    def _end_cancelled(self) -> None:
        """Note that the job was cancelled, unless it had ended, `_moving` held."""
        if self._done.is_set() or self.is_cancelled or all(result is not None for result in self.results):
            return
        self.is_cancelled = True
        for i, result in enumerate(self.results):
            self.results[i] = LLMStatusCode.LLM_FAILED if result is None else result
        self.error = LLMException(
            f"transfer_cache_async failed, error code is {LLMStatusCode.LLM_FAILED}, it was cancelled after "
            f"{self.layers_sent} layers.", status_code=LLMStatusCode.LLM_FAILED, operation="transfer_cache_async",
            stage="transfer", recoverable=True, hint="start the transfer again")
        self._close_puts()

    def _finish(self) -> None:
        with self._finishing:
            if self._done.is_set():
                return
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def run(self) -> None:
        """Send all layers, once. Never raises."""
        # A task may be kept for its results; the client's model behind the synchroniser should not be.
        synchronizer, self._synchronizer = self._synchronizer, None
        assert synchronizer is not None
        try:
            self._send_layers(synchronizer)
        except BaseException as error:  # whatever a client's synchroniser raises must not end the worker
            with self._moving:
                if not self.is_cancelled:
                    self.error = error
                    log.error("transfer_cache_async of cache %s failed: %r", self._parameters.cache_id, error)
        finally:
            with self._moving:
                if self._scope.is_cancelled:
                    self._end_cancelled()
                self._close_puts()
            self._finish()

    def _send_layers(self, synchronizer: LayerSynchronizer) -> None:
        targets = self._parameters.targets
        for layer in range(self._parameters.num_layers):
            waiting = [i for i, target in enumerate(targets) if layer in target.layers]
            if not waiting:
                continue
            try:
                is_complete = synchronizer.synchronize_layer(layer, None)
            except BaseException:
                self._fail(waiting, LLMStatusCode.LLM_FAILED, None)
                raise
            if not is_complete:
                self._fail(waiting, LLMStatusCode.LLM_PARAM_INVALID, LLMParamInvalidError(
                    f"the synchronizer says that layer {layer} is not complete", operation="transfer_cache_async"))
                return
            log.debug("layer %s of cache %s is ready for %s destinations", layer, self._parameters.cache_id,
                      len(waiting))
            for i in waiting:
                with self._moving:
                    if self.is_cancelled or not self._send_layer(i, targets[i], layer):
                        return

    def _fail(self, indices: List[int], code: LLMStatusCode, error: Optional[BaseException]) -> None:
        with self._moving:
            if not self.is_cancelled:
                self.error = error
                for i in indices:
                    self.results[i] = code

    def _send_layer(self, i: int, target: _Target, layer: int) -> bool:
        """Send one layer to one destination, `_moving` held."""
        try:
            with self._scope:
                self._put_layer(i, target, layer)
            self.layers_sent[i] += 1
            if layer == target.layers.stop - 1:
                self._puts.pop(i).close(target.ends_hold)
                self.results[i] = LLMStatusCode.LLM_SUCCESS
            return True
        except LLMException as error:
            if self._scope.is_cancelled:
                return False                    # whoever cancelled says what becomes of the job
            error._complete(blocks=self._parameters.dst_block_numbers,
                            layers=range(target.first_layer + layer - target.layers.start,
                                         target.first_layer + len(target.layers)))
            self.error = error
            self.results[i] = error.status_code
            log.error("transfer_cache_async of layer %s to cluster %s failed: %s", layer, target.cluster_id, error)
            return False
        except BaseException:
            self.results[i] = LLMStatusCode.LLM_FAILED
            raise

    def _put_layer(self, i: int, target: _Target, layer: int) -> None:
        parameters = self._parameters
        count = parameters.tensors_per_layer
        put = self._puts.get(i)
        if put is None:
            put = self._puts[i] = self._aim(target)
        local = layer * count
        remote = (target.first_layer + layer - target.layers.start) * count
        if parameters.dst_blocks is None:
            put.put_slot(local, remote, count, target.batch_index)
        elif parameters.src_blocks is None:
            put.put_slot_to_blocks(local, remote, count, target.batch_index, parameters.dst_blocks,
                                   parameters.block_bytes)
        else:
            put.put_blocks(local, remote, count, parameters.src_blocks, parameters.dst_blocks)

    def _aim(self, target: _Target) -> "LayerPush":
        from llm_datadist.core.engine.layer_push import LayerPush

        parameters = self._parameters
        first_byte, num_bytes = parameters.dst_range()
        put = LayerPush(self._engine, target.cluster_id, parameters.cache_id)
        try:
            if put.stride_bytes != parameters.stride_bytes:
                raise LLMParamInvalidError(f"the descriptor says {parameters.stride_bytes} bytes per slot or block, "
                                           f"but the cache was made with {put.stride_bytes}")
            if target.key is not None:
                num_tensors = parameters.tensors_per_layer * (target.first_layer + len(target.layers))
                put.aim_at_key(target.key, min(num_tensors, UINT64_MAX))
            else:
                put.aim_at_addresses(target.addrs, first_byte, num_bytes)
        except BaseException:
            put.close()                 # the exception is kept, and with it this frame: nothing may stay pinned by it
            raise
        return put

    def _close_puts(self) -> None:
        for put in self._puts.values():
            try:
                put.close()
            except LLMException as error:
                log.warn("a transfer's lease ended with its link: %s", error)
        self._puts.clear()


class _Workers:
    """Daemon threads that run jobs: started while none is idle, up to `MAX_WORKERS`, and then kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._jobs: "queue.SimpleQueue[TransferCacheJob]" = queue.SimpleQueue()
        self._num_threads = 0
        self._num_free = 0          # idle threads without a job on its way to them; negative: jobs in the queue
        self._pid = os.getpid()

    def submit(self, job: TransferCacheJob) -> None:
        """Run `job` soon."""
        with self._lock:
            if self._pid != os.getpid():        # a forked child has none of its parent's threads
                self._reset()
            self._num_free -= 1
            if self._num_free < 0 and self._num_threads < MAX_WORKERS:
                self._num_threads += 1
                self._num_free += 1
                threading.Thread(target=self._work, name=f"llm_datadist-transfer-{self._num_threads}",
                                 daemon=True).start()
            self._jobs.put(job)

    def _work(self) -> None:
        jobs = self._jobs
        while True:
            job = jobs.get()
            job.run()
            del job
            with self._lock:
                self._num_free += 1


_workers = _Workers()


class TransferAsyncThread:
    """Hands a job to the workers; kept under the name of the original, which starts a thread for each call.

    Parameters
    ----------
    job : TransferCacheJob
        The job to run.
    timeout_code : LLMStatusCode
        What a wait that runs out reports.
    """

    def __init__(self, job: TransferCacheJob, timeout_code: LLMStatusCode = LLMStatusCode.LLM_TIMEOUT) -> None:
        self.job = job
        self.timeout_code = timeout_code

    def start(self) -> None:
        """Run the job in the background."""
        _workers.submit(self.job)


def transfer_cache_async(
    engine: "Engine", cache_id: int, cache: Union[Cache, KvCache], layer_synchronizer: LayerSynchronizer,
    transfer_configs: Sequence[AnyConfig], src_block_indices: Optional[Blocks] = None,
    dst_block_indices: Optional[Blocks] = None, dst_block_memory_size: Optional[int] = None,
    tensor_num_per_layer: int = TENSORS_PER_LAYER, *,
    config_types: Sequence[Type[AnyConfig]] = (TransferConfig, TransferWithCacheKeyConfig), cuts_slots: bool = True,
    timeout_code: LLMStatusCode = LLMStatusCode.LLM_TIMEOUT,
) -> CacheTask:
    """Check a transfer and start it: what the managers' calls of this name have in common.

    Parameters
    ----------
    engine : Engine
        The engine to write through.
    cache_id : int
        Id of the source in `engine`.
    cache : Cache or KvCache
        The source, placement DEVICE.
    layer_synchronizer, transfer_configs, src_block_indices, dst_block_indices, dst_block_memory_size : object
        As for `CacheManager.transfer_cache_async`.
    tensor_num_per_layer : int
        As for `CacheManager.transfer_cache_async`.
    config_types : sequence of type
        What `transfer_configs` may hold; all of one type.
    cuts_slots : bool
        Whether a batch slot may be cut into blocks.
    timeout_code : LLMStatusCode
        What a wait that runs out reports.

    Returns
    -------
    CacheTask
        The running transfer.

    Raises
    ------
    TypeError, ValueError
        An argument has another type, or a number is outside its integer range.
    LLMParamInvalidError
        The arguments contradict each other or the source.
    """
    if cache.cache_desc.placement == Placement.HOST:
        raise LLMParamInvalidError("src_cache is on HOST, which is not allowed; a transfer starts on DEVICE")
    _check_blocks(src_block_indices, dst_block_indices, dst_block_memory_size)
    if dst_block_indices and engine.options.strict:
        check_no_repeats("dst_block_indices", dst_block_indices)
    if dst_block_indices and not src_block_indices and not cuts_slots:
        raise LLMParamInvalidError("dst_block_indices without src_block_indices is not allowed: "
                                   "a batch slot cannot be cut into blocks here")
    check_isinstance("layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False)
    _check_types(transfer_configs, config_types)
    parameters = TransferCacheParameters(cache_id, cache.cache_desc, cache.is_blocks_cache, transfer_configs,
                                         src_block_indices, dst_block_indices, dst_block_memory_size,
                                         check_tensors_per_layer(tensor_num_per_layer))
    thread = TransferAsyncThread(TransferCacheJob(engine, parameters, layer_synchronizer), timeout_code)
    thread.start()
    return CacheTask(thread)


def _check_blocks(src: Optional[Blocks], dst: Optional[Blocks], block_bytes: Optional[int]) -> None:
    for name, blocks in (("src_block_indices", src), ("dst_block_indices", dst)):
        check_isinstance(name, blocks, (list, tuple), int)
        for index, block in enumerate(blocks or ()):
            check_uint64(f"{name}[{index}]", block)
    if block_bytes is not None:
        check_uint64("dst_block_memory_size", block_bytes)
    if src and len(src) != len(dst or ()):
        raise LLMParamInvalidError(
            f"src_block_indices has {len(src)} entries and dst_block_indices {len(dst or ())}; they pair by position")
    if dst and not src and not block_bytes:
        raise LLMParamInvalidError("dst_block_memory_size is needed to cut a batch slot into blocks")
    if not dst and block_bytes:
        raise LLMParamInvalidError(f"dst_block_memory_size={block_bytes} is given without dst_block_indices")


def _check_types(configs: Sequence[AnyConfig], config_types: Sequence[Type[AnyConfig]]) -> None:
    check_isinstance("transfer_configs", configs, (list, tuple), config_types, allow_none=False)
    if not any(all(isinstance(config, kind) for config in configs) for kind in config_types):
        raise TypeError("transfer_configs inner type only support one kind of config at a time, but got both")

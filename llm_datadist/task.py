"""Transfers that follow the layers of a running model: `CacheTask`, its job, and the workers that run it.

A job walks over the layers of its source, asks the client's synchroniser for each layer that a config wants, and
writes it to every config's destination. A few long-lived daemon threads run all jobs of a process.
"""
from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Type, Union

from llm_datadist.descriptors import CacheDesc, Placement
from llm_datadist.manager_base import remote_key
from llm_datadist.status import LLMException, LLMParamInvalidError, LLMStatusCode
from llm_datadist.transfer_config import LayerSynchronizer, TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.utils import log
from llm_datadist.utils.utils import check_isinstance, check_uint32, check_uint64

if TYPE_CHECKING:
    from llm_datadist.core.engine import Engine
    from llm_datadist.core.put import RemotePut

__all__ = [
    "CacheTask", "TransferAsyncThread", "TransferCacheJob", "TransferCacheParameters", "start_transfer",
    "transfer_cache_async",
]

TENSORS_PER_LAYER = 2
MAX_WORKERS = 32
UINT64_MAX = 2**64 - 1

_Config = Union[TransferConfig, TransferWithCacheKeyConfig]


class TransferCacheParameters:
    """What is sent: source, blocks and sizes, checked."""

    def __init__(
        self, cache_id: int, cache_desc: CacheDesc, is_blocks: bool, configs: Sequence[_Config],
        src_blocks: Optional[Sequence[int]], dst_blocks: Optional[Sequence[int]], block_bytes: Optional[int],
    ) -> None:
        from llm_datadist.core.put import parse_indices

        self.cache_id = cache_id
        self.num_layers = cache_desc.num_tensors // TENSORS_PER_LAYER
        self.stride_bytes = cache_desc.size // cache_desc.shape[0]
        self.is_blocks = is_blocks
        self.configs = list(configs)
        self.src_blocks = parse_indices(src_blocks, "src_block_indices") if src_blocks else None
        self.dst_blocks = parse_indices(dst_blocks, "dst_block_indices") if dst_blocks else None
        self.block_bytes = block_bytes or self.stride_bytes
        # Bytes of a destination tensor, from its address on, that this transfer may write.
        self.first_byte = min(dst_blocks) * self.block_bytes if dst_blocks else 0
        self.num_bytes = (max(dst_blocks) + 1) * self.block_bytes - self.first_byte if dst_blocks else self.stride_bytes


class TransferCacheJob:
    """One call of ``transfer_cache_async``: its state, and its results per config.

    Parameters
    ----------
    engine : Engine
        The engine to write through.
    parameters : TransferCacheParameters
        What is sent.
    layer_synchronizer : LayerSynchronizer
        Asked before each layer.
    """

    def __init__(
        self, engine: "Engine", parameters: TransferCacheParameters, layer_synchronizer: LayerSynchronizer,
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._synchronizer = layer_synchronizer
        self._puts: Dict[int, "RemotePut"] = {}
        self._done = threading.Event()
        self.results: List[Optional[LLMStatusCode]] = [None] * len(parameters.configs)
        self.error: Optional[BaseException] = None

    def wait(self, timeout_s: Optional[float]) -> bool:
        """Return whether the job has ended, after at most `timeout_s` seconds (None: no limit)."""
        return self._done.wait(timeout_s)

    def run(self) -> None:
        """Send all layers. Never raises."""
        try:
            self._send_layers()
        except BaseException as error:  # whatever a client's synchroniser raises must not end the worker
            self.error = error
            log.error("transfer_cache_async of cache %s failed: %r", self._parameters.cache_id, error)
        finally:
            self._close_puts()
            self._done.set()

    def _send_layers(self) -> None:
        for layer in range(self._parameters.num_layers):
            targets = [i for i, config in enumerate(self._parameters.configs) if layer in _layers(config)]
            if not targets:
                continue
            try:
                is_complete = self._synchronizer.synchronize_layer(layer, None)
            except BaseException:
                self._fail(targets, LLMStatusCode.LLM_FAILED)
                raise
            if not is_complete:
                self._fail(targets, LLMStatusCode.LLM_PARAM_INVALID)
                return
            for i in targets:
                if not self._send_layer(i, layer):
                    return

    def _fail(self, targets: List[int], code: LLMStatusCode) -> None:
        for i in targets:
            self.results[i] = code

    def _send_layer(self, i: int, layer: int) -> bool:
        config = self._parameters.configs[i]
        try:
            self._put_layer(i, config, layer)
            if layer == _layers(config).stop - 1:
                self._puts.pop(i).close()
                self.results[i] = LLMStatusCode.LLM_SUCCESS
            return True
        except LLMException as error:
            self.error = error
            self.results[i] = error.status_code
            log.error("transfer_cache_async of layer %s to cluster %s failed: %s", layer, config.dst_cluster_id, error)
            return False
        except BaseException:
            self.results[i] = LLMStatusCode.LLM_FAILED
            raise

    def _put_layer(self, i: int, config: _Config, layer: int) -> None:
        parameters = self._parameters
        put = self._puts.get(i)
        if put is None:
            put = self._puts[i] = self._aim(config)
        position = layer - _layers(config).start
        if isinstance(config, TransferWithCacheKeyConfig):
            position += config.dst_layer_range.start if config.dst_layer_range else 0
        local, remote = layer * TENSORS_PER_LAYER, position * TENSORS_PER_LAYER
        if parameters.src_blocks is not None:
            put.put_blocks(local, remote, TENSORS_PER_LAYER, parameters.src_blocks, parameters.dst_blocks)
        elif parameters.dst_blocks is not None:
            put.put_slot_to_blocks(local, remote, TENSORS_PER_LAYER, config.src_batch_index, parameters.dst_blocks,
                                   parameters.block_bytes)
        else:
            put.put_slot(local, remote, TENSORS_PER_LAYER, config.src_batch_index)

    def _aim(self, config: _Config) -> "RemotePut":
        from llm_datadist.core.put import RemotePut

        put = RemotePut(self._engine, config.dst_cluster_id, self._parameters.cache_id)
        try:
            if isinstance(config, TransferWithCacheKeyConfig):
                num_tensors = TENSORS_PER_LAYER * config.dst_layer_range.stop if config.dst_layer_range else 0
                put.aim_at_key(remote_key(config.cache_key),    # type: ignore[arg-type]  # checked at construction
                               min(num_tensors, UINT64_MAX))
            elif self._parameters.first_byte + self._parameters.num_bytes > UINT64_MAX:
                raise LLMParamInvalidError("dst_block_indices reach beyond the address space")
            else:
                put.aim_at_addresses(config.dst_addrs, self._parameters.first_byte, self._parameters.num_bytes)
        except BaseException:
            put.close()         # the error keeps this frame, and that would keep the source pinned
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
        The job.
    timeout_code : LLMStatusCode
        What a wait that runs out reports.
    """

    def __init__(self, job: TransferCacheJob, timeout_code: LLMStatusCode = LLMStatusCode.LLM_TIMEOUT) -> None:
        self.job = job
        self.timeout_code = timeout_code

    def start(self) -> None:
        """Run the job in the background."""
        _workers.submit(self.job)


def _seconds(timeout_in_millis: Optional[int]) -> Optional[float]:
    if timeout_in_millis is None:
        return None
    return check_uint32("timeout_in_millis", timeout_in_millis) / 1000


class CacheTask:
    """A transfer in the background. Made by ``transfer_cache_async``.

    Parameters
    ----------
    transfer_thread : TransferAsyncThread
        The running transfer.
    """

    def __init__(self, transfer_thread: TransferAsyncThread) -> None:
        self._thread = transfer_thread

    def synchronize(self, timeout_in_millis: Optional[int] = None) -> LLMStatusCode:
        """Wait for the transfer.

        Parameters
        ----------
        timeout_in_millis : int, optional
            Milliseconds, uint32; None waits without limit.

        Returns
        -------
        LLMStatusCode
            The first failure of a config, ``LLM_SUCCESS`` when there is none, or the timeout code while it still runs.

        Raises
        ------
        TypeError, ValueError
            `timeout_in_millis` is no uint32.
        """
        if not self._thread.job.wait(_seconds(timeout_in_millis)):
            return self._thread.timeout_code
        for result in self._thread.job.results:
            if result is not None and result != LLMStatusCode.LLM_SUCCESS:
                return result
        return LLMStatusCode.LLM_SUCCESS

    def get_results(self, timeout_in_millis: Optional[int] = None) -> List[Optional[LLMStatusCode]]:
        """Wait for the transfer and return one result per config, in order.

        Parameters
        ----------
        timeout_in_millis : int, optional
            Milliseconds, uint32; None waits without limit.

        Returns
        -------
        list of LLMStatusCode or None
            None for a config that did not finish because another failed first; all timeout codes while it still runs.

        Raises
        ------
        TypeError, ValueError
            `timeout_in_millis` is no uint32.
        """
        job = self._thread.job
        if not job.wait(_seconds(timeout_in_millis)):
            return [self._thread.timeout_code] * len(job.results)
        return list(job.results)

    def exception(self, timeout_in_millis: Optional[int] = None) -> Optional[BaseException]:
        """Wait for the transfer and return what ended it early: a failure's exception, or the synchroniser's own.

        Parameters
        ----------
        timeout_in_millis : int, optional
            Milliseconds, uint32; None waits without limit.

        Returns
        -------
        BaseException or None
            None when all layers were sent, or while it still runs.

        Raises
        ------
        TypeError, ValueError
            `timeout_in_millis` is no uint32.
        """
        return self._thread.job.error if self._thread.job.wait(_seconds(timeout_in_millis)) else None


def _layers(config: _Config) -> range:
    layers = config.src_layer_range
    assert layers is not None       # filled in before the job starts
    return layers


def start_transfer(
    engine: "Engine", cache_id: int, cache_desc: CacheDesc, is_blocks: bool, layer_synchronizer: LayerSynchronizer,
    transfer_configs: Sequence[_Config], config_type: Type[Any], src_block_indices: Optional[Sequence[int]],
    dst_block_indices: Optional[Sequence[int]], dst_block_memory_size: Optional[int], timeout_code: LLMStatusCode,
) -> CacheTask:
    """Check the arguments of ``transfer_cache_async`` and start it; errors as documented there."""
    if cache_desc.placement == Placement.HOST:
        raise LLMParamInvalidError("src_cache is on HOST, which is not allowed; a transfer starts on DEVICE")
    _check_blocks(src_block_indices, dst_block_indices, dst_block_memory_size, is_blocks)
    check_isinstance("layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False)
    check_isinstance("transfer_configs", transfer_configs, [list, tuple], config_type, allow_none=False)
    if cache_desc.num_tensors % TENSORS_PER_LAYER:
        raise LLMParamInvalidError(f"num_tensors={cache_desc.num_tensors} is not allowed; a layer has two tensors")
    num_layers = cache_desc.num_tensors // TENSORS_PER_LAYER
    for config in transfer_configs:
        _check_config(config, num_layers, bool(src_block_indices))
    stride_bytes = cache_desc.size // cache_desc.shape[0]
    if is_blocks and src_block_indices and dst_block_memory_size not in (None, 0, stride_bytes):
        raise LLMParamInvalidError(f"dst_block_memory_size={dst_block_memory_size} is not allowed; "
                                   f"a block of the source has {stride_bytes} bytes")
    if not src_block_indices and dst_block_indices and not 0 < (dst_block_memory_size or 0) <= cache_desc.size:
        raise LLMParamInvalidError(f"dst_block_memory_size={dst_block_memory_size} is not allowed; "
                                   f"it must be in (0, {cache_desc.size}], the bytes of a source tensor")
    parameters = TransferCacheParameters(cache_id, cache_desc, is_blocks, transfer_configs, src_block_indices,
                                         dst_block_indices, dst_block_memory_size)
    thread = TransferAsyncThread(TransferCacheJob(engine, parameters, layer_synchronizer), timeout_code)
    thread.start()
    return CacheTask(thread)


def transfer_cache_async(
    engine: "Engine", cache_id: int, cache_desc: CacheDesc, is_blocks: bool, layer_synchronizer: LayerSynchronizer,
    transfer_configs: Sequence[_Config], **kwargs: Any,
) -> CacheTask:
    """Start a transfer below the managers; see ``CacheManager.transfer_cache_async`` for the arguments."""
    return start_transfer(
        engine, cache_id, cache_desc, is_blocks, layer_synchronizer, transfer_configs,
        (TransferConfig, TransferWithCacheKeyConfig), kwargs.get("src_block_indices"), kwargs.get("dst_block_indices"),
        kwargs.get("dst_block_memory_size"), LLMStatusCode.LLM_TIMEOUT)


def _check_blocks(src: Optional[Sequence[int]], dst: Optional[Sequence[int]], block_bytes: Optional[int],
                  is_blocks: bool) -> None:
    for name, blocks in (("src_block_indices", src), ("dst_block_indices", dst)):
        check_isinstance(name, blocks, [list, tuple], int)
        for index, block in enumerate(blocks or ()):
            check_uint64(f"{name}[{index}]", block)
    if block_bytes is not None:
        check_uint64("dst_block_memory_size", block_bytes)
    if src and len(src) != len(dst or ()):
        raise LLMParamInvalidError(
            f"src_block_indices has {len(src)} entries and dst_block_indices {len(dst or ())}; they pair by position")
    if dst and not src:
        if is_blocks:
            raise LLMParamInvalidError("src_block_indices is empty, but the source is a blocks cache")
        if block_bytes is None:
            raise LLMParamInvalidError("dst_block_memory_size is needed to cut a batch slot into blocks")
    if src and not is_blocks:
        raise LLMParamInvalidError("src_block_indices is given, but the source is a contiguous cache")
    if not dst and block_bytes:
        raise LLMParamInvalidError(f"dst_block_memory_size={block_bytes} is given without dst_block_indices")


def _check_config(config: _Config, num_layers: int, from_blocks: bool) -> None:
    if config.src_layer_range is None:
        config.src_layer_range = range(num_layers)
    layers = config.src_layer_range
    if not 0 <= layers.start < layers.stop <= num_layers:
        raise LLMParamInvalidError(f"src_layer_range={layers} is not allowed; the source has {num_layers} layers")
    if from_blocks and config.src_batch_index != 0:
        raise LLMParamInvalidError(f"src_batch_index={config.src_batch_index} is not allowed for blocks; it must be 0")
    if isinstance(config, TransferConfig) and len(config.dst_addrs) != TENSORS_PER_LAYER * len(layers):
        raise LLMParamInvalidError(f"dst_addrs has {len(config.dst_addrs)} addresses; "
                                   f"{len(layers)} layers need {TENSORS_PER_LAYER * len(layers)}")

"""A PROMPT of the first generation: offers a cache by key, then writes another one layer by layer into a DECODER.

Reads the addresses of the decoder's tensors, a JSON list, from standard input.
"""
import json

import numpy as np

from llm_datadist_v1 import (
    CacheDesc,
    CacheKey,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)

LAYERS = 3


class Ready(LayerSynchronizer):
    """Writes a layer when it is asked for, as a model does that computes it just then."""

    def __init__(self, tensors):
        self.tensors = tensors

    def synchronize_layer(self, layer_index, timeout_in_millis):
        for number in (2 * layer_index, 2 * layer_index + 1):
            self.tensors[number][:] = 100 + number
        return True


config = LLMConfig()
config.device_id = 0
config.listen_ip_info = "127.0.0.1:0"
config.ge_options = {"ge.flowGraphMemMaxSize": str(16 << 20)}
datadist = LLMDataDist(LLMRole.PROMPT, 1)
datadist.init(config.generate_options())
manager = datadist.kv_cache_manager

offered = manager.allocate_cache(CacheDesc(2 * LAYERS, [2, 256], DataType.DT_FLOAT),
                                 [CacheKey(1, 5, 0), CacheKey(1, 6, 0)])
for number, tensor in enumerate(offered.tensors()):
    tensor[0], tensor[1] = number, 50 + number
manager.deallocate_cache(offered)                   # the keys keep it
print(datadist.listen_address[1], flush=True)

addresses = json.loads(input())
source = manager.allocate_cache(CacheDesc(2 * LAYERS, [1, 256], DataType.DT_FLOAT))
task = manager.transfer_cache_async(source, Ready(source.tensors()),
                                    [TransferConfig(2, addresses, range(LAYERS), 0)])
assert task.synchronize() == LLMStatusCode.LLM_SUCCESS
assert task.get_results() == [LLMStatusCode.LLM_SUCCESS]
assert all((tensor == np.float32(100 + number)).all() for number, tensor in enumerate(source.tensors()))
manager.deallocate_cache(source)
print("written", flush=True)

input()                                             # the decoder has pulled one of the keys
manager.remove_cache_key(CacheKey(1, 6, 0))
print(datadist.stats()["caches"], flush=True)
datadist.finalize()

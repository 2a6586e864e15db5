"""A prefill process: offers one contiguous cache and one blocks cache, then waits for a line on standard input."""
import json

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMConfig, LLMDataDist, LLMRole

config = LLMConfig()
config.device_id = 0
config.enable_cache_manager = True
config.mem_pool_cfg = json.dumps({"memory_size": 16 << 20})
config.listen_ip_info = "127.0.0.1:0"
datadist = LLMDataDist(LLMRole.PROMPT, 1)
datadist.init(config.generate_options())
manager = datadist.cache_manager

slots = manager.allocate_cache(CacheDesc(4, [1, 256], DataType.DT_FLOAT), [CacheKey(1, req_id=7)])
for number, tensor in enumerate(slots.tensors()):
    tensor[:] = number + 1
manager.deallocate_cache(slots)                     # the key keeps it

blocks = manager.allocate_blocks_cache(CacheDesc(4, [8, 64], DataType.DT_FLOAT), BlocksCacheKey(1))
for number, tensor in enumerate(blocks.tensors()):
    for block in range(8):
        tensor[block] = 10 * number + block

print(datadist.listen_address[1], flush=True)
input()
print(datadist.stats()["keys"], flush=True)         # the blocks key is left: the request was pulled
manager.deallocate_blocks_cache(blocks)
print(datadist.stats()["caches"], flush=True)
datadist.finalize()

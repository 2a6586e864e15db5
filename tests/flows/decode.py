"""A decode process: links to the port given, pulls by key and by blocks, and checks what came."""
import json
import sys

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)

config = LLMConfig()
config.device_id = 0
config.enable_cache_manager = True
config.mem_pool_cfg = json.dumps({"memory_size": 16 << 20})
datadist = LLMDataDist(LLMRole.DECODER, 2)
datadist.init(config.generate_options())
manager = datadist.cache_manager

cluster = LLMClusterInfo()
cluster.remote_cluster_id = 1
cluster.append_local_ip_info("127.0.0.1", 0)
cluster.append_remote_ip_info("127.0.0.1", int(sys.argv[1]))
assert datadist.link_clusters([cluster]) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])

slots = manager.allocate_cache(CacheDesc(4, [1, 256], DataType.DT_FLOAT))
manager.pull_cache(CacheKey(1, req_id=7), slots)
assert all((tensor == number + 1).all() for number, tensor in enumerate(slots.tensors()))
manager.deallocate_cache(slots)

blocks = manager.allocate_blocks_cache(CacheDesc(4, [8, 64], DataType.DT_FLOAT))
manager.pull_blocks(BlocksCacheKey(1), blocks, [1, 2, 3], [7, 0, 5])
for number, tensor in enumerate(blocks.tensors()):
    assert [tensor[block][0] for block in (7, 0, 5)] == [10 * number + block for block in (1, 2, 3)]
manager.deallocate_blocks_cache(blocks)

assert datadist.unlink_clusters([cluster])[0] == LLMStatusCode.LLM_SUCCESS
assert datadist.stats()["caches"] == 0
datadist.finalize()
print("same")

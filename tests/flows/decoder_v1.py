"""A DECODER of the first generation: links to the port given, pulls by key, and has another cache written into."""
import json
import sys

from llm_datadist_v1 import (
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)

LAYERS = 3
config = LLMConfig()
config.device_id = 0
config.ge_options = {"ge.flowGraphMemMaxSize": str(16 << 20)}
datadist = LLMDataDist(LLMRole.DECODER, 2)
datadist.init(config.generate_options())
manager = datadist.kv_cache_manager

cluster = LLMClusterInfo()
cluster.remote_cluster_id = 1
cluster.append_local_ip_info("127.0.0.1", 0)
cluster.append_remote_ip_info("127.0.0.1", int(sys.argv[1]))
assert datadist.link_clusters([cluster], 5000) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
datadist.check_link_status(1)

written = manager.allocate_cache(CacheDesc(2 * LAYERS, [1, 256], DataType.DT_FLOAT))
print(json.dumps(written.per_device_tensor_addrs[0]), flush=True)
input()                                             # the prompt has written
assert all((tensor == 100 + number).all() for number, tensor in enumerate(written.tensors()))

pulled = manager.allocate_cache(CacheDesc(2 * LAYERS, [3, 256], DataType.DT_FLOAT))
manager.pull_cache(CacheKey(1, 5, 0), pulled, batch_index=2)
assert all((tensor[2] == number).all() for number, tensor in enumerate(pulled.tensors()))
manager.copy_cache(written, pulled, dst_batch_index=0, src_batch_index=2)
assert all((tensor == number).all() for number, tensor in enumerate(written.tensors()))
for cache in (written, pulled):
    manager.deallocate_cache(cache)

assert datadist.unlink_clusters([cluster], 5000) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
assert datadist.stats()["caches"] == 0
datadist.finalize()
print("same", flush=True)

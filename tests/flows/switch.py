"""One of two processes that change roles, and with them the port: switch.py prompt|decoder PORT."""
import sys

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)


def options(role, port):
    """Everything `generate_options` gives, also for the switch; only a prompt listens."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.enable_switch_role = True
    config.mem_pool_cfg = '{"memory_size": 16777216}'
    if role is LLMRole.PROMPT:
        config.listen_ip_info = f"127.0.0.1:{port}"
    return config.generate_options()


role = LLMRole.PROMPT if sys.argv[1] == "prompt" else LLMRole.DECODER
own_id, other_id = (1, 2) if role is LLMRole.PROMPT else (2, 1)
port = int(sys.argv[2])
datadist = LLMDataDist(role, own_id)
datadist.init(options(role, port))
manager = datadist.cache_manager
desc = CacheDesc(2, [4, 64], DataType.DT_FLOAT)
own = manager.allocate_blocks_cache(desc, BlocksCacheKey(own_id))
for tensor in own.tensors():
    tensor[:] = own_id
if role is LLMRole.PROMPT:
    port = datadist.listen_address[1]
    print(port, flush=True)

for _ in range(4):
    if role is LLMRole.DECODER:
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = other_id
        cluster.append_local_ip_info("127.0.0.1", 0)
        cluster.append_remote_ip_info("127.0.0.1", port)
        assert datadist.link_clusters([cluster])[0] == LLMStatusCode.LLM_SUCCESS
        copy = manager.allocate_blocks_cache(desc)
        manager.pull_blocks(BlocksCacheKey(other_id), copy, [0, 1, 2, 3], [3, 2, 1, 0])
        assert all((tensor == other_id).all() for tensor in copy.tensors())
        manager.deallocate_blocks_cache(copy)
        assert datadist.unlink_clusters([cluster])[0] == LLMStatusCode.LLM_SUCCESS
        print("pulled", flush=True)
    input()                                         # the decoder has unlinked
    if role is LLMRole.PROMPT:
        role = LLMRole.DECODER
        datadist.switch_role(role, options(role, port))
        assert datadist.listen_address is None
        print("closed", flush=True)
        input()                                     # the other process listens at the port
    else:
        role = LLMRole.PROMPT
        datadist.switch_role(role, options(role, port))
        assert datadist.listen_address == ("127.0.0.1", port)
        print("listens", flush=True)

assert (own.tensors()[0] == own_id).all()
manager.deallocate_blocks_cache(own)
datadist.finalize()
print("same", flush=True)

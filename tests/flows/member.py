"""One of three members that link by rank table and pull from the next one: member.py RANK COMM_NAME."""
import json
import sys
import time

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    Placement,
    RegisterMemStatus,
)

rank, name = int(sys.argv[1]), sys.argv[2]
config = LLMConfig()
config.device_id = 0
config.enable_cache_manager = True
config.link_total_time = 60
datadist = LLMDataDist(LLMRole.MIX, rank)
datadist.init(config.generate_options())
manager = datadist.cache_manager

table = {"version": "1.0", "status": "completed", "server_count": "1", "server_list": [
    {"server_id": "0", "device": [{"device_id": str(i), "device_ip": f"192.0.2.{i}", "rank_id": str(i)}
                                  for i in range(3)]}]}
comm = datadist.link(name, {0: 0, 1: 1, 2: 2}, json.dumps(table))
desc = CacheDesc(2, [4, 32], DataType.DT_FLOAT, Placement.DEVICE)
own = [np.full((4, 32), 10 * rank + i, np.float32) for i in range(2)]
cache = manager.register_blocks_cache(desc, [array.ctypes.data for array in own], BlocksCacheKey(rank))
while datadist.query_register_mem_status(comm) is RegisterMemStatus.PREPARING:
    time.sleep(0.01)
assert datadist.query_register_mem_status(comm) is RegisterMemStatus.OK
print("linked", flush=True)
input()                                             # all have registered
following = (rank + 1) % 3
manager.pull_blocks(BlocksCacheKey(following), cache, [0], [3])
assert [array[3][0] for array in own] == [10 * following + i for i in range(2)]
print("same", flush=True)
input()                                             # all have pulled
datadist.unlink(comm)
manager.unregister_cache(cache.cache_id)
datadist.finalize()

"""Every import path that clients use gives the one object, and resolves late what needs the compiled core."""
import importlib
import json
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import llm_datadist

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = """
LLMClusterInfo LLMStatusCode LLMException LLMRole LlmConfig LLMConfig DataType Status CacheDesc CacheKey
CacheKeyByIdAndIndex KvCache Cache BlocksCacheKey LLMDataDist Placement RegisterMemStatus LayerSynchronizer
TransferConfig CacheTask TransferWithCacheKeyConfig Memtype MemInfo TensorDesc Tensor KvCacheManager
""".split()
DATADIST = "LLMDataDist _shutdown_handler"
CONFIG = "EngineConfig ClusterConfig"
CONFIGS = "LLMRole LLMClusterInfo LlmConfig trans_str_ip"
STATUS = "LLMStatusCode LLMException Status code_2_status handle_llm_status raise_if_false raise_if_true"
DATA_TYPE = """
DataType get_python_dtype_from_wrapper_dtype python_dtype_2_dwrapper_dtype dtype_to_np_dtype valid_np_dtypes
np_dtype_to_dtype
"""
UTILS = """
check_isinstance check_dict check_inner check_uint8 check_uint16 check_uint32 check_uint64 check_int32 check_int64
check_list_int32 check_list_int64 check_list_uint64 check_positive_or_set_default check_type
"""
LOG = "get_logger info warn error"
TYPES = """
Placement RegisterMemStatus Memtype MemInfo CacheDesc Cache KvCache CacheKey CacheKeyByIdAndIndex BlocksCacheKey
LayerSynchronizer TransferConfig TransferWithCacheKeyConfig CacheTask PushType check_layer_range
int_to_mem_status_dict
"""
LLM_UTILS = """
pack_cache_desc pack_cache_key pack_cache_key_by_id pack_block_cache_key pack_mem_info parse_listen_ip_info
layer_range_to_tensor_indices transfer_cache_async TransferCacheParameters TransferCacheJob TransferAsyncThread
clone_cache_desc calc_tensor_size CacheDescParser is_valid_id is_invalid_id
"""
MODULES = {
    "llm_datadist.configs": CONFIGS, "llm_datadist.status": STATUS, "llm_datadist.data_type": DATA_TYPE,
    "llm_datadist.utils.utils": UTILS, "llm_datadist.utils.log": LOG, "llm_datadist.v2.llm_types": TYPES,
    "llm_datadist.v2.llm_datadist": DATADIST, "llm_datadist.v2.cache_manager": "CacheManager",
    "llm_datadist.v2.llm_utils": LLM_UTILS, "llm_datadist.v2.config": CONFIG,
    "llm_datadist_v1.configs": CONFIGS, "llm_datadist_v1.config": CONFIG, "llm_datadist_v1.status": STATUS,
    "llm_datadist_v1.data_type": DATA_TYPE, "llm_datadist_v1.kv_cache_manager": "KvCacheManager",
    "llm_datadist_v1.llm_datadist": DATADIST, "llm_datadist_v1.llm_types": TYPES,
    "llm_datadist_v1.llm_utils": LLM_UTILS, "llm_datadist_v1.tensor": "Tensor TensorDesc",
    "llm_datadist_v1.utils.utils": UTILS, "llm_datadist_v1.utils.log": LOG,
}
# Stand-ins for the modules that need the compiled core: they show that a path resolves to the one object there.
STANDINS = {
    "llm_datadist.datadist": ["LLMDataDist", "_shutdown_handler"], "llm_datadist.managers.cache": ["CacheManager"],
    "llm_datadist.managers.kv_cache": ["KvCacheManager"],
    "llm_datadist.managers.task": ["CacheTask", "transfer_cache_async", "TransferCacheParameters", "TransferCacheJob",
                          "TransferAsyncThread"],
}
PRELUDE = """
import importlib, json, sys, types
for name, attributes in {standins!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, type(attribute, (), {{}}))
"""


def run(code, with_standins=True):
    """Run `code` in a fresh interpreter and return what it prints, as JSON."""
    prelude = PRELUDE.format(standins=STANDINS) if with_standins else "import importlib, json, sys\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_public_names():
    assert llm_datadist.__all__ == PUBLIC and len(PUBLIC) == 26
    assert llm_datadist.v2_list == [name for name in PUBLIC if name not in ("TensorDesc", "Tensor", "KvCacheManager")]
    assert llm_datadist.MemType is llm_datadist.Memtype and llm_datadist.LLMConfig is llm_datadist.LlmConfig
    assert {*PUBLIC, "MemType", "CacheManager"} <= set(dir(llm_datadist))


@pytest.mark.parametrize("module", ["llm_datadist", "llm_datadist_v1", "llm_datadist.v2.llm_types",
                                    "llm_datadist.v2.llm_utils", "llm_datadist.data_type"])
def test_unknown_attribute(module):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        attrgetter("nothing")(importlib.import_module(module))


def test_star_import_and_the_first_generation_package():
    code = """
from llm_datadist import *
import llm_datadist, llm_datadist_v1
first = dict(globals())
from llm_datadist_v1 import *
print(json.dumps([
    sorted(name for name in llm_datadist.__all__ if name not in first),
    [name for name in llm_datadist.__all__ if name not in llm_datadist_v1.__all__],
    [name for name in llm_datadist_v1.__all__ if getattr(llm_datadist_v1, name) is not first[name]],
    llm_datadist.CacheManager.__name__, llm_datadist.Memtype is llm_datadist_v1.MemType]))
"""
    assert run(code) == [[], ["Cache"], [], "CacheManager", True]


def test_every_path_gives_the_one_object():
    code = f"""
owners, faults = {{}}, []
for module, names in {MODULES!r}.items():
    for name in names.split():
        found = getattr(importlib.import_module(module), name)
        if owners.setdefault(name, found) is not found:
            faults.append([module, name])
import llm_datadist
for name in llm_datadist.__all__:
    if owners.get(name, getattr(llm_datadist, name)) is not getattr(llm_datadist, name):
        faults.append(["llm_datadist", name])
print(json.dumps(faults))
"""
    assert run(code) == []


def test_every_module_says_what_it_has():
    code = f"""
print(json.dumps([[module, name] for module, names in {MODULES!r}.items() for name in names.split()
                  if name not in getattr(importlib.import_module(module), "__all__", names.split())
                  and name not in ("dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype")]))
"""
    assert run(code) == []


def test_import_is_light():
    modules = sorted({module for module in MODULES if not module.endswith(".tensor")})
    code = f"""
for module in {modules!r}:
    importlib.import_module(module)
print(json.dumps([name for name in sys.modules if name.split(".")[0] == "numpy" or name.startswith("llm_datadist.core")
                  or name in {list(STANDINS)!r}]))
"""
    assert run(code, with_standins=False) == []


@pytest.mark.parametrize("before, after", [(None, "0"), ("1", "1"), ("", "")])
def test_import_sets_the_variable_unless_it_is_set(before, after):
    code = f"""
import os
os.environ.pop("AUTO_USE_UC_MEMORY", None)
os.environ.update({ {} if before is None else {"AUTO_USE_UC_MEMORY": before} })
import llm_datadist
print(json.dumps(os.environ["AUTO_USE_UC_MEMORY"]))
"""
    assert run(code, with_standins=False) == after


def test_packing():
    from llm_datadist.v2 import llm_utils as utils

    none = 2**64 - 1
    desc = llm_datadist.CacheDesc(2, (3, 4), llm_datadist.DataType.DT_BF16, llm_datadist.Placement.HOST, 0, 1)
    assert utils.pack_cache_desc(desc) == (2, 27, 1, [3, 4], 0, False)
    assert utils.pack_cache_desc(desc, is_blocks=True)[-1] is True
    assert utils.pack_cache_key(llm_datadist.CacheKey(1, 2, 3, 4)) == (1, -1, 0, 2, 4, 3, False)
    assert utils.pack_cache_key(llm_datadist.CacheKey(1, 2)) == (1, -1, 0, 2, none, 0, False)
    assert utils.pack_cache_key_by_id(llm_datadist.CacheKeyByIdAndIndex(1, 2, 3)) == (1, 2, 3, none, none, 0, False)
    assert utils.pack_block_cache_key(llm_datadist.BlocksCacheKey(1, 2)) == (1, -1, 0, none, none, 2, True)
    assert utils.pack_mem_info(llm_datadist.MemInfo(llm_datadist.Memtype.MEM_TYPE_HOST, 5, 6)) == (1, 5, 6)

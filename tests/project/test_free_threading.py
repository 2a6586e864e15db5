"""Under an interpreter built without a global lock the package works with the lock on, and switches it on itself."""
import os
import subprocess
import sys
import sysconfig

import pytest

if not sysconfig.get_config_var("Py_GIL_DISABLED"):
    pytest.skip("a free-threaded interpreter is needed: make check-free-threaded", allow_module_level=True)

ENGINES = """
import sys
from llm_datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
engine = LLMDataDist(LLMRole.MIX, 1)
config = LLMConfig()
config.device_id = 0
config.enable_cache_manager = True
config.mem_pool_cfg = '{"memory_size": 1048576}'
engine.init(config.generate_options())
assert sys._is_gil_enabled()
cache = engine.cache_manager.allocate_cache(CacheDesc(2, [4, 16], DataType.DT_FLOAT16))
engine.cache_manager.copy_cache(cache, cache, 0, 1)
engine.cache_manager.deallocate_cache(cache)
engine.finalize()
"""


def run(**environ):
    without = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    return subprocess.run([sys.executable, "-c", ENGINES], env={**without, **environ}, cwd="/", text=True,
                          capture_output=True, timeout=60)


def test_the_first_compiled_module_switches_the_lock_on():
    done = run()
    assert done.returncode == 0, done.stderr
    assert "lock (GIL) has been enabled to load module 'llm_datadist." in done.stderr


def test_with_the_lock_on_from_the_start_there_is_nothing_to_warn_of():
    done = run(PYTHON_GIL="1")
    assert (done.returncode, done.stderr) == (0, "")

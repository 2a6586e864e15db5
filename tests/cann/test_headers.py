"""``include/`` stands in for CANN's own headers: with theirs in its place everything compiles as well."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.strict import INCLUDE

# As CANN spells them; ours are reached by the same paths.
HEADERS = ("acl/acl_rt.h", "acl/acl_base_rt.h", "hcomm/hcomm_res_defs.h", "cs/hixl_cs.h")
NAMES = ("ACL_ERROR_RT_SYS_DMA", "ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "ACL_ERROR_HOST_MEMORY_NOT_REGISTERED")
SOURCE = "#include \"llm_datadist/ldd_provider.h\"\n" + "".join(f"int value_{name} = {name};\n" for name in NAMES) + (
    "void fill(EndpointDesc *endpoints, uint32_t count);\n"
    "void fill(EndpointDesc *endpoints, uint32_t count) { EndpointDescInit(endpoints, count); }\n")


def compile_with(tree, tmp_path):
    """Compile what the core includes, as C++ (hixl_cs.h of CANN is C++ alone), with these headers before ours."""
    compiler = shutil.which("g++") or pytest.skip("no g++ here")
    source = tmp_path / "all.cpp"
    source.write_text(SOURCE, encoding="ascii")
    done = subprocess.run([compiler, "-std=gnu++17", "-D_GNU_SOURCE", "-Wall", f"-I{tree}", f"-I{INCLUDE}", "-c",
                           str(source), "-o", str(tmp_path / "all.o"), "-H"],
                          capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_tree_of_forwarding_headers_takes_the_place_of_ours(tmp_path):
    tree = tmp_path / "toolkit"
    for header in HEADERS:
        path = tree / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#include "{INCLUDE / header}"\n', encoding="ascii")
    included = compile_with(tree, tmp_path)
    for header in ("acl/acl_rt.h", "cs/hixl_cs.h"):
        assert str(tree / header) in included


def test_the_toolkit_s_own_headers_take_the_place_of_ours(tmp_path):
    home = os.environ.get("ASCEND_HOME_PATH", "")
    tree = Path(home) / "include"
    if not home or not (tree / "acl" / "acl_rt.h").is_file():
        pytest.skip("no toolkit here")
    compile_with(tree, tmp_path)

"""The headers and the library agree with the documented interface: sizes, offsets, numbers and symbols."""
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llm_datadist.core.base.provider import HOST_LIBRARY

INCLUDE = Path(__file__).resolve().parents[2] / "include"
HEADERS = ["acl/acl_base_rt.h", "acl/acl_rt.h", "hcomm/hcomm_res_defs.h", "cs/hixl_cs.h", "llm_datadist/ldd_ext.h",
           "llm_datadist/ldd_status.h", "llm_datadist/ldd_sync.h", "llm_datadist/ldd_provider.h"]
STRICT = ["-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", f"-I{INCLUDE}"]

# struct: (size, {field: offset}), as on 64-bit Linux
LAYOUTS = {
    "aclrtMemLocation": (8, {"id": 0, "type": 4}),
    "aclrtPtrAttributes": (28, {"location": 0, "pageSize": 8, "rsv": 12}),
    "aclrtPhysicalMemProp": (32, {"handleType": 0, "allocationType": 4, "memAttr": 8, "location": 12, "reserve": 24}),
    "aclrtMemAccessDesc": (24, {"flags": 0, "location": 4, "rsv": 12}),
    "aclrtMemcpyBatchAttr": (32, {"dstLoc": 0, "srcLoc": 8, "rsv": 16}),
    "aclrtMemFabricHandle": (128, {}),
    "HixlServerConfig": (128, {"global_resource_config": 0, "reserved": 8}),
    "HixlClientConfig": (128, {"global_resource_config": 0, "reserved": 8}),
    "HixlServerDesc": (128, {"endpoint_list": 0, "server_ip": 8, "server_port": 16, "endpoint_list_num": 20,
                             "reserved": 24}),
    "HixlClientDesc": (128, {"local_endpoint": 0, "remote_endpoint": 8, "server_ip": 16, "server_port": 24, "tc": 28,
                             "sl": 29, "reserved": 30}),
    "HixlOneSideOpDesc": (24, {"remote_buf": 0, "local_buf": 8, "len": 16}),
    "CommMem": (24, {"type": 0, "addr": 8, "size": 16}),
    "EndpointDesc": (160, {"protocol": 0, "commAddr": 4, "loc": 44, "raws": 108}),
    "CommAddr": (40, {"type": 0, "addr": 4, "addr6": 4, "id": 4, "eid": 4}),
    "EndpointLoc": (64, {"locType": 0, "device": 4, "host": 4}),
}
NUMBERS = {
    "ACL_MEMCPY_DEVICE_TO_DEVICE": 3, "ACL_MEM_MALLOC_HUGE_ONLY": 1, "ACL_EVENT_RECORDED_STATUS_COMPLETE": 1,
    "ACL_STREAM_STATUS_NOT_READY": 1, "ACL_MEM_LOCATION_TYPE_DEVICE": 1, "ACL_HOST": 1,
    "ACL_ERROR_INVALID_PARAM": 100000, "ACL_ERROR_REPEAT_INITIALIZE": 100002, "ACL_ERROR_RT_PARAM_INVALID": 107000,
    "ACL_ERROR_RT_CONTEXT_NULL": 107002, "ACL_ERROR_RT_STREAM_ABORT": 107023,
    "ACL_ERROR_RT_FEATURE_NOT_SUPPORT": 207000, "ACL_ERROR_RT_MEMORY_ALLOCATION": 207001,
    "ACL_ERROR_RT_DEVICE_OOM": 207018, "ACL_ERROR_RT_STREAM_SYNC_TIMEOUT": 507046,
    "ACL_ERROR_RT_EVENT_SYNC_TIMEOUT": 507047, "ACL_ERROR_RT_DEVICE_MEM_ERROR": 507053,
    "ACL_ERROR_RT_SUSPECT_REMOTE_ERROR": 507057, "HIXL_PARAM_INVALID": 103900, "HIXL_TIMEOUT": 103901,
    "HIXL_UNSUPPORTED": 103905, "HIXL_RESOURCE_EXHAUSTED": 203900, "HIXL_FAILED": 503900,
    "HIXL_COMPLETE_STATUS_FAILED": 3, "COMM_MEM_TYPE_INVALID": -1, "COMM_MEM_TYPE_HOST": 1, "COMM_PROTOCOL_UBG": 9,
    "COMM_PROTOCOL_RESERVED": -1, "COMM_ADDR_TYPE_EID": 3, "ENDPOINT_LOC_TYPE_HOST": 1,
}


def compiler(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    return path


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(("name", "suffix", "standard"), [
    ("gcc", "c", "gnu11"), ("clang", "c", "gnu11"), ("g++", "cpp", "gnu++17")])
def test_a_header_stands_alone(tmp_path, header, name, suffix, standard):
    source = tmp_path / f"one.{suffix}"
    source.write_text(f'#include "{header}"\n')
    pedantic = ["-Wpedantic"] if suffix == "c" else []        # unions without a name are C11, and an extension in C++
    run(compiler(name), f"-std={standard}", *STRICT, *pedantic, "-c", str(source), "-o", str(tmp_path / "one.o"))


def test_layouts_and_numbers_are_the_documented_ones(tmp_path):
    """The compiler checks them, so that it may be one for another processor."""
    expected = {f"sizeof({struct})": size for struct, (size, _) in LAYOUTS.items()}
    expected.update((f"offsetof({struct}, {field})", offset)
                    for struct, (_, fields) in LAYOUTS.items() for field, offset in fields.items())
    expected.update(NUMBERS)
    lines = ["#include <stddef.h>", *(f'#include "{header}"' for header in HEADERS)]
    lines += [f'_Static_assert({what} == {value}, "{what} is not {value}");' for what, value in expected.items()]
    source = tmp_path / "layouts.c"
    source.write_text("\n".join([*lines, ""]))
    run(compiler("gcc"), "-std=gnu11", *STRICT, "-c", str(source), "-o", str(tmp_path / "layouts.o"))


def table_names():
    text = (INCLUDE / "llm_datadist" / "ldd_provider.h").read_text()
    names = re.findall(r"\bX\((\w+)\)", text)
    assert len(names) > 40
    return names


def test_the_library_exports_the_whole_table():
    library = ctypes.CDLL(HOST_LIBRARY)
    assert [name for name in table_names() if not hasattr(library, name)] == []


def test_the_library_exports_nothing_else_and_needs_no_python():
    nm = compiler("nm")
    exported = {line.split()[-1] for line in run(nm, "-D", "--defined-only", HOST_LIBRARY).splitlines()}
    assert {name for name in exported if not re.match(r"(acl|Hixl|Ldd)[A-Z]|aclrt", name)} == set()
    needed = {line.split()[-1] for line in run(nm, "-D", "--undefined-only", HOST_LIBRARY).splitlines()}
    assert {name for name in needed if name.startswith(("Py", "_Py"))} == set()


def test_every_table_name_is_declared_by_a_header_and_by_the_core():
    declared = "".join((INCLUDE / header).read_text() for header in HEADERS[:5])
    core = (INCLUDE.parent / "llm_datadist" / "core" / "base" / "provider.pxd").read_text()
    for name in table_names():
        assert re.search(rf"\b{name}\(", declared), name
    # Two are called while the table is filled, and by nobody later.
    assert set(table_names()) - set(re.findall(r"\(\*((?:acl|Hixl|Ldd)\w+)\)", core)) == {
        "aclrtGetDeviceCount", "aclrtGetVersion"}

"""Opening a provider: which libraries are taken, and what is said when one cannot be."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_datadist.core.base.provider import CAPABILITIES, HOST_LIBRARY, Provider
from llm_datadist.status import LLMException, LLMNotEnabledError, LLMParamInvalidError, LLMStatusCode


@pytest.fixture(autouse=True)
def no_toolkit(monkeypatch):
    """No toolkit that this machine may have is found unless a test points at one."""
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)


def run_elsewhere(code, *args, home="", library_path=""):
    """Run Python code in a new process, where no library is loaded yet; return the lines it prints."""
    environ = {**os.environ, "ASCEND_HOME_PATH": str(home), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(library_path), environ.get("LD_LIBRARY_PATH")]))
    # At "/": python -c looks for modules in its directory first, and the sources are not the installed package.
    done = subprocess.run([sys.executable, "-c", code, *args], env=environ, cwd="/", capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def open_elsewhere(which, home="", library_path=""):
    """Open a provider in a new process; return what it is, or the error, as lines."""
    code = (
        "import sys\n"
        "from llm_datadist.core.base.provider import Provider\n"
        "try:\n"
        "    p = Provider.open(sys.argv[1])\n"
        "    print(p.name, p.libraries['acl'], p.libraries['hixl'], ','.join(sorted(p.capabilities)), sep='\\n')\n"
        "    print(p.why_not_cann)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.status_code.name, error, sep='\\n')\n"
    )
    return run_elsewhere(code, which, home=home, library_path=library_path)


def toolkit(root, **files):
    """A directory that looks like an installed toolkit: library name -> file it links to."""
    lib = Path(root) / "lib64"
    lib.mkdir(parents=True)
    for name, target in files.items():
        (lib / f"{name}.so").symlink_to(target)
    return Path(root)


def stub_library(path, source):
    """Compile a shared library from C text."""
    gcc = shutil.which("gcc") or pytest.skip("no gcc here")
    done = subprocess.run([gcc, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=source, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return path


def test_the_host_provider_opens_whole():
    provider = Provider.open("host")
    assert provider.name == "host"
    assert provider.libraries == {"acl": HOST_LIBRARY, "hixl": HOST_LIBRARY}
    assert provider.capabilities <= set(CAPABILITIES)
    assert provider.version.count(".") == 2
    assert provider.why_not_cann == ""
    assert "'host'" in repr(provider)


def test_a_provider_comes_from_open_only():
    with pytest.raises(TypeError, match="open"):
        Provider()


def test_many_opens_share_the_library():
    providers = [Provider.open("host") for _ in range(100)]
    assert len({provider.libraries["acl"] for provider in providers}) == 1


def test_an_unknown_name_is_a_parameter_error():
    with pytest.raises(LLMParamInvalidError, match=r"'cuda'.*auto, host, cann"):
        Provider.open("cuda")
    with pytest.raises(TypeError):
        Provider.open(None)


def test_without_a_toolkit_cann_says_which_library_and_why():
    with pytest.raises(LLMNotEnabledError) as caught:
        Provider.open("cann")
    assert isinstance(caught.value, LLMException)
    assert caught.value.status_code is LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    for part in ("libacl_rt.so", "libascendcl.so", "ASCEND_HOME_PATH is not set", "No such file"):
        assert part in str(caught.value)


def test_auto_falls_back_to_the_host_and_keeps_the_reason():
    provider = Provider.open("auto")
    assert provider.name == "host"
    assert "libacl_rt.so" in provider.why_not_cann


@pytest.mark.parametrize("runtime", ["libacl_rt", "libascendcl"])
def test_a_toolkit_is_found_at_its_home(tmp_path, runtime):
    home = toolkit(tmp_path / "cann", **{runtime: HOST_LIBRARY, "libcann_hixl": HOST_LIBRARY})
    name, acl, hixl, capabilities, reason = open_elsewhere("cann", home)
    assert (name, reason) == ("cann", "")
    assert acl == f"{home}/lib64/{runtime}.so"
    assert os.path.samefile(hixl, HOST_LIBRARY)               # the loader opens one file once, under its first name
    assert set(capabilities.split(",")) == Provider.open("host").capabilities
    assert open_elsewhere("auto", home)[0] == "cann"          # its runtime counts devices


def test_a_toolkit_is_found_on_the_path_of_the_loader(tmp_path):
    home = toolkit(tmp_path, libacl_rt=HOST_LIBRARY, libcann_hixl=HOST_LIBRARY)
    assert open_elsewhere("cann", library_path=home / "lib64")[0] == "cann"


def test_auto_passes_over_a_toolkit_without_devices(tmp_path, monkeypatch):
    home = toolkit(tmp_path, libacl_rt=HOST_LIBRARY, libcann_hixl=HOST_LIBRARY)
    monkeypatch.setenv("LLM_DATADIST_HOST_DEVICES", "0")
    lines = open_elsewhere("auto", home)
    assert lines[0] == "host"
    assert "no device" in lines[-1] and str(home) in lines[-1]


def test_a_missing_transfer_library_is_named(tmp_path):
    home = toolkit(tmp_path, libacl_rt=HOST_LIBRARY)
    kind, code, text = open_elsewhere("cann", home)
    assert (kind, code) == ("LLMNotEnabledError", "LLM_FEATURE_NOT_ENABLED")
    assert "libcann_hixl.so" in text and "No such file" in text


def test_a_missing_symbol_is_named_with_library_and_version(tmp_path):
    stub = stub_library(tmp_path / "stub.so", (
        "int aclrtGetVersion(int *a, int *b, int *c) { *a = 8; *b = 3; *c = 1; return 0; }\n"
        "int aclrtGetDeviceCount(unsigned *n) { *n = 1; return 0; }\n"))
    home = toolkit(tmp_path / "cann", libacl_rt=stub, libcann_hixl=HOST_LIBRARY)
    kind, code, text = open_elsewhere("cann", home)
    assert (kind, code) == ("LLMNotEnabledError", "LLM_FEATURE_NOT_ENABLED")
    assert f"{home}/lib64/libacl_rt.so lacks symbol aclrtSetDevice (runtime version 8.3.1)" in text
    home = toolkit(tmp_path / "other", libacl_rt=HOST_LIBRARY, libcann_hixl=stub)
    assert f"{home}/lib64/libcann_hixl.so lacks symbol HixlCSServerCreate" in open_elsewhere("cann", home)[2]


def test_a_library_that_does_not_load_is_reported_with_its_own_reason(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"this is no library" * 100)
    home = toolkit(tmp_path / "cann", libacl_rt=broken)
    text = open_elsewhere("cann", home)[2]
    assert f"{home}/lib64/libacl_rt.so: invalid ELF header" in text


def test_a_copy_that_is_loaded_already_is_taken_first(tmp_path):
    loaded = stub_library(tmp_path / "libacl_rt.so", "int marker;\n")
    home = toolkit(tmp_path / "cann", libacl_rt=HOST_LIBRARY, libcann_hixl=HOST_LIBRARY)
    code = (
        "import ctypes, sys\n"
        "ctypes.CDLL('libacl_rt.so')\n"
        "from llm_datadist.core.base.provider import Provider\n"
        "try:\n"
        "    Provider.open('cann')\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    (text,) = run_elsewhere(code, home=home, library_path=tmp_path)
    assert f"{loaded} lacks symbol" in text

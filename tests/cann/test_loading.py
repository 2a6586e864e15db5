"""Which of CANN's symbols are needed: each of them missing in turn."""
import os
import re
import subprocess
import sys

import pytest
from support.peer import engine_options
from support.strict import INCLUDE, build, comm_res, compile_objects, environment

from llm_datadist import LLMException, LLMRole
from llm_datadist.core.base.provider import Provider
from llm_datadist.status import LLMNotEnabledError

TABLE = (INCLUDE / "llm_datadist" / "ldd_provider.h").read_text(encoding="utf-8")


def names(which):
    """The functions of one list of the table."""
    block = re.search(rf"#define {which}\(X\)((?:.*\\\n)*.*\n)", TABLE).group(1)
    return re.findall(r"\bX\((\w+)\)", block)


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Homes of the stand-in without one of its symbols, by that symbol."""
    folder = tmp_path_factory.mktemp("loading")
    objects = compile_objects(folder)

    def without(symbols):
        return {symbol: str(build(folder / symbol, hidden=(symbol,), objects=objects)) for symbol in symbols}

    return without


def open_each(node, homes, which):
    """Open a provider from each home; what is said of it."""
    said = {}
    for symbol, home in homes.items():
        os.environ["ASCEND_HOME_PATH"] = home
        try:
            provider = Provider.open(which)
            said[symbol] = provider.name, provider.why_not_cann
        except LLMException as error:
            said[symbol] = type(error).__name__, str(error)
    return said


@pytest.mark.parametrize("which", ["ACL_REQUIRED", "HIXL_REQUIRED"])
def test_each_required_symbol_is_missed_by_name(homes, peers, toolkit, which):
    symbols = names(which)
    assert len(symbols) > 10
    found = homes(symbols)
    child = peers.child(environment(toolkit, LDD_TEST_STRICT=""))
    library = "libacl_rt.so" if which == "ACL_REQUIRED" else "libcann_hixl.so"
    for symbol, (kind, text) in child.call(open_each, found, "cann").items():
        assert kind == LLMNotEnabledError.__name__
        # One file under two names is opened once, under the first of them.
        assert f"{found[symbol]}/lib64/" in text and f"lacks symbol {symbol} (runtime version 1.0.0)" in text, library
    for symbol, (name, why) in child.call(open_each, found, "auto").items():
        assert name == "host" and symbol in why


def live_with_each(node, homes):
    """Initialise and finalise an engine over each home."""
    for home in homes.values():
        os.environ["ASCEND_HOME_PATH"] = home
        options = engine_options(device_pool=1 << 20, host_pool=1 << 20)
        options["llm.LocalCommRes"] = comm_res("device-roce")
        node.start(2, options, LLMRole.MIX)
        assert node.dist.stats()["provider"] == "cann"
        node.finalize()
    return len(homes)


# The stand-in's device is known by another number than its user's: without the translation its endpoints are refused.
TRANSLATION = {"aclrtGetLogicDevIdByUserDevId", "aclrtGetPhyDevIdByLogicDevId"}


def test_each_optional_symbol_may_be_missing(homes, peers, toolkit):
    exported = {symbol for symbol in names("ACL_OPTIONAL") if symbol not in TRANSLATION}
    assert len(exported) > 5
    found = homes(sorted(exported))
    child = peers.child(environment(toolkit, LDD_TEST_STRICT=""))
    assert child.call(live_with_each, found) == len(exported)


def test_auto_without_devices_names_the_runtime(toolkit):
    code = "from llm_datadist.core.base.provider import Provider; print(Provider.open('auto').why_not_cann)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True,
                          env={**os.environ, **environment(toolkit, LLM_DATADIST_HOST_DEVICES="0")}, timeout=100)
    assert "no device" in done.stdout and "libacl_rt.so" in done.stdout

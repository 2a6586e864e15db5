"""``top``, ``leaks``, ``metrics`` and ``trace`` against two linked processes."""
import importlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from observe.steps import DESC, drop, publish, pull, pull_in_vain
from support.peer import engine_options

from llm_datadist import CacheKey, LLMRole
from llm_datadist.tools.observe import extra
from llm_datadist.tools.observe.metrics import BOUNDS_NS, cumulative

DOCS = Path(__file__).resolve().parents[2] / "docs"
parser = pytest.importorskip("prometheus_client.parser")
openmetrics = importlib.import_module("prometheus_client.openmetrics.parser")
pytest.importorskip("rich")


def run_tool(*arguments):
    return subprocess.run([sys.executable, "-m", "llm_datadist.tools", *arguments], capture_output=True, text=True,
                          timeout=60, check=False)


@pytest.fixture
def pair(peers):
    """Decode (1) that pulled ten of twelve caches from prefill (2), and failed once."""
    prefill = peers.start(2, engine_options(), role=LLMRole.PROMPT)
    decode = peers.start(1, engine_options(), role=LLMRole.DECODER)
    peers.link(decode, prefill)
    prefill.call(publish, 10, 12)
    decode.call(pull, 10, 10)
    decode.call(pull_in_vain, 99)
    yield decode, prefill
    prefill.call(drop, 20, 2)


def of(found, process):
    (engine,) = [engine for engine in found["engines"] if engine["pid"] == process.pid]
    return engine


def test_top(pair):
    decode, prefill = pair
    done = run_tool("top", "--once", "--json", "--interval", "0.1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    engine = of(found, decode)
    assert engine["role"] == "decoder" and engine["links"] == 1 and engine["keys"] == 0
    pulls = engine["peers"][0]["operations"]["pull"]
    assert (pulls["count"], pulls["failures"], pulls["bytes"], pulls["rate_per_s"]) == (11, 1, 10 * 2 * 4096, 0)
    assert 0 < pulls["p50_us"] <= pulls["p99_us"]
    engine = of(found, prefill)
    assert engine["listener"] == f"127.0.0.1:{prefill.address[1]}" and engine["caches"] == engine["keys"] == 2
    assert engine["oldest_key"]["id"] == 20 and engine["device_pool"]["used_bytes"] == 2 * 2 * 4096
    done = run_tool("top", "--once", "--interval", "0")
    assert done.returncode == 0 and "decoder" in done.stdout and "pull" in done.stdout and "req 20" in done.stdout


def test_top_without_an_engine():
    done = run_tool("top", "--once", "--interval", "0")
    if done.returncode:                             # engines of others may run on this host
        assert "no engine" in done.stdout


def test_leaks(pair):
    _, prefill = pair
    done = run_tool("leaks", "--older-than", "3600", "--cluster", "2")
    assert (done.returncode, done.stderr) == (0, "") and "nothing is held" in done.stdout
    time.sleep(0.05)
    done = run_tool("leaks", "--older-than", "0.05", "--json")
    assert done.returncode == 1, done.stderr
    engine = of(json.loads(done.stdout), prefill)
    assert engine["pullers"] == [1] and engine["bytes"] == 2 * 2 * 4096
    assert [cache["keys"][0]["id"] for cache in engine["held"]] == [20, 21]
    assert not engine["held"][0]["open"]
    done = run_tool("leaks", "--older-than", "0.05", "--limit", "1")
    assert done.returncode == 1 and "req 20" in done.stdout and "can pull: 1" in done.stdout
    assert run_tool("leaks", "--older-than", "soon").returncode == 2


def keep(node):
    """Hold one cache by a key and one by its handle; the lines that did so."""
    cache = node.cache_manager.allocate_cache(DESC, [CacheKey(2, 30)])
    node.kept["open"] = node.cache_manager.allocate_blocks_cache(DESC)
    node.cache_manager.deallocate_cache(cache)
    return keep.__code__.co_firstlineno + 2, [row["place"] for row in node.dist.leaks()]


def let_go(node):
    node.cache_manager.remove_cache_key(CacheKey(2, 30))
    node.cache_manager.deallocate_blocks_cache(node.kept.pop("open"))


@pytest.mark.parametrize("traced", [True, False])
def test_leaks_name_the_place_that_allocated(peers, traced):
    prefill = peers.start(2, {**engine_options(), "llm.Trace": str(int(traced))}, role=LLMRole.PROMPT)
    line, places = prefill.call(keep)
    wanted = [f"{__file__}:{line}", f"{__file__}:{line + 1}"] if traced else [None, None]
    assert places == wanted
    done = run_tool("leaks", "--older-than", "0", "--open", "--json")
    assert done.returncode == 1, done.stderr
    assert [cache["place"] for cache in of(json.loads(done.stdout), prefill)["held"]] == wanted
    done = run_tool("leaks", "--older-than", "0", "--cluster", "2")
    assert (f"{Path(__file__).name}:{line}" in done.stdout.replace("\n", "")) == traced
    prefill.call(let_go)


def value_of(families, name, **labels):
    found = [sample.value for family in families for sample in family.samples
             if sample.name == name and labels.items() <= sample.labels.items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def check_metrics(families):
    decode = {"cluster": "1", "role": "decoder", "peer": "2", "operation": "pull"}
    assert value_of(families, "llm_datadist_operation_seconds_count", **decode) == 11
    assert value_of(families, "llm_datadist_operation_failures_total", **decode) == 1
    assert value_of(families, "llm_datadist_operation_bytes_total", **decode) == 10 * 2 * 4096
    assert 0 < value_of(families, "llm_datadist_operation_seconds_sum", **decode) < 60
    buckets = [sample.value for family in families for sample in family.samples
               if sample.name == "llm_datadist_operation_seconds_bucket" and decode.items() <= sample.labels.items()]
    assert buckets == sorted(buckets) and buckets[-1] == 11
    prefill = {"cluster": "2", "role": "prompt"}
    assert value_of(families, "llm_datadist_keys", **prefill) == 2
    assert value_of(families, "llm_datadist_caches", **prefill, kind="owned") == 2
    assert value_of(families, "llm_datadist_pool_used_bytes", **prefill, pool="device") == 2 * 2 * 4096
    assert value_of(families, "llm_datadist_links", **prefill, peer="1") == 1
    assert value_of(families, "llm_datadist_engine_start_time_seconds", **prefill) == pytest.approx(time.time(), abs=60)


def test_metrics_as_a_file(pair, tmp_path):
    path = tmp_path / "llm_datadist.prom"
    done = run_tool("metrics", "--textfile", str(path))
    assert done.returncode == 0, done.stderr
    check_metrics(list(parser.text_string_to_metric_families(path.read_text())))
    done = run_tool("metrics", "--textfile", str(tmp_path / "none" / "x.prom"))
    assert done.returncode == 2 and "none" in done.stderr
    assert run_tool("metrics", "--listen", "here").returncode == 2


def test_metrics_over_http(pair):
    process = subprocess.Popen([sys.executable, "-m", "llm_datadist.tools", "metrics", "--listen", "127.0.0.1:0"],
                               stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
        assert text.endswith("# EOF\n")
        check_metrics(list(openmetrics.text_string_to_metric_families(text)))
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def test_every_documented_metric_is_exported(pair, tmp_path):
    path = tmp_path / "llm_datadist.prom"
    run_tool("metrics", "--textfile", str(path))
    exported = {family.name for family in parser.text_string_to_metric_families(path.read_text())}
    page = (DOCS / "observability.md").read_text()
    documented = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `llm_datadist_")}
    assert {name.removesuffix("_total") for name in documented} == exported
    board = json.loads((DOCS / "grafana-dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = {word for word in target["expr"].replace("{", " ").replace("(", " ").replace("[", " ").split()
                             if word.startswith("llm_datadist_")}
            assert names, panel["title"]
            for name in names:
                base = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
                assert base.removesuffix("_total") in exported, name


def test_exported_buckets():
    assert BOUNDS_NS[0] == 1024
    from llm_datadist.observe.layout import BUCKET_BOUNDS_NS

    assert set(BOUNDS_NS) <= set(BUCKET_BOUNDS_NS)
    buckets = [1] * len(BUCKET_BOUNDS_NS)
    found = cumulative(buckets)
    assert found[-1] == ("+Inf", len(buckets))
    assert found[0] == (repr(1024 / 1e9), BUCKET_BOUNDS_NS.index(1024) + 1)


def test_trace_of_a_command(tmp_path):
    path = tmp_path / "run.json"
    script = tmp_path / "engine.py"
    script.write_text(
        "import os, signal\n"
        "from llm_datadist import *\n"
        "config = LLMConfig(); config.device_id = 0; config.enable_cache_manager = True\n"
        "config.mem_pool_cfg = '{\"memory_size\": 1048576}'\n"
        "engine = LLMDataDist(LLMRole.PROMPT, 5); engine.init(config.generate_options())\n"
        "engine.cache_manager.allocate_cache(CacheDesc(1, [1, 64], DataType.DT_UINT8), [CacheKey(5, 77)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n")
    done = run_tool("trace", "-o", str(path), "--", sys.executable, str(script))
    assert done.returncode == 128 + 9 and "1 engines" in done.stderr
    entries = json.loads(path.read_text())["traceEvents"]
    assert [entry["args"]["bytes"] for entry in entries if entry["name"] == "allocate"] == [64]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("llm-datadist-trace-")]


@pytest.mark.parametrize("options, text", [
    ([], "a command is needed"),
    (["-o", "/nowhere/x.json", "--", "true"], "/nowhere/x.json"),
    (["-o", "PATH", "--", "true"], "nothing to show"),
    (["-o", "PATH", "--folder", "/nowhere"], "/nowhere"),
])
def test_trace_says_what_is_wrong(options, text, tmp_path):
    path = tmp_path / "x.json"
    done = run_tool("trace", *[str(path) if option == "PATH" else option for option in options])
    assert done.returncode == 2 and text in done.stderr
    assert not path.exists()


def test_a_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(extra.MissingExtra, match=r"needs the package rich.*pip install 'llm-datadist\[tools\]'"):
        extra.require("rich.console", "top")

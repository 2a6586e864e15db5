"""``llm-datadist bench`` and ``kvbench`` from the command line, on sweeps small enough for a test."""
import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from llm_datadist.tools.bench import kvcommand
from llm_datadist.tools.bench.models import MODELS

TINY = ("--block-size", "4K", "--blocks", "5", "--tensors", "3", "--seconds", "0.05", "--threads", "1")


def run_tool(*arguments, timeout=90, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "llm_datadist.tools", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One sweep over paths and memories, with all files but the PNG."""
    where = tmp_path_factory.mktemp("bench")
    files = {name: where / f"run.{name}" for name in ("json", "csv", "html", "markdown")}
    options = [text for name, path in files.items() for text in (f"--{name}", path)]
    result = run_tool("bench", *TINY, "--path", "shm,cma,tcp", "--memory", "pool,registered", "--figures", "allocate",
                      *options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result, json.loads(files["json"].read_text()), files


def test_rows_carry_rates_and_their_bounds(tiny):
    _, result, _ = tiny
    assert [(row["path"], row["memory"]) for row in result["rows"]] == [
        ("shm", "pool"), ("cma", "pool"), ("cma", "registered"), ("tcp", "pool"), ("tcp", "registered")]
    for row in result["rows"]:
        assert row["num_bytes"] == 4096 * 5 * 3
        assert row["wrong_bytes"] == 0
        assert row["gb_per_s"] > 0 and row["fraction"] > 0 and row["cpu_s_per_gb"] > 0
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"]
        assert row["reference"] in row["references"]
        assert len(row["samples"]["op_ns"]) == len(row["samples"]["fraction"]) >= 5
    assert {name for row in result["rows"] for name in row["references"]} >= {
        "memcpy", "process_vm_readv", "sockets, 1 thread"}


def test_result_says_where_it_comes_from(tiny):
    _, result, _ = tiny
    assert result["machine"]["cpus"] >= 1 and result["machine"]["version"]
    assert result["command"].startswith("llm-datadist bench --block-size 4K") and "run.json" not in result["command"]
    assert result["failures"] == [] and len(result["skipped"]) == 1        # registered memory cannot be mapped
    assert result["figures"][0]["figure"] == "allocate"
    assert {goal["reached"] for goal in result["goals"]} <= {True, False, None}


def test_table_and_files_show_every_row(tiny):
    shown, result, files = tiny
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [line["name"] for line in lines if line["kind"] == "row"] == [row["label"] for row in result["rows"]]
    assert any(line["name"] == "allocate.pair_us" for line in lines)
    page = files["html"].read_text()
    assert "Plotly.newPlot(" in page
    assert not re.search(r'(src|href)="', re.sub(r"<script.*?</script>", "", page, flags=re.S))     # it loads nothing
    assert not re.search(r"<script[^>]*src", page)
    for row in result["rows"]:
        assert row["label"] in shown.stdout
        assert row["label"] in page and row["label"] in files["markdown"].read_text()


def test_markdown_keeps_what_is_around_the_figures(tiny, tmp_path):
    _, _, files = tiny
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    result = run_tool("bench", "report", files["json"], "--markdown", page)
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "pull_blocks shm/pool" in text


def test_png_or_a_notice(tiny, tmp_path):
    _, _, files = tiny
    picture = tmp_path / "run.png"
    result = run_tool("bench", "report", files["json"], "--png", picture)
    if picture.exists():
        assert result.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert result.returncode == 2 and "--png: a PNG needs matplotlib" in result.stderr
        result = run_tool("bench", "--png", picture)            # before anything is measured
        assert (result.returncode, result.stdout) == (2, "")


def test_a_report_of_nothing_is_refused(tiny):
    _, _, files = tiny
    result = run_tool("bench", "report", files["json"])
    assert result.returncode == 2 and "--html" in result.stderr


@pytest.mark.parametrize("operation", ["pull_cache", "pull_key", "push_blocks", "push_cache"])
def test_every_operation(operation, tmp_path):
    target = tmp_path / "run.json"
    result = run_tool("bench", *TINY, "--operation", operation, "--path", "shm,tcp", "--json", target)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(target.read_text())["rows"]
    assert [(row["operation"], row["wrong_bytes"]) for row in rows] == [(operation, 0)] * 2


def test_runs_links_and_connections(tmp_path):
    target = tmp_path / "run.json"
    result = run_tool("bench", *TINY, "--run", "2,all", "--links", "2", "--path", "shm,tcp", "--streams", "1",
                      "--json", target)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 4 and all(row["num_bytes"] == 2 * 4096 * 5 * 3 and not row["wrong_bytes"] for row in rows)


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_a_wrong_byte_is_noticed(operation):
    result = run_tool("bench", *TINY, "--operation", operation, "--run", "1,all", "--corrupt", "1")
    assert result.returncode == 1
    verdicts = [line.split("  ")[-2].strip() for line in result.stdout.splitlines() if operation in line]
    assert verdicts == ["same", "WRONG"], result.stdout
    assert "1 wrong bytes, the first at link 0, tensor 2" in result.stderr


def test_a_row_that_fails_does_not_stop_the_others(tmp_path):
    target = tmp_path / "run.json"
    # No machine has this much memory to give; the pool of the second row cannot be had.
    result = run_tool("bench", "--operation", "pull_cache", "--block-size", "4K,1023G", "--tensors", "1", "--seconds",
                      "0.05", "--threads", "1", "--json", target)
    found = json.loads(target.read_text())
    if not found["failures"]:
        pytest.skip("this host gives any amount of memory")
    assert result.returncode == 1
    assert [row["block_bytes"] for row in found["rows"]] == [4096]
    assert "1023 GiB" in found["failures"][0]["name"] and "FAILED" in result.stderr


@pytest.mark.parametrize("arguments, complaint", [
    (("--block-size", "4X"), "4X"),
    (("--block-size", "0"), "0"),
    (("--path", "warp"), "warp"),
    (("--figures", "nonsense"), "nonsense"),
    (("--preset", "goals", "--blocks", "3"), "--preset"),
    (("--threads", "0"), "num_threads"),
    (("--path", "shm", "--memory", "registered"), "nothing to map"),
    (("--block-size", "4K", "--corrupt", "1"), "--corrupt"),
    (("--seconds", "0"), "--seconds"),
    (("--connect", "nowhere"), "nowhere"),
    (("report", "/does/not/exist", "--csv", "x.csv"), "/does/not/exist"),
    (("--json", "/does/not/exist/x.json"), "--json /does/not/exist/x.json: there is no folder"),
    (("--html", "/tmp"), "--html /tmp: this is a folder"),
])
def test_bad_options_exit_2_and_say_why(arguments, complaint):
    result = run_tool("bench", *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr and "Traceback" not in result.stderr


def _results(path, fractions, wait_us):
    row = {"key": "k", "label": "a row", "samples": {"op_ns": [1.0] * len(fractions), "fraction": fractions}}
    value = {"name": "late_us", "unit": "us", "value": 1.0, "samples": wait_us}
    path.write_text(json.dumps({"format": 1, "rows": [row], "figures": [{"figure": "wait", "values": [value]}]}))
    return path


def test_compare_tells_change_from_noise(tmp_path):
    noise = [1 + 0.01 * (index % 5) for index in range(40)]
    base = _results(tmp_path / "base.json", noise, noise)
    same = _results(tmp_path / "same.json", noise[2:] + noise[:2], noise)
    slow = _results(tmp_path / "slow.json", [0.8 * each for each in noise], noise)
    fast = _results(tmp_path / "fast.json", [1.2 * each for each in noise], [0.5 * each for each in noise])
    for other, text, status in ((same, "0 better, 0 worse", 0), (slow, "0 better, 1 worse", 1),
                                (fast, "2 better, 0 worse", 0)):
        result = run_tool("bench", "compare", base, other, "--fail-on-regression")
        assert result.returncode == status, result.stdout
        assert text in result.stdout
    assert run_tool("bench", "compare", base, slow).returncode == 0
    assert "a row" in run_tool("bench", "compare", base, same, "--all").stdout
    assert run_tool("bench", "compare", base, tmp_path / "missing.json").returncode == 2


def test_between_two_commands():
    """One command listens and another connects, as they would on two hosts."""
    server = subprocess.Popen(
        [sys.executable, "-m", "llm_datadist.tools", "bench", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    watchdog = threading.Timer(60, server.kill)
    watchdog.start()
    try:
        port = re.search(r"127\.0\.0\.1:(\d+)", server.stdout.readline()).group(1)
        result = run_tool("bench", *TINY, "--path", "shm,tcp", "--connect", f"127.0.0.1:{port}")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "needs both processes on one host" in result.stdout
        assert "pull_blocks tcp/pool" in result.stdout and " same " in result.stdout
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
        assert server.returncode == 0 and errors == ""
    finally:
        watchdog.cancel()
        server.kill()
        server.communicate()


def test_an_interrupted_run_leaves_no_process():
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_datadist.tools", "bench", "--block-size", "4K", "--blocks", "4", "--tensors", "2",
         "--seconds", "60"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if "GB/s" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_kvbench_reports_requests(tmp_path):
    target = tmp_path / "kv.json"
    result = run_tool("kvbench", "--model", "qwen2.5-7b,deepseek-v3", "--tokens", "32", "--path", "shm", "--seconds",
                      "0.05", "--threads", "1", "--json", target)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["model"]: row for row in json.loads(target.read_text())["rows"]}
    # Layers x (keys and values) x heads x head size x 2 bytes, and layers x latent x 2 bytes, per token.
    assert rows["qwen2.5-7b"]["num_bytes"] == 32 * 28 * 2 * 4 * 128 * 2
    assert rows["deepseek-v3"]["num_bytes"] == 32 * 61 * (512 + 64) * 2
    assert all(not row["wrong_bytes"] for row in rows.values())
    assert "ms p50" in result.stdout and "deepseek-v3" in result.stdout


@pytest.mark.parametrize("arguments, complaint", [
    (("--model", "nonsense"), "--model 'nonsense'"), (("--tokens", "0"), "--tokens '0'"),
    (("--tokens", "x"), "--tokens 'x'"), (("--run", "-1"), "--run '-1'"), (("--block-tokens", "0"), "--block-tokens 0"),
    (("--tensor-parallel", "0"), "--tensor-parallel 0"), (("--seconds", "0"), "--seconds 0"),
    (("--path", "warp"), "warp"), (("--csv", "/does/not/exist/x.csv"), "--csv /does/not/exist/x.csv"),
])
def test_kvbench_bad_options_exit_2(arguments, complaint):
    result = run_tool("kvbench", *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert complaint in result.stderr and not result.stdout


def test_kvbench_shows_every_model_also_those_of_one_shape():
    parser = argparse.ArgumentParser()
    kvcommand.add_arguments(parser)
    plan, requests = kvcommand._plan(parser.parse_args(["--model", "all", "--tokens", "64", "--path", "shm"]))
    shown = [model for case in plan.cases for model, tokens in requests[case.key]]
    assert sorted(shown) == sorted(MODELS) and len(plan.cases) < len(MODELS)
    plan, requests = kvcommand._plan(parser.parse_args(["--model", "llama-3-8b", "--model", "qwen2.5-7b"]))
    assert {model for found in requests.values() for model, _ in found} == {"llama-3-8b", "qwen2.5-7b"}

"""The outcome of a run as files: JSON with everything in it, CSV with one line per row and per value."""
from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

FORMAT = 1
FILE_OPTIONS = ("--json", "--csv", "--html", "--markdown", "--png")
_CSV_COLUMNS = (
    "kind", "name", "operation", "path", "memory", "block_bytes", "num_blocks", "run_blocks", "num_tensors",
    "num_links", "num_threads", "num_streams", "num_bytes", "gb_per_s", "fraction", "reference", "p50_us", "p90_us",
    "p99_us", "cpu_s_per_gb", "wrong_bytes", "value", "unit",
)


class ResultError(ValueError):
    """A file is no result of a benchmark."""


def machine() -> dict:
    """Return what a reader needs to know about where a run took place."""
    info = {
        "cpu": _cpu_model(), "cpus": len(os.sched_getaffinity(0)), "memory_gib": round(_memory_bytes() / 2**30, 1),
        "kernel": platform.release(), "architecture": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "version": importlib.metadata.version("llm-datadist") if _is_installed() else "not installed",
    }
    commit = _commit()
    return {**info, "commit": commit} if commit else info


def load() -> list[float]:
    """Return the load averages of 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def write_json(path: str, result: Mapping) -> None:
    """Write everything."""
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_json(path: str) -> dict:
    """Read a file of `write_json`; raises ResultError when it is none, and OSError when it cannot be read."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ResultError(f"{path} is no result of llm-datadist bench (format {FORMAT})")
    return result


def write_csv(path: str, result: Mapping) -> None:
    """Write one line per row, and one per value of a figure."""
    with open(path, "w", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, _CSV_COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        for row in result["rows"]:
            writer.writerow({**row, "kind": "row", "name": row["label"]})
        for figure in result["figures"]:
            for value in figure["values"]:
                writer.writerow({**value, "kind": "figure", "name": f"{figure['figure']}.{value['name']}"})


def _is_installed() -> bool:
    try:
        importlib.metadata.version("llm-datadist")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as source:
            for line in source:
                name, _, value = line.partition(":")
                if name.strip() in ("model name", "Processor", "cpu model"):
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str:
    """Commit of the checkout this runs in, when it is one of this project."""
    if not (Path("llm_datadist").is_dir() and Path("pyproject.toml").is_file()):
        return ""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


def command_line(arguments: Sequence[str]) -> str:
    """Return how a run was started, without the files it was to write."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, has_value = argument.partition("=")[:2]
        if skip:
            skip = False
        elif name in FILE_OPTIONS:
            skip = not has_value
        else:
            kept.append(argument)
    return " ".join(["llm-datadist", *kept])

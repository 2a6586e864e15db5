"""Code blocks of the documentation, and programs that are written there as a pair."""
from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LIMIT_S = 60


def blocks(page: Path, language: str = "python") -> List[str]:
    """Return the code blocks of a page, without the indentation of a list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text("utf-8"), re.M | re.S)
    return [re.sub(rf"^{indent}", "", code, flags=re.M) for indent, code in found]


def programs(page: Path) -> Dict[str, str]:
    """Return the programs of a page: blocks that begin with the name of their file."""
    named = [(re.match(r"# (\w+\.py)\n", code), code) for code in blocks(page)]
    return {name.group(1): code for name, code in named if name}


def shown(page: Path) -> List[Tuple[str, str]]:
    """Return what the page says that its programs print, in the order in which they end."""
    (text,) = [code for code in blocks(page, "text") if code.startswith("$ python ")]
    return [(name, output) for name, output in re.findall(r"^\$ python (\w+\.py)\n((?:(?!\$ ).*\n)*)", text, re.M)]


def run_pair(directory: Path, files: Dict[str, str], first: str, second: str) -> Dict[str, str]:
    """Write programs, run `second` while `first` waits for a line, and return what either printed.

    Their port 26000 becomes a free one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, code in files.items():
        (directory / name).write_text(code.replace("26000", str(port)), encoding="utf-8")
    waits = subprocess.Popen([sys.executable, "-u", "-W", "error", first], cwd=directory, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with waits:
        try:
            output = ""
            assert waits.stdout is not None
            # The last line before it waits is the prompt of `input`.
            while not re.search(r"^(.*; )?(waiting|run decode.py, then press Enter)$", output, re.M):
                line = waits.stdout.readline()
                assert line, output
                output += line
            done = subprocess.run([sys.executable, "-W", "error", second], cwd=directory, capture_output=True,
                                  text=True, timeout=LIMIT_S, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            rest, _ = waits.communicate("\n", timeout=LIMIT_S)
            assert waits.returncode == 0, output + rest
        finally:
            waits.kill()
    return {first: (output + rest).replace(str(port), "26000"), second: done.stdout.replace(str(port), "26000")}

"""Say which lines ran in a tree that was built with ``LDD_COVERAGE=1``: ``report.py ROOT``.

The compiler counts, not Cython's line tracing: a traced line takes the GIL, also in ``nogil`` code, which stands still
for ever when it holds a mutex that somebody with the GIL waits for. The counters work in any thread and any process;
one that is killed does not write its own. Lines of C become lines of Cython by the comments in the generated files.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

# {file: {line: how often it ran}}
Counts = Dict[str, Dict[int, int]]

SOURCE = re.compile(r' */\* "(.+)":(\d+)$')
END = re.compile(r"}|/\* #### Code section")


def counted(root: Path) -> Iterator[Tuple[str, Dict[int, int]]]:
    """Yield (file, counts by line) of every file of each object that has run."""
    for data in sorted(root.rglob("*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(data)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        for text in done.stdout.splitlines():
            for file in json.loads(text)["files"]:
                lines: Dict[int, int] = defaultdict(int)
                for line in file["lines"]:
                    lines[line["line_number"]] += line["count"]
                yield file["file"], lines


def cython_lines(generated: Path) -> Dict[int, Tuple[str, int]]:
    """Return {line of a generated C file: (Cython file, line)}, for the lines that stand for one."""
    found, place = {}, None
    for number, text in enumerate(generated.read_text(encoding="utf-8").splitlines(), 1):
        match = SOURCE.match(text)
        if match:
            file = match.group(1)
            place = (file, int(match.group(2))) if file.startswith("llm_datadist/") else None    # not Cython's own
        elif END.match(text):
            place = None
        elif place is not None:
            found[number] = place
    return found


def coverage(root: Path) -> Counts:
    """Return the counts of all of our files; a line of Cython ran as often as the busiest line of its C code."""
    total: Counts = defaultdict(lambda: defaultdict(int))
    for name, lines in counted(root):
        if name.startswith("build/cython/"):
            places = cython_lines(root / name)
            for number, count in lines.items():
                if number in places:
                    file, line = places[number]
                    total[file][line] = max(total[file][line], count)
        elif name.startswith(("llm_datadist/", "include/")):
            for number, count in lines.items():
                total[name][number] += count
    return total


def ranges(numbers: List[int]) -> str:
    """Return "3-5 9" for [3, 4, 5, 9]."""
    runs: List[List[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def main() -> int:
    """Print a line for each file: how many of its lines ran, of how many, and the numbers of those that did not."""
    counts = coverage(Path(sys.argv[1]).resolve())
    if not counts:
        print("nothing has run")
        return 1
    width = max(map(len, counts))
    ran = lines = 0
    for name, by_line in sorted(counts.items()):
        missed = sorted(number for number, count in by_line.items() if not count)
        ran, lines = ran + len(by_line) - len(missed), lines + len(by_line)
        share = 100 * (len(by_line) - len(missed)) // len(by_line)
        print(f"{name:{width}} {len(by_line) - len(missed):5} of {len(by_line):5} {share:4} %  {ranges(missed)}")
    print(f"{'all':{width}} {ran:5} of {lines:5} {100 * ran // lines:4} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())

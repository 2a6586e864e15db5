"""Flows of clients, as separate programs that use nothing but the public API."""
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

FLOWS = Path(__file__).resolve().parent / "flows"


@pytest.fixture
def run():
    """Start a program of flows/; what still runs at the end is killed."""
    started = []

    def start(name, *arguments):
        process = subprocess.Popen([sys.executable, str(FLOWS / name), *arguments], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def line(process):
    text = process.stdout.readline().strip()
    assert text, process.stderr.read()
    return text


def go_on(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_prefill_and_decode(run):
    prefill = run("prefill.py")
    decode = run("decode.py", line(prefill))
    assert line(decode) == "same"
    assert decode.wait(30) == 0
    go_on(prefill)
    assert [line(prefill), line(prefill)] == ["1", "0"]
    assert prefill.wait(30) == 0


def test_three_members_by_rank_table(run):
    name = uuid.uuid4().hex
    members = [run("member.py", str(rank), name) for rank in (2, 0, 1)]
    for word in ("linked", "same"):
        assert [line(member) for member in members] == [word] * 3
        for member in members:
            go_on(member)
    assert [member.wait(30) for member in members] == [0, 0, 0]

"""Flows of clients, as separate programs that use nothing but the public API."""
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

FLOWS = Path(__file__).resolve().parent


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


def go_on(process, text=""):
    process.stdin.write(text + "\n")
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


def test_prompt_and_decoder_of_the_first_generation(run):
    prompt = run("prompt_v1.py")
    decoder = run("decoder_v1.py", line(prompt))
    go_on(prompt, line(decoder))                        # where to write
    assert line(prompt) == "written"
    go_on(decoder)
    assert line(decoder) == "same"
    assert decoder.wait(30) == 0
    go_on(prompt)
    assert line(prompt) == "0"
    assert prompt.wait(30) == 0


def test_roles_and_the_port_move(run):
    """Twice there and back: whoever stops listening frees the port for the other one."""
    prompt = run("switch.py", "prompt", "0")
    port = line(prompt)
    decoder = run("switch.py", "decoder", port)
    for _ in range(4):
        assert line(decoder) == "pulled"
        go_on(prompt)
        assert line(prompt) == "closed"
        go_on(decoder)
        assert line(decoder) == "listens"
        go_on(prompt)
        prompt, decoder = decoder, prompt
    for process in (prompt, decoder):
        assert line(process) == "same"
        assert process.wait(30) == 0

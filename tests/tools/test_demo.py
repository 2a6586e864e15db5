"""The demo as a user runs it, and how it copes with a prefill process that does not do its part."""
import re
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from llm_datadist.tools.demo import decode, outcome, workload
from llm_datadist.tools.demo.model import ModelConfig

SMALL = ("--requests", "3", "--layers", "2", "--heads", "2", "--head-size", "8", "--max-prompt", "60",
         "--new-tokens", "5", "--timeout", "60")


def run_demo(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "llm_datadist.tools", "demo", *arguments],
        capture_output=True, text=True, timeout=100, check=False,
    )


def rows(output):
    return [line.split() for line in output.splitlines() if re.match(r" *\d+ +\d+ ", line)]


def test_both_ways_agree_and_nothing_is_left():
    result = run_demo(*SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [(row[0], row[1], row[5], row[9]) for row in rows(result.stdout)] == [
        ("0", "17", "same", "same"), ("1", "32", "same", "same"), ("2", "60", "same", "same")
    ]
    # K and V of two layers, 64 bytes a token in each: the prompt alone, and in whole blocks of 16.
    assert [(int(row[2]), int(row[6])) for row in rows(result.stdout)] == [
        (17 * 256, 32 * 256), (32 * 256, 32 * 256), (60 * 256, 64 * 256)
    ]
    assert "left in prefill: caches 0, keys 0, pins 0, pool bytes 0" in result.stdout
    assert "left in decode: caches 0, keys 0, pins 0, pool bytes 0" in result.stdout
    held = re.search(r"held by prefill at most: caches (\d+), keys (\d+)", result.stdout)
    assert int(held[1]) >= 2 and int(held[2]) >= 2          # the paged cache, and a slot waiting to be pulled
    assert result.stdout.splitlines()[-2:] == ["references left: 0", "demo passed"]
    assert result.stderr == ""


def test_a_text_of_ones_own(tmp_path):
    text = tmp_path / "text"
    text.write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 3, encoding="utf-8")
    result = run_demo(*SMALL, "--text", str(text), "--block-tokens", "7", "--seed", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(text) in result.stdout
    assert result.stdout.splitlines()[-1] == "demo passed"


def test_one_wrong_byte_is_noticed():
    result = run_demo(*SMALL, "--corrupt", "1")
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = [" ".join(row[2:]).count("DIFFER") for row in rows(result.stdout)]
    assert verdicts == [0, 2, 0]
    assert result.stdout.splitlines()[-2:] == ["references left: 0", "demo FAILED"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--text", "/nonexistent/text"), "/nonexistent/text"),
        (("--requests", "0"), "requests=0"),
        (("--head-size", "7"), "head_size=7"),
        (("--new-tokens", "0"), "num_new_tokens=0"),
        (("--corrupt", "8"), "--corrupt 8"),
    ],
)
def test_bad_options_exit_2(arguments, named):
    result = run_demo(*arguments)
    assert result.returncode == 2
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def alive(pid):
    """Whether the process runs; an ended one that nobody has collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def prefill_process(settings, timeout_s=60.0):
    return decode.PrefillProcess(settings, time.monotonic() + timeout_s)


def test_a_failing_prefill_process_shows_its_traceback():
    with pytest.raises(decode.PrefillError, match=r"(?s)Traceback.*'NoneType'"), prefill_process(None) as peer:
        peer.receive("listening")
    assert not alive(peer.pid)


def test_a_prefill_process_that_just_ends_is_noticed(monkeypatch):
    monkeypatch.setattr(decode.prefill, "main", Connection.close)       # takes one argument: dies of a TypeError
    with pytest.raises(decode.PrefillError, match="exit status 1"), prefill_process(None) as peer:
        peer.receive("listening")
    assert not alive(peer.pid)


def test_a_silent_prefill_process_is_ended_at_the_limit(monkeypatch):
    monkeypatch.setattr(decode.prefill, "main", Connection.poll)        # poll(None): waits for what never comes
    with pytest.raises(decode.PrefillError, match="time limit"), prefill_process(None, 3.0) as peer:
        peer.receive("listening")
    assert not alive(peer.pid)


def test_leaving_on_an_exception_ends_the_prefill_process(monkeypatch):
    monkeypatch.setattr(decode.prefill, "main", Connection.poll)
    with pytest.raises(KeyError), prefill_process(None) as peer:
        raise KeyError("ours")
    assert not alive(peer.pid)


def test_an_unexpected_message_is_an_error():
    settings = workload.Settings(ModelConfig(1, 1, 2), ((1, 2, 3),), num_new_tokens=1)
    with pytest.raises(decode.PrefillError, match="expected 'counts'"), prefill_process(settings) as peer:
        peer.receive("counts")
    assert not alive(peer.pid)


def test_outcome_is_good_only_when_all_is_equal_and_nothing_left():
    good = outcome.Transfer(8, 0.5, bytes_equal=True, tokens_equal=True)
    nothing = {"caches": 0, "keys": 0, "pins": 0, "pool_bytes": 0}
    assert outcome.Outcome([(good, good)], {"prefill": nothing, "decode": nothing}).good
    for bad in (outcome.Transfer(8, 0.5, False, True), outcome.Transfer(8, 0.5, True, False)):
        assert not outcome.Outcome([(good, bad)], {"prefill": nothing, "decode": nothing}).good
    for name in nothing:
        assert not outcome.Outcome([(good, good)], {"prefill": nothing, "decode": {**nothing, name: 1}}).good


def test_a_killed_decode_process_takes_the_prefill_process_with_it():
    command = [sys.executable, "-u", "-m", "llm_datadist.tools", "demo", "--timeout", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            pid = next(int(found[1]) for line in process.stdout if (found := re.match(r"prefill process (\d+)", line)))
        finally:
            process.kill()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)

"""``ascend-check`` and the loopback of ``doctor``, over the host provider and over the stand-in for CANN."""
import json
import os
import signal
import subprocess
import sys

import pytest
from support.strict import build, environment

from llm_datadist.tools import ascend_check, doctor

NUM_CHECKS = 6                  # for one device


def run_tool(*arguments, env):
    return subprocess.run([sys.executable, "-m", "llm_datadist.tools", *arguments], capture_output=True, text=True,
                          timeout=300, check=False, env={**os.environ, **env})


@pytest.mark.parametrize("over", ["host", "cann"])
def test_every_check_passes(tmp_path, over):
    env = environment(build(tmp_path / "cann")) if over == "cann" else {"LLM_DATADIST_PROVIDER": "host"}
    done = run_tool("ascend-check", "--json", "--devices", "0,1" if over == "cann" else "0", env=env)
    report = json.loads(done.stdout)
    assert [row for row in report["checks"] if row["outcome"] != "ok"] == []
    assert len(report["checks"]) == (2 * NUM_CHECKS if over == "cann" else NUM_CHECKS)
    assert report["facts"]["provider"].startswith("cann" if over == "cann" else "host")
    assert done.returncode == 0


def test_a_check_that_fails_is_told_and_counts(tmp_path):
    env = environment(build(tmp_path / "cann"), LDD_STRICT_FAIL="HixlCSClientConnect:1:507057")
    done = run_tool("ascend-check", "--devices", "0", env=env)
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_a_process_that_never_answers_is_a_failure_and_is_ended(monkeypatch):
    monkeypatch.setattr(ascend_check, "ANSWER_LIMIT_S", 0.5)
    with ascend_check._Peer() as peer, pytest.raises(RuntimeError, match=r"was to read gave no answer for 0.5 s"):
        peer.process.send_signal(signal.SIGSTOP)
        peer("read")
    assert peer.process.returncode == -signal.SIGKILL


def test_a_machine_of_one_device_passes(tmp_path):
    env = environment(build(tmp_path / "cann"), LLM_DATADIST_HOST_DEVICES="1")
    done = run_tool("ascend-check", "--json", env=env)
    assert [row["outcome"] for row in json.loads(done.stdout)["checks"]] == ["ok"] * NUM_CHECKS


def test_doctor_pulls_once_when_asked_to():
    done = run_tool("doctor", "--json", "--loopback", env={"LLM_DATADIST_PROVIDER": "host"})
    assert json.loads(done.stdout)["loopback"] == {"a pull between two processes": "yes"}


def findings(chosen="host", why="", locked="unlimited", attach="yes", loopback="yes"):
    return {"providers": {"chosen": chosen, "why not CANN": why}, "host": {"cross-memory attach": attach},
            "limits": {"locked memory": f"{locked} (why)"}, "loopback": {"a pull between two processes": loopback}}


@pytest.mark.parametrize(("found", "environ", "words"), [
    (findings(), {}, None),
    (findings(why="libacl_rt.so: No such file"), {}, "ASCEND_HOME_PATH"),
    (findings(why="x.so lacks symbol aclrtMalloc"), {}, "too old"),
    (findings(why="CANN runtime x: no device"), {}, "npu-smi"),
    (findings(chosen="cann"), {"LLM_DATADIST_HCCN_CONF": "/nowhere"}, "/nowhere cannot be read"),
    (findings(chosen="cann", locked="65536"), {}, "ulimit -l"),
    (findings(attach="no, TCP"), {}, "ptrace"),
    (findings(loopback="no: RuntimeError"), {}, "ascend-check"),
])
def test_advice_names_what_to_do(found, environ, words):
    told = doctor.advice(found, environ)
    assert (told == []) if words is None else any(words in line for line in told)

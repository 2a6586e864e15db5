"""The console entry, ``doctor`` and ``version``."""
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llm_datadist
from llm_datadist.tools import cli, doctor


def run_cli(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "llm_datadist.tools", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ},
    )


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"llm-datadist {name}" in capsys.readouterr().out


def test_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["version", "--unknown"]])
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: llm-datadist" in capsys.readouterr().err


def test_only_the_command_asked_for_is_imported():
    loaded = (
        "import sys\nfrom llm_datadist.tools import cli\ncli.main(['version'])\n"
        "assert not {'llm_datadist.tools.doctor', 'llm_datadist.core.base.provider'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", loaded], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_version_names_the_package():
    result = run_cli("version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"llm-datadist {importlib.metadata.version('llm-datadist')}"


def test_a_reader_who_leaves_causes_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "llm_datadist.tools", "version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 0


def test_doctor_chooses_the_host_provider_and_says_why_not_cann():
    result = run_cli("doctor", "--json", LLM_DATADIST_PROVIDER="host", ASCEND_HOME_PATH="")
    assert result.returncode == 0, result.stderr
    findings = json.loads(result.stdout)
    assert findings["providers"]["chosen"] == findings["providers"]["wanted"] == "host"
    assert findings["providers"]["host"].startswith("yes: ")
    assert findings["settings"]["LLM_DATADIST_PROVIDER"] == "host"
    assert set(findings["host"]) >= {"memfd", "cross-memory attach", "huge pages"}
    assert "open files" in findings["limits"]


def test_doctor_names_what_is_missing(tmp_path):
    result = run_cli("doctor", "--json", LLM_DATADIST_PROVIDER="cann", ASCEND_HOME_PATH=str(tmp_path))
    findings = json.loads(result.stdout)
    if findings["providers"]["chosen"] == "cann":
        pytest.skip("this machine has CANN on the loader's path")
    assert result.returncode == 1
    assert findings["providers"]["cann"].startswith("no: ")
    assert ".so" in findings["providers"]["refused"]


def test_doctor_refuses_an_unknown_provider():
    result = run_cli("doctor", LLM_DATADIST_PROVIDER="nonsense")
    assert result.returncode == 1
    assert "nonsense" in result.stdout
    assert "chosen: none" in result.stdout


def test_cross_memory_attach_reads_what_it_should(monkeypatch):
    assert doctor.cross_memory_attach().startswith(("yes", "no, "))
    monkeypatch.setattr(doctor, "_PROBE", "import sys; sys.stdout.buffer.write(bytes(64))")
    assert doctor.cross_memory_attach().startswith("no, ")
    monkeypatch.setattr(doctor, "_PROBE", "import sys; sys.exit('Operation not permitted')")
    assert "Operation not permitted" in doctor.cross_memory_attach()


def test_selected_word_of_a_kernel_file(tmp_path):
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    assert doctor._selected(str(path)) == "madvise"
    assert doctor._selected(str(tmp_path / "missing")) == "unknown"


def test_an_installation_that_cannot_measure_says_what_to_build(tmp_path):
    """Users get no measuring modules; what needs none works as ever."""
    native = {path.name for path in (Path(llm_datadist.__file__).parent / "tools/bench/native").glob("*.so")}
    assert native
    shutil.copytree(Path(llm_datadist.__file__).parent, tmp_path / "llm_datadist",
                    ignore=lambda folder, names: native & set(names) if Path(folder).name == "native" else ())
    for arguments in (["bench"], ["bench", "--listen", "127.0.0.1:0"], ["kvbench", "--model", "llama-3-8b"]):
        result = run_cli(*arguments, PYTHONPATH=str(tmp_path))
        assert result.returncode == 2 and result.stdout == ""
        line, = result.stderr.splitlines()
        assert line.startswith(f"llm-datadist {arguments[0]}: ") and "LDD_WITH=bench pip install ." in line
    for arguments in (["bench", "--help"], ["kvbench", "--help"], ["version"]):
        assert run_cli(*arguments, PYTHONPATH=str(tmp_path)).returncode == 0
    missing = run_cli("bench", "compare", "before.json", "after.json", PYTHONPATH=str(tmp_path))
    assert missing.returncode == 2 and "before.json" in missing.stderr and "LDD_WITH" not in missing.stderr


@pytest.mark.parametrize("command", ["doctor", "version"])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    script = f"set -o pipefail; {sys.executable} -m llm_datadist.tools {command} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")

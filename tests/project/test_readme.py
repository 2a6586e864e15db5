"""What README says works as it stands there."""
import re
import socket
import subprocess
import sys
from pathlib import Path

from llm_datadist.tools import doctor

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def example(name):
    """Return the code block that starts with the comment `name`."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (code,) = [block for block in blocks if block.startswith(f"# {name}")]
    return code


def test_the_two_examples_work_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("prefill.py", "decode.py"):
        code = example(name)
        assert "26000" in code
        (tmp_path / name).write_text(code.replace("26000", str(port)), encoding="utf-8")
    prefill = subprocess.Popen(
        [sys.executable, "-u", "prefill.py"], cwd=tmp_path, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    with prefill:
        try:
            assert prefill.stdout.readline().startswith("filled")
            decode = subprocess.run(
                [sys.executable, "decode.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
            )
            assert decode.returncode == 0, decode.stderr
            assert decode.stdout.splitlines()[-1] == "[1, 2, 3, 4, 5, 6, 7, 8]"
            output, _ = prefill.communicate("\n", timeout=60)
            assert prefill.returncode == 0, output
        finally:
            prefill.kill()


def test_both_commands_and_all_settings_are_named():
    assert "make demo" in README and "make test" in README
    for name in doctor.SETTINGS:
        assert name in README or not name.startswith("LLM_DATADIST_")


def test_linked_files_exist():
    root = Path(__file__).resolve().parents[2]
    for page in ("README.md", *(f"docs/{path.name}" for path in (root / "docs").glob("*.md"))):
        text = (root / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (root / page).parent.joinpath(target).exists(), f"{page}: {target}"

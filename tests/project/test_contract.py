"""The contract of the public names, which is kept beside the checkout where there is one."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llm_datadist

CHECK = Path(__file__).resolve().parents[3] / "shared" / "tools" / "check_api.py"


@pytest.mark.skipif(not CHECK.exists(), reason="no contract beside the checkout")
def test_the_public_api_holds():
    # The package under test, wherever it was imported from.
    path = os.pathsep.join([str(Path(llm_datadist.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr

"""A part of the two-process suite over the stand-in, in each kind of endpoints; ``make test-cann`` runs all of it."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PART = ("transfers/test_push.py", "transfers/test_pull.py", "links/test_first_request.py")


@pytest.mark.skipif(os.environ.get("LDD_TEST_STRICT") == "cann", reason="the whole session runs over the stand-in")
@pytest.mark.parametrize("kind", ["host-roce", "device-roce", "device-hccs"])
def test_pulls_and_pushes_between_two_processes(kind):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *PART, "-k", "shm or first"], cwd=TESTS,
        env={**os.environ, "LDD_TEST_STRICT": "cann", "LDD_TEST_ENDPOINTS": kind}, capture_output=True, text=True,
        timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

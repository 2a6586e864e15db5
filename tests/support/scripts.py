"""Programs of a test: whole interpreters of their own, which start and end as a client's would."""
from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any, Mapping, Optional

LIMIT_S = 60.0

PREAMBLE = """
import ctypes, os, sys, threading, time
from support.peer import engine_options
from support.link_steps import cluster
from llm_datadist import *
from llm_datadist.status import LLMException

def start(cluster_id, **options):
    engine = LLMDataDist(LLMRole.MIX, cluster_id)
    engine.init(engine_options(**options))
    return engine
"""


def run(text: str, *args: Any, env: Optional[Mapping[str, str]] = None) -> "subprocess.CompletedProcess[str]":
    """Run a program after `PREAMBLE`, with warnings as errors; it must end by itself."""
    program = PREAMBLE + textwrap.dedent(text)
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", program, *map(str, args)], text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S,
        env={**os.environ, **(env or {}), "PYTHONPATH": path})


def output_of(text: str, *args: Any, env: Optional[Mapping[str, str]] = None) -> str:
    """`run` a program that must succeed and complain about nothing; return what it printed."""
    done = run(text, *args, env=env)
    assert (done.returncode, done.stderr) == (0, ""), f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout

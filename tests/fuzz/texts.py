"""What Python reads of others' making, with atheris: values of options, rank tables, recordings.

The first byte of an input says which reader gets the rest. A reader returns, or raises what its documentation names.
Run by ``make fuzz``; arguments are those of libFuzzer. Reads the modules of the checkout, none of which is compiled.
"""
import os
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(include=["llm_datadist", "tools"]):
    from llm_datadist.links.rank_table import parse_rank_table
    from llm_datadist.options import values
    from llm_datadist.options.endpoints import endpoints_of
    from llm_datadist.status import LLMException
    from tools.observe import recording

FILE = os.path.join(tempfile.mkdtemp(), "recording")


def comm_res(text):
    """A network identity is checked for its structure first."""
    values.check_comm_res("llm.LocalCommRes", text)
    endpoints_of("llm.LocalCommRes", text)


def recorded(text):
    """A recording, and what is found out from one that can be read."""
    Path(FILE).write_text(text, encoding="utf-8", errors="surrogateescape")
    recording.read(FILE)


READERS = [
    parse_rank_table,
    comm_res,
    lambda text: values.parse_listen_ip_info(text),
    lambda text: values.parse_address("x", text),
    lambda text: values.parse_pool("x", text),
    lambda text: values.parse_flow_graph_bytes("x", text),
    lambda text: values.parse_integer("x", text, 0, 2**31 - 1),
    lambda text: values.check_buffers("x", text),
    lambda text: values.check_json_object("x", text),
    recorded,
]


def read(data):
    """One input."""
    if data:
        try:
            READERS[data[0] % len(READERS)](data[1:].decode("utf-8", "surrogateescape"))
        except (LLMException, ValueError):
            pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()

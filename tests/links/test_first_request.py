"""The listening end may use a link the moment it sees it."""
from __future__ import annotations

import sys
import threading

from llm_datadist import LLMException

NUM_LINKS = 150
NUM_THREADS = 3


def ask_all_the_time(node, cluster_id):
    """Ping a cluster from several threads, linked or not, until `stop_asking`."""
    stop = node.kept["stop"] = threading.Event()
    engine = node.dist._require_engine()

    def run():
        while not stop.is_set():
            try:
                engine.ping(cluster_id, 1000)
            except LLMException:
                pass

    sys.setswitchinterval(1e-4)
    node.kept["askers"] = [threading.Thread(target=run) for _ in range(NUM_THREADS)]
    for thread in node.kept["askers"]:
        thread.start()


def stop_asking(node):
    """End the threads of `ask_all_the_time`."""
    node.kept["stop"].set()
    for thread in node.kept["askers"]:
        thread.join()


def test_a_request_never_overtakes_the_answer_that_makes_the_link(peers):
    listening = peers.start(1)
    here = peers.here(2)
    engine = here.node.dist._require_engine()
    listening.call(ask_all_the_time, 2)
    try:
        for _ in range(NUM_LINKS):
            assert engine.link(1, *listening.address, 10000) == (0, "")
            assert engine.unlink(1, 10000, False, listening.address)[0] == 0
    finally:
        listening.call(stop_asking)

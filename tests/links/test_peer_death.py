"""What the other end is told when a process dies under its requests."""
from __future__ import annotations

import os

import pytest
from support.link_steps import TCP_ONLY, fetch_code, link, offer, stopped, until

from llm_datadist import LLMStatusCode

S = LLMStatusCode
PATHS = {"shm": {"LLM_DATADIST_SHARED_TABLE": "0"}, "cma": {"LLM_DATADIST_HOST_PATHS": "cma"}, "tcp": TCP_ONLY}


@pytest.mark.parametrize("path", PATHS)
def test_a_peer_that_dies_with_a_request_unread_is_not_linked(peers, path):
    """The kernel resets its connections then; that is the end of a link like any other."""
    owner, reader = peers.start(1, env=PATHS[path]), peers.start(2, env=PATHS[path])
    owner.leftovers_allowed = True
    owner.call(offer)
    assert reader.call(link, (1, owner.address))[0] is S.LLM_SUCCESS
    assert reader.call(fetch_code, 1) is S.LLM_SUCCESS
    with stopped(owner):
        finish = reader.begin(fetch_code, 1)
        assert until(lambda: unread(owner.pid))
        owner.kill()
    assert finish() is S.LLM_NOT_YET_LINK
    assert reader.call(fetch_code, 1) is S.LLM_NOT_YET_LINK


def unread(pid):
    """Whether bytes wait in a connection of this process."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{name}")
        if target.startswith("socket:"):
            inodes.add(target[8:-1])
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in list(table)[1:]]
    return any(row[9] in inodes and int(row[4].split(":")[1], 16) for row in rows if row[3] == "01")

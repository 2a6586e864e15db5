"""Links heal: after a timeout, a cut or a peer that was started anew, the next call on a link works."""
from __future__ import annotations

import os
import signal

import pytest
from support.link_steps import fetch, fetch_code, link, links, offer, stop, stopped, unlink, until, wait_links, withdraw
from support.peer import engine_options
from transfers.pair import PATHS, PATHS_VARIABLE

from llm_datadist import LLMException, LLMStatusCode

S = LLMStatusCode
OK = (S.LLM_SUCCESS, [S.LLM_SUCCESS])
STAYS = {"llm_LinkHealTime": "0"}
# Many of each in a long run: LDD_HEAL_ROUNDS=1000.
ROUNDS = int(os.environ.get("LDD_HEAL_ROUNDS", "20"))
# Without the shared table every pull needs the owner's thread, so that one that stands still holds it up.
ASKING = {"LLM_DATADIST_SHARED_TABLE": "0"}


def start(peers, cluster_id, path="tcp", timeout_ms=300, **options):
    process = peers.start(cluster_id, engine_options(timeout_ms=timeout_ms, **options),
                          env={PATHS_VARIABLE: path, **ASKING})
    process.call(offer)
    return process


def start_again(peers, before, **options):
    """A new process of the same cluster at the same address."""
    return start(peers, before.cluster_id, llm_listenIpInfo="{}:{}".format(*before.address), **options)


def error_of(node, cluster_id):
    """The exception of a fetch: code, text, hint, and whether it may succeed later."""
    try:
        fetch(node, cluster_id)
    except LLMException as error:
        return error.status_code, str(error), error.recoverable
    return None


def healed(node):
    return node.dist.stats()["healed_links"]


def time_out_and_fetch(node, cluster_id, pid, rounds):
    """Time out again and again, fetching once between, and then fetch as often; the codes of the latter."""
    num_timeouts, codes = 0, {}
    while num_timeouts < rounds:
        stop(pid)
        num_timeouts += fetch_code(node, cluster_id) is S.LLM_TIMEOUT
        os.kill(pid, signal.SIGCONT)
        # The time limit is short, and a process that goes on may be late.
        assert until(lambda: fetch_code(node, cluster_id) is S.LLM_SUCCESS)
    for _ in range(rounds):
        code = fetch_code(node, cluster_id)
        codes[code] = codes.get(code, 0) + 1
    return codes


@pytest.mark.parametrize("path", PATHS)
def test_calls_that_time_out_do_not_spoil_those_that_follow(peers, path):
    owner, reader = start(peers, 1, path), start(peers, 2, path, timeout_ms=60)
    assert reader.call(link, (1, owner.address)) == OK
    assert reader.call(time_out_and_fetch, 1, owner.pid, ROUNDS, limit_s=60 + ROUNDS) == {S.LLM_SUCCESS: ROUNDS}
    assert reader.call(links) == [(1, "local", "active")] and owner.call(links) == [(2, "peer", "active")]
    assert owner.settled()["pins"] == 0
    owner.call(withdraw)
    reader.call(withdraw)


@pytest.mark.parametrize("path", PATHS)
def test_the_accepting_side_gets_its_link_back(peers, path):
    """It cannot open anything: the other side, which does not call at all, brings the link back."""
    ours, theirs = start(peers, 1, path), start(peers, 2, path)
    assert ours.call(link, (2, theirs.address)) == OK
    assert theirs.call(fetch, 1)
    with stopped(ours):
        assert theirs.call(fetch_code, 1) is S.LLM_TIMEOUT
    assert theirs.call(fetch_code, 1) is S.LLM_SUCCESS
    assert theirs.call(links) == [(1, "peer", "active")] and ours.call(links) == [(2, "local", "active")]
    assert ours.call(healed) == 1
    for process in (ours, theirs):
        process.call(withdraw)


@pytest.mark.parametrize("path", PATHS)
def test_a_peer_that_was_started_anew_is_found_by_the_next_call(peers, path):
    before, reader = start(peers, 1, path), start(peers, 2, path)
    before.leftovers_allowed = True
    assert reader.call(link, (1, before.address)) == OK
    assert reader.call(fetch, 1)
    before.kill()
    again = start_again(peers, before, path=path)
    assert reader.call(fetch_code, 1) is S.LLM_SUCCESS
    assert again.call(wait_links, [(2, "peer", "active")]) == [(2, "peer", "active")]
    assert again.call(fetch_code, 2) is S.LLM_SUCCESS
    for process in (again, reader):
        process.call(withdraw)


def test_what_the_earlier_process_had_is_not_taken_for_the_new_ones(peers):
    """The key is looked up anew, and is not there."""
    before, reader = start(peers, 1), start(peers, 2)
    before.leftovers_allowed = True
    assert reader.call(link, (1, before.address)) == OK
    assert reader.call(fetch, 1)
    before.kill()
    again = start_again(peers, before)
    again.call(withdraw)
    assert reader.call(fetch_code, 1) is S.LLM_KV_CACHE_NOT_EXIST
    reader.call(withdraw)


def test_a_call_says_that_the_link_could_not_be_made_anew(peers):
    before, reader = start(peers, 1), start(peers, 2)
    before.leftovers_allowed = True
    assert reader.call(link, (1, before.address)) == OK
    before.kill()
    assert reader.call(wait_links, [(1, "local", "broken")]) == [(1, "local", "broken")]
    code, text, recoverable = reader.call(error_of, 1)
    assert code is S.LLM_NOT_YET_LINK and recoverable
    assert "could not be made anew" in text and "refused" in text and "repeat the call" in text
    again = start_again(peers, before)
    assert reader.call(fetch_code, 1) is S.LLM_SUCCESS
    for process in (again, reader):
        process.call(withdraw)


def test_the_accepting_side_says_that_the_peer_did_not_come_back(peers):
    owner, reader = start(peers, 1), start(peers, 2)
    reader.leftovers_allowed = True
    assert reader.call(link, (1, owner.address)) == OK
    reader.kill()
    assert owner.call(wait_links, []) == []
    code, text, recoverable = owner.call(error_of, 2)
    assert code is S.LLM_NOT_YET_LINK and recoverable and "did not make it anew" in text
    owner.call(withdraw)


def test_a_link_that_was_unlinked_does_not_come_back(peers):
    ours, theirs = start(peers, 1), start(peers, 2)
    assert ours.call(link, (2, theirs.address)) == OK
    with stopped(theirs):
        assert ours.call(fetch_code, 2) is S.LLM_TIMEOUT
        assert ours.call(unlink, (2,), force=True) == OK
    assert ours.call(fetch_code, 2) is S.LLM_NOT_YET_LINK
    assert theirs.call(wait_links, []) == []
    assert ours.call(links) == []
    for process in (ours, theirs):
        process.call(withdraw)


@pytest.mark.parametrize("by_force", [False, True])
def test_the_side_that_accepted_unlinks(peers, by_force):
    """What it dropped by force is not made anew behind its back, neither by calls nor by the thread."""
    ours, theirs = start(peers, 1), start(peers, 2)
    assert ours.call(link, (2, theirs.address)) == OK
    assert theirs.call(unlink, (1,), force=by_force) == OK
    left = [(2, "local", "broken")] if by_force else []
    assert ours.call(wait_links, left) == left
    assert ours.call(fetch_code, 2) is S.LLM_NOT_YET_LINK and theirs.call(fetch_code, 1) is S.LLM_NOT_YET_LINK
    assert ours.call(links) == left and theirs.call(links) == []
    assert ours.call(link, (2, theirs.address)) == OK
    assert ours.call(fetch, 2) and theirs.call(fetch, 1)
    for process in (ours, theirs):
        process.call(withdraw)


def test_linking_repairs_a_broken_link_also_at_another_address(peers):
    before, reader = start(peers, 1), start(peers, 2)
    before.leftovers_allowed = True
    assert reader.call(link, (1, before.address)) == OK
    before.kill()
    assert reader.call(wait_links, [(1, "local", "broken")]) == [(1, "local", "broken")]
    assert reader.call(link, (1, before.address)) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])
    assert reader.call(links) == [(1, "local", "broken")]
    again = start(peers, 1)
    assert reader.call(link, (1, again.address)) == OK
    assert reader.call(links) == [(1, "local", "active")]
    assert reader.call(fetch, 1)
    assert reader.call(link, (1, again.address)) == (S.LLM_ALREADY_LINK, [S.LLM_ALREADY_LINK])
    for process in (again, reader):
        process.call(withdraw)


def test_links_stay_broken_where_the_setting_says_so(peers):
    owner, reader = start(peers, 1), start(peers, 2, **STAYS)
    assert reader.call(link, (1, owner.address)) == OK
    with stopped(owner):
        assert reader.call(fetch_code, 1) is S.LLM_TIMEOUT
    code, text, _ = reader.call(error_of, 1)
    assert code is S.LLM_NOT_YET_LINK and "unlink and link again" in text
    assert reader.call(link, (1, owner.address)) == (S.LLM_ALREADY_LINK, [S.LLM_ALREADY_LINK])
    assert reader.call(links) == [(1, "local", "broken")]
    assert reader.call(unlink, (1,), force=True) == OK
    assert reader.call(link, (1, owner.address)) == OK
    assert reader.call(fetch, 1)
    for process in (owner, reader):
        process.call(withdraw)


def fetch_in_threads(node, cluster_id, num_threads):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(num_threads) as pool:
        return set(pool.map(lambda _: fetch_code(node, cluster_id), range(num_threads)))


def test_many_threads_find_the_same_link_broken(peers):
    owner, reader = start(peers, 1), start(peers, 2, timeout_ms=2000)
    assert reader.call(link, (1, owner.address)) == OK
    with stopped(owner):
        assert reader.call(fetch_in_threads, 1, 8) <= {S.LLM_TIMEOUT, S.LLM_NOT_YET_LINK}
    assert until(lambda: reader.call(fetch_in_threads, 1, 8) == {S.LLM_SUCCESS})
    assert reader.call(links) == [(1, "local", "active")]
    for process in (owner, reader):
        process.call(withdraw)


def test_nothing_is_left_of_links_that_healed(peers):
    """Descriptors, threads and mappings are those of one link, however often it broke."""
    from support.link_steps import footprint
    owner, reader = start(peers, 1), start(peers, 2, timeout_ms=100)
    assert reader.call(link, (1, owner.address)) == OK
    for _ in range(6):
        with stopped(owner):
            reader.call(fetch_code, 1)
        assert until(lambda: reader.call(fetch_code, 1) is S.LLM_SUCCESS)
        assert until(lambda: len(owner.call(links)) == 1)
    before = reader.call(footprint), owner.call(footprint)
    with stopped(owner):
        reader.call(fetch_code, 1)
    assert until(lambda: reader.call(fetch_code, 1) is S.LLM_SUCCESS)
    assert until(lambda: same(reader.call(footprint), before[0]) and same(owner.call(footprint), before[1])), \
        (before, reader.call(footprint), owner.call(footprint))
    for process in (owner, reader):
        process.call(withdraw)


def same(now, before):
    """Whether no more is held than before."""
    return all(now[name] <= before[name] for name in ("fds", "threads")) and now["free_bytes"] == before["free_bytes"]

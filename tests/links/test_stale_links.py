"""What is left of a link that this side asked for goes when the peer, which has none any more, links to us."""
from __future__ import annotations

from support.link_steps import fetch, link, links, offer, stopped, unlink, wait_links, withdraw
from support.peer import engine_options

from llm_datadist import LLMStatusCode

OK = (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])


def listening(peers, *clusters):
    """Engines that listen and offer something."""
    started = [peers.start(cluster_id) for cluster_id in clusters]
    for process in started:
        process.call(offer)
    return started


def test_after_a_forced_unlink_the_new_link_is_the_only_one(peers):
    ours, theirs = listening(peers, 1, 2)
    assert ours.call(link, (2, theirs.address)) == OK
    assert theirs.call(unlink, (1,), force=True) == OK
    assert ours.call(wait_links, [(2, "local", "broken")]) == [(2, "local", "broken")]

    assert theirs.call(link, (1, ours.address)) == OK
    assert ours.call(links) == [(2, "peer", "active")]
    assert ours.call(fetch, 2) and theirs.call(fetch, 1)

    assert theirs.call(unlink, (1,)) == OK
    assert ours.call(wait_links, []) == []
    assert ours.call(link, (2, theirs.address)) == OK
    assert ours.call(fetch, 2)
    assert ours.call(unlink, (2,)) == OK
    for process in (ours, theirs):
        process.call(withdraw)


def test_a_link_to_an_earlier_process_goes_though_nobody_said_that_it_ended(peers):
    ours, before = listening(peers, 1, 2)
    assert ours.call(link, (2, before.address)) == OK
    with stopped(before):
        again = peers.start(2)
        again.call(offer)
        assert again.call(link, (1, ours.address)) == OK
        assert ours.call(links) == [(2, "peer", "active")]
        assert ours.call(fetch, 2)
    assert again.call(unlink, (1,)) == OK
    assert ours.call(wait_links, []) == []
    for process in (ours, before, again):
        process.call(withdraw)


def test_an_active_link_of_ours_stays(peers):
    ours, theirs = listening(peers, 1, 2)
    assert ours.call(link, (2, theirs.address)) == OK
    assert theirs.call(link, (1, ours.address)) == OK
    assert ours.call(links) == [(2, "local", "active"), (2, "peer", "active")]
    assert ours.call(unlink, (2,)) == OK
    for process in (ours, theirs):
        assert process.call(wait_links, []) == []
        process.call(withdraw)


def test_a_broken_link_that_the_peer_does_not_replace_stays(peers):
    ours, before = listening(peers, 1, 2)
    assert ours.call(link, (2, before.address)) == OK
    other = peers.start(3, engine_options())
    before.kill()
    assert ours.call(wait_links, [(2, "local", "broken")]) == [(2, "local", "broken")]
    assert other.call(link, (1, ours.address)) == OK
    assert ours.call(links) == [(2, "local", "broken"), (3, "peer", "active")]
    ours.call(withdraw)

"""Releases in two-sided mode: the last key frees, and pulls of some layers release once every tensor was taken."""
import pytest
from transfers.owner import PADDING, Owner, content, pull, req
from transfers.refusal import INVALID, NOT_EXIST, refused


@pytest.fixture
def owner(two_sided_pair):
    """The owner, with nothing in it, and nothing left in it afterwards."""
    owner = Owner(two_sided_pair.there)
    assert owner.held() == (0, 0, 0)
    yield owner
    assert owner.held() == (0, 0, 0)


def test_last_pull_of_a_deallocated_cache_frees_it(two_sided_pair, owner):
    owner.allocate("a", [req(1), req(2), req(3)])
    owner.deallocate("a")
    for drained, number in enumerate((2, 3, 1)):
        assert owner.held() == (1, 3 - drained, 2)
        assert pull(two_sided_pair.here, owner.key(req(number))) == content(number - 1)
    assert owner.held() == (0, 0, 0)
    refused(NOT_EXIST, pull, two_sided_pair.here, owner.key(req(1)))


def layers(first, stop, n=1):
    return {"src_layer_range": range(first, stop), "tensor_num_per_layer": n}


@pytest.mark.parametrize("ranges", [
    [(0, 1), (1, 2), (2, 3), (3, 4)], [(3, 4), (0, 1), (2, 3), (1, 2)], [(0, 3), (1, 4)], [(2, 4), (0, 3), ],
    [(0, 4)], [(1, 2), (1, 2), (0, 3), (0, 1), (3, 4)], [(0, 2), None],
])
def test_layers_release_once_all_were_taken(two_sided_pair, owner, ranges):
    owner.allocate("a", [req(1), req(2)], num_tensors=4)
    for number, span in enumerate(ranges):
        count, arguments = (span[1] - span[0], layers(*span)) if span else (4, {})
        assert pull(two_sided_pair.here, owner.key(req(2)), num_tensors=count, **arguments) == content(1, count)
        assert owner.held() == (1, 1 if number + 1 == len(ranges) else 2, 4)
    owner.deallocate("a")
    # The other key of the cache has taken nothing yet.
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=3, **layers(0, 3))
    assert owner.held() == (1, 1, 4)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=1, **layers(3, 4))
    assert owner.held() == (0, 0, 0)


def test_layers_of_three_tensors(two_sided_pair, owner):
    owner.allocate("a", [req(1)], num_tensors=6)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=3, **layers(1, 2, 3))
    assert owner.held() == (1, 1, 6)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=3, **layers(0, 1, 3))
    assert owner.held() == (1, 0, 6)
    owner.deallocate("a")


def test_layers_by_id_and_by_blocks_count_for_the_key(two_sided_pair, owner):
    cache_id = owner.allocate("a", [PADDING, req(1)], num_tensors=3)
    pull(two_sided_pair.here, owner.by_id(cache_id, 1), num_tensors=1, **layers(0, 1))
    pull(two_sided_pair.here, owner.by_id(cache_id, 0), num_tensors=2, **layers(1, 3))
    pull(two_sided_pair.here, owner.by_id(cache_id, 1), "pull_blocks", num_tensors=1, **layers(2, 3))
    assert owner.held() == (1, 1, 3)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=1, **layers(1, 2))
    assert owner.held() == (1, 0, 3)
    owner.deallocate("a")


def test_removing_a_key_forgets_what_was_taken(two_sided_pair, owner):
    owner.allocate("a", [req(1)], num_tensors=2)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=1, **layers(0, 1))
    owner.remove(req(1))
    owner.allocate("b", [req(1)], num_tensors=2)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=1, **layers(1, 2))
    assert owner.held() == (2, 1, 4)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=1, **layers(0, 1))
    assert owner.held() == (2, 0, 4)
    owner.deallocate("a")
    owner.deallocate("b")


def test_failed_layers_do_not_count(two_sided_pair, owner):
    owner.allocate("a", [req(1)], num_tensors=2)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=1, **layers(0, 1))
    refused(INVALID, pull, two_sided_pair.here, owner.key(req(1)), num_tensors=1, size=65, **layers(1, 2))
    refused(INVALID, pull, two_sided_pair.here, owner.key(req(1)), num_tensors=2, **layers(1, 3))
    assert owner.held() == (1, 1, 2)
    pull(two_sided_pair.here, owner.key(req(1)), num_tensors=1, **layers(1, 2))
    assert owner.held() == (1, 0, 2)
    owner.deallocate("a")

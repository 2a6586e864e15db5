"""When keys are released and memory goes back: counts and free bytes of the owner after each step."""
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transfers.caches import Named, Spec, contents, drop_all, invoke, make
from transfers.cases import examples
from transfers.owner import MODEL, NONE, PADDING, Owner, content, prefix, pull, req
from transfers.refusal import INVALID, NOT_EXIST, refused
from transfers.tasks import transfer

from llm_datadist import BlocksCacheKey, LLMStatusCode, TransferConfig


@pytest.fixture
def owner(mode_pair):
    """The owner, with nothing in it, and nothing left in it afterwards."""
    owner = Owner(mode_pair.there)
    assert owner.held() == (0, 0, 0)
    yield owner
    assert owner.held() == (0, 0, 0)
    mode_pair.here.call(drop_all)


# ------------------------------------------------------------------------------ transitions without any pull

def test_handle_alone(owner):
    owner.allocate("a")
    assert owner.held() == (1, 0, 2)
    owner.deallocate("a")
    assert owner.held() == (0, 0, 0)


def test_padding_binds_nothing(owner):
    owner.allocate("a", [PADDING, req(1), PADDING])
    assert owner.held() == (1, 1, 2)
    owner.remove(req(1))
    owner.remove(PADDING)
    assert owner.held() == (1, 0, 2)
    owner.deallocate("a")


def test_deallocate_is_deferred_until_the_last_key_is_removed(owner):
    owner.allocate("a", [req(1), prefix(1), req(2)])
    assert owner.held() == (1, 3, 2)
    owner.deallocate("a")
    assert owner.held() == (1, 3, 2)
    owner.remove(req(1))
    assert owner.held() == (1, 2, 2)
    owner.remove(prefix(1))
    owner.remove(prefix(1))
    assert owner.held() == (1, 1, 2)
    owner.remove(req(2))
    assert owner.held() == (0, 0, 0)


def test_deallocate_twice_is_a_no_op(owner):
    owner.allocate("a", [req(1)])
    owner.deallocate("a")
    owner.deallocate("a")
    assert owner.held() == (1, 1, 2)
    owner.remove(req(1))
    owner.deallocate("a")
    assert owner.held() == (0, 0, 0)


def test_unknown_keys_are_a_no_op(owner):
    owner.allocate("a", [req(1)])
    for key in (req(2), prefix(1), req(1, MODEL + 1), req(NONE - 1)):
        owner.remove(key)
    assert owner.held() == (1, 1, 2)
    owner.remove(req(1))
    owner.deallocate("a")


def test_a_removed_key_can_be_bound_again_while_the_cache_lives(owner):
    owner.allocate("a", [req(1)])
    refused(INVALID, owner.allocate, "b", [req(1)])
    assert owner.held() == (1, 1, 2)
    owner.remove(req(1))
    owner.allocate("b", [req(1)])
    assert owner.held() == (2, 1, 4)
    owner.deallocate("a")
    assert owner.held() == (1, 1, 2)
    owner.deallocate("b")
    assert owner.held() == (1, 1, 2)
    owner.remove(req(1))


def test_kinds_and_models_are_apart(owner):
    owner.allocate("a", [req(1), prefix(1), req(1, MODEL + 1)])
    assert owner.held() == (1, 3, 2)
    owner.remove(prefix(1))
    assert owner.held() == (1, 2, 2)
    owner.remove(req(1))
    owner.remove(req(1, MODEL + 1))
    owner.deallocate("a")


@pytest.mark.parametrize("keys", [[req(1), req(1)], [req(1), PADDING, req(1)], [req(1)] * 4, [PADDING] * 4])
def test_refused_keys_leave_nothing_bound(owner, keys):
    refused(INVALID, owner.allocate, "a", keys)
    assert owner.held() == (0, 0, 0)


def test_blocks_cache_goes_with_its_handle(owner):
    key = BlocksCacheKey(7, MODEL)
    owner.allocate("a", [key], is_blocks=True)
    assert owner.held() == (1, 1, 2)
    refused(INVALID, owner.allocate, "b", [key], is_blocks=True)
    owner.deallocate("a")
    assert owner.held() == (0, 0, 0)
    owner.allocate("b", [key], is_blocks=True)
    owner.deallocate("b")


# -------------------------------------------------------------------------------------------- which pulls release

def test_pull_by_request_releases(mode_pair, owner):
    owner.allocate("a", [PADDING, req(1), req(2)])
    if mode_pair.remote_accessible:
        with pytest.raises(TypeError):
            pull(mode_pair.here, owner.key(req(1)))
        assert owner.held() == (1, 2, 2)
        owner.remove(req(1))
    else:
        assert pull(mode_pair.here, owner.key(req(1))) == content(1)
        assert owner.held() == (1, 1, 2)
        refused(NOT_EXIST, pull, mode_pair.here, owner.key(req(1)))
        assert owner.held() == (1, 1, 2)
    owner.deallocate("a")
    assert owner.held() == (1, 1, 2)
    owner.remove(req(2))


def test_pull_by_prefix_keeps_the_key(mode_pair, owner):
    owner.allocate("a", [PADDING, prefix(1)])
    if not mode_pair.remote_accessible:
        for _ in range(2):
            assert pull(mode_pair.here, owner.key(prefix(1))) == content(1)
            assert owner.held() == (1, 1, 2)
        owner.deallocate("a")
        assert pull(mode_pair.here, owner.key(prefix(1))) == content(1)
        assert owner.held() == (1, 1, 2)
    else:
        with pytest.raises(TypeError):
            pull(mode_pair.here, owner.key(prefix(1)))
        owner.deallocate("a")
    owner.remove(prefix(1))


@pytest.mark.parametrize("method", ["pull_cache", "pull_blocks"])
@pytest.mark.parametrize("keys, releases", [
    ((PADDING, req(1)), True), ((PADDING, prefix(1)), False), ((PADDING, PADDING), False), ((), False),
    ((req(1), PADDING), False),
])
def test_pull_by_id_releases_the_request_of_its_slot(mode_pair, owner, method, keys, releases):
    """Also one that is not in the req map; a slot without a key, or with a prefix, has nothing to release."""
    cache_id = owner.allocate("a", keys)
    bound = sum(key is not PADDING for key in keys)
    releases = releases and not mode_pair.remote_accessible
    for _ in range(2):
        assert pull(mode_pair.here, owner.by_id(cache_id, 1), method) == content(1)
        assert owner.held() == (1, bound - releases, 2)
    owner.deallocate("a")
    assert owner.held() == ((1, 1, 2) if bound - releases else (0, 0, 0))
    if bound - releases:
        # Deferred, it is still there by id.
        assert pull(mode_pair.here, owner.by_id(cache_id, 1), method) == content(1)
    for key in keys:
        owner.remove(key)
    refused(NOT_EXIST, pull, mode_pair.here, owner.by_id(cache_id, 1), method)


@pytest.mark.parametrize("key, releases", [(req(1), True), (prefix(1), False)])
def test_pull_blocks_of_a_slot_by_key(mode_pair, owner, key, releases):
    owner.allocate("a", [PADDING, key])
    assert pull(mode_pair.here, owner.key(key), "pull_blocks") == content(1)
    kept = not (releases and not mode_pair.remote_accessible)
    assert owner.held() == (1, kept, 2)
    owner.remove(key)
    owner.deallocate("a")


def test_pull_blocks_of_blocks_keeps_the_key(mode_pair, owner):
    owner.allocate("a", [BlocksCacheKey(7, MODEL)], is_blocks=True)
    key = BlocksCacheKey(owner.cluster_id, MODEL)
    for _ in range(2):
        assert pull(mode_pair.here, key, "pull_blocks", blocks=((2,), (0,))) == content(2)
        assert owner.held() == (1, 1, 2)
    owner.deallocate("a")
    refused(NOT_EXIST, pull, mode_pair.here, key, "pull_blocks", blocks=((2,), (0,)))


def test_failed_pull_keeps_the_key(mode_pair, owner):
    cache_id = owner.allocate("a", [req(1)])
    keys = [owner.by_id(cache_id)] if mode_pair.remote_accessible else [owner.by_id(cache_id), owner.key(req(1))]
    for key in keys:
        refused(INVALID, pull, mode_pair.here, key, size=65)
        refused(INVALID, pull, mode_pair.here, key, num_tensors=3)
        refused(INVALID, pull, mode_pair.here, key, batch_index=1)
        refused(INVALID, pull, mode_pair.here, key, src_layer_range=range(1, 2))
        assert owner.held() == (1, 1, 2)
    refused(INVALID, pull, mode_pair.here, owner.by_id(cache_id), "pull_blocks", blocks=((), (1,)))
    refused(NOT_EXIST, pull, mode_pair.here, owner.by_id(cache_id, 3))
    assert owner.held() == (1, 1, 2)
    owner.deallocate("a")
    assert owner.held() == (1, 1, 2)
    owner.remove(req(1))


def test_registered_cache_keeps_its_keys(mode_pair, owner):
    spec = Spec(2, 2, (64,), is_registered=True, keys=(req(1), req(2)),
                remote_accessible=True if mode_pair.remote_accessible else None)
    made = mode_pair.there.call(make, "registered", spec)
    assert owner.held() == (1, 2, 0)
    expected = [tensor[64:] for tensor in spec.fill()]
    keys = [owner.by_id(made.cache_id, 1)] if mode_pair.remote_accessible else \
        [owner.by_id(made.cache_id, 1), owner.key(req(2))]
    for key in keys * 2:
        assert pull(mode_pair.here, key) == expected
        assert owner.held() == (1, 2, 0)
    mode_pair.there.call(drop_all)


def test_pushes_and_transfers_keep_the_key(mode_pair, owner):
    """The slot that they write has a key; so has the slot they send."""
    pair = mode_pair
    key = req(5)
    cache_id = owner.allocate("a", [req(1)])
    addrs = owner.addrs("a")
    pair.here.call(make, "src", Spec(2, 1, (64,), keys=(key,)))
    outcome = pair.here.call(transfer, "src", [TransferConfig(owner.cluster_id, addrs)])
    assert outcome.code == LLMStatusCode.LLM_SUCCESS
    assert owner.held() == (1, 1, 2)
    if pair.remote_accessible:
        pair.here.call(invoke, "push_cache", owner.by_id(cache_id), Named("src"))
        assert owner.held() == (1, 1, 2)
    assert pair.here.stats()["keys"] == 1
    owner.deallocate("a")
    owner.remove(req(1))


# ----------------------------------------------------------------------------------------------- against a model

class Table(RuleBasedStateMachine):
    """Random allocations, removals, deallocations and pulls; the owner's counts must follow a model at every step."""

    pair = None
    NUM_TENSORS, NUM_SLOTS = 3, 2
    numbers = st.integers(0, 3)
    kinds = st.sampled_from(["req", "prefix", "padding"])

    def __init__(self):
        super().__init__()
        self.owner = Owner(self.pair.there)
        self.caches = {}            # name -> [has handle, slot -> key, cache id]
        self.keys = {}              # (kind, number) -> [name, slot, tensors taken]
        self.count = 0

    @initialize()
    def make_target(self):
        self.pair.here.call(make, "target", Spec(self.NUM_TENSORS, 1, (64,)))

    def teardown(self):
        for kind, number in list(self.keys):
            self.owner.remove(req(number) if kind == "req" else prefix(number))
        for name in self.caches:
            self.owner.deallocate(name)
        self.pair.here.call(drop_all)
        assert self.owner.held() == (0, 0, 0)

    def drop_if_unreferenced(self, name):
        has_handle, slots, _ = self.caches[name]
        if not has_handle and not slots:
            del self.caches[name]

    def release(self, key):
        name, slot, _ = self.keys.pop(key)
        del self.caches[name][1][slot]
        self.drop_if_unreferenced(name)

    @rule(wanted=st.lists(st.tuples(kinds, numbers), max_size=NUM_SLOTS))
    def allocate(self, wanted):
        names = [(kind, number) for kind, number in wanted if kind != "padding"]
        made = [PADDING if kind == "padding" else req(number) if kind == "req" else prefix(number)
                for kind, number in wanted]
        self.count += 1
        name = self.count
        if len(set(names)) != len(names) or any(key in self.keys for key in names):
            refused(INVALID, self.owner.allocate, name, made, self.NUM_TENSORS, self.NUM_SLOTS)
            return
        cache_id = self.owner.allocate(name, made, self.NUM_TENSORS, self.NUM_SLOTS)
        slots = {slot: key for slot, key in enumerate(wanted) if key[0] != "padding"}
        self.caches[name] = [True, slots, cache_id]
        for slot, key in slots.items():
            self.keys[key] = [name, slot, set()]

    @rule(data=st.data())
    @precondition(lambda self: self.caches)
    def deallocate(self, data):
        name = data.draw(st.sampled_from(sorted(self.caches)))
        self.owner.deallocate(name)
        self.caches[name][0] = False
        self.drop_if_unreferenced(name)

    @rule(kind=st.sampled_from(["req", "prefix"]), number=numbers)
    def remove(self, kind, number):
        self.owner.remove(req(number) if kind == "req" else prefix(number))
        if (kind, number) in self.keys:
            self.release((kind, number))

    @rule(kind=st.sampled_from(["req", "prefix"]), number=numbers, first=st.integers(0, 2), count=st.integers(0, 3))
    def pull_by_key(self, kind, number, first, count):
        if self.pair.remote_accessible:
            return
        key = self.owner.key(req(number) if kind == "req" else prefix(number))
        self.pull(key, self.keys.get((kind, number)), (kind, number), first, count)

    @rule(data=st.data(), slot=st.integers(0, NUM_SLOTS - 1), first=st.integers(0, 2), count=st.integers(0, 3))
    @precondition(lambda self: self.caches)
    def pull_by_id(self, data, slot, first, count):
        name = data.draw(st.sampled_from(sorted(self.caches)))
        _, slots, cache_id = self.caches[name]
        self.pull(self.owner.by_id(cache_id, slot), [name, slot, None], slots.get(slot), first, count)

    def pull(self, key, found, bound, first, count):
        """Pull `count` layers of one tensor from `first` on; 0 means all, without a range."""
        if first + count > self.NUM_TENSORS:
            count = self.NUM_TENSORS - first
        taken = set(range(first, first + count)) if count else set(range(self.NUM_TENSORS))
        arguments = {} if not count else {
            "src_layer_range": range(first, first + count), "dst_layer_range": range(count), "tensor_num_per_layer": 1}
        if found is None:
            refused(NOT_EXIST, self.pair.here.call, invoke, "pull_cache", key, Named("target"), **arguments)
            return
        self.pair.here.call(invoke, "pull_cache", key, Named("target"), **arguments)
        got = self.pair.here.call(contents, "target")
        assert all(got[i] == bytes([found[1] + 1]) * 64 for i in range(len(taken)))
        if bound is not None and bound[0] == "req" and not self.pair.remote_accessible:
            self.keys[bound][2] |= taken
            if len(self.keys[bound][2]) == self.NUM_TENSORS:
                self.release(bound)

    @invariant()
    def counts_follow(self):
        assert self.owner.held() == (len(self.caches), len(self.keys), self.NUM_TENSORS * len(self.caches))


def test_counts_follow_a_model(mode_pair):
    Table.pair = mode_pair
    run_state_machine_as_test(Table, settings=settings(examples, stateful_step_count=25))

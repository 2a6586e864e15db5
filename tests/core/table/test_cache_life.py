"""The life of caches against a model of dicts and sets, compared after every step."""
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_datadist.status import LLMMemoryError, LLMNotFoundError, LLMParamInvalidError, LLMTimeoutError
from llm_datadist_probes.table import CacheTable, PagePool

KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID = range(4)
BLOCKS, HOST, REMOTE, LAST_WINS = 1, 2, 4, 8
NO_ID = 2**64 - 1
BASE, PAGE, NUM_PAGES = 1 << 40, 512, 96
OUTSIDE = 1 << 50                                   # where registered tensors live

IDS, MODELS = (0, 1, 2, 2**64 - 2), (0, 7)
KEYS = st.tuples(st.sampled_from((KEY_REQ, KEY_PREFIX)), st.sampled_from(IDS), st.sampled_from(MODELS))
ALL_KEYS = [(kind, id, model) for kind in (KEY_REQ, KEY_PREFIX) for id in IDS for model in MODELS]
ALL_KEYS += [(KEY_BLOCKS, NO_ID, model) for model in MODELS]


class ModelCache:
    def __init__(self, cache_id, owned, blocks, addrs, num_slots, tensor_bytes):
        self.cache_id, self.owned, self.blocks = cache_id, owned, blocks
        self.addrs, self.num_slots, self.tensor_bytes = addrs, num_slots, tensor_bytes
        self.keys = {}                              # batch slot -> key
        self.pins = 0
        self.handle = self.published = True

    @property
    def kept(self):
        """What the specification counts: the handle, and keys of owned contiguous caches."""
        return self.handle or (self.owned and not self.blocks and bool(self.keys))

    @property
    def num_bytes(self):
        return len(self.addrs) * self.tensor_bytes

    @property
    def num_pages(self):
        return len(self.addrs) * -(-self.tensor_bytes // PAGE) if self.owned else 0


class CacheMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.table = CacheTable()
        self.pool = PagePool(BASE, NUM_PAGES * PAGE, 9)
        self.caches = {}                            # live ones by id
        self.bound = {}                             # key -> (cache, batch slot)
        self.taken = {}                             # key -> tensors taken since it was bound
        self.pins = []                              # (what resolve gave, cache, key that a pull releases)
        self.last_id = 0
        self.next_addr = OUTSIDE

    # The model's transitions.

    def unbind(self, key):
        cache, slot = self.bound.pop(key)
        del cache.keys[slot]
        self.taken.pop(key, None)
        return cache

    def settle(self, cache):
        if cache.kept:
            return
        cache.published = False
        for key in list(cache.keys.values()):
            self.unbind(key)
        if cache.pins == 0:
            self.caches.pop(cache.cache_id, None)

    def enter(self, cache_id, owned, blocks, addrs, num_slots, tensor_bytes, keys):
        self.last_id += 1
        assert cache_id == self.last_id             # one counter for both sorts
        cache = self.caches[cache_id] = ModelCache(cache_id, owned, blocks, addrs, num_slots, tensor_bytes)
        for slot, *key in keys:
            key = tuple(key)
            if key in self.bound:
                if self.bound[key][0] is not cache and key[0] != KEY_BLOCKS:
                    continue                        # registered later: the first cache keeps the key
                self.unbind(key)
            self.bound[key] = cache, slot
            cache.keys[slot] = key

    def pinned(self, pin, cache, batch_index):
        key = cache.keys.get(batch_index)
        assert pin[:6] == (cache.cache_id, pin.slot, pin.generation, len(cache.addrs), cache.num_slots,
                           cache.tensor_bytes)
        assert pin.stride == cache.tensor_bytes // cache.num_slots and pin.addrs == tuple(cache.addrs)
        assert (pin.owned, pin.is_blocks, pin.batch_index) == (cache.owned, cache.blocks, batch_index)
        assert pin.key_kind == (key[0] if key else KEY_BY_ID)
        releases = cache.owned and key is not None and key[0] == KEY_REQ
        assert (pin.key is not None) == releases
        cache.pins += 1
        self.pins.append((pin, cache, key if releases else None))

    # Steps.

    @rule(num_tensors=st.integers(1, 5), num_slots=st.integers(1, 3), tensor_bytes=st.integers(1, 2000),
          keys=st.lists(st.none() | KEYS, max_size=4), last_wins=st.booleans())
    def allocate(self, num_tensors, num_slots, tensor_bytes, keys, last_wins):
        keys = [(slot, *key) for slot, key in enumerate(keys) if key is not None]       # None stands for padding
        names = [key[1:] for key in keys]
        refused = (any(slot >= num_slots for slot, *_ in keys) or any(name in self.bound for name in names)
                   or (len(set(names)) < len(names) and not last_wins))
        self.expect_allocation(num_tensors, num_slots, tensor_bytes, keys, LAST_WINS * last_wins, refused)

    @rule(num_tensors=st.integers(1, 5), num_slots=st.integers(1, 50), tensor_bytes=st.integers(1, 2000),
          model=st.none() | st.sampled_from(MODELS))
    def allocate_blocks(self, num_tensors, num_slots, tensor_bytes, model):
        keys = [] if model is None else [(0, KEY_BLOCKS, NO_ID, model)]
        self.expect_allocation(num_tensors, num_slots, tensor_bytes, keys, BLOCKS,
                               any(key[1:] in self.bound for key in keys))

    def expect_allocation(self, num_tensors, num_slots, tensor_bytes, keys, flags, refused):
        pages = -(-tensor_bytes // PAGE)
        fits = sum(run // pages for _, run, used in self.pool.runs() if not used) >= num_tensors
        try:
            cache_id, addrs = self.table.allocate(self.pool, num_tensors, num_slots, tensor_bytes, keys, flags)
        except LLMParamInvalidError:
            assert refused
        except LLMMemoryError:
            assert not refused and not fits
        else:
            assert not refused and fits
            self.enter(cache_id, True, bool(flags & BLOCKS), addrs, num_slots, tensor_bytes, keys)

    @rule(num_tensors=st.integers(1, 4), num_slots=st.integers(1, 3), tensor_bytes=st.integers(1, 2000),
          keys=st.lists(KEYS, max_size=3), gap=st.sampled_from((0, 0, 5)))
    def register(self, num_tensors, num_slots, tensor_bytes, keys, gap):
        keys = [(slot, *key) for slot, key in enumerate(keys)]
        names = [key[1:] for key in keys]
        addrs = [self.next_addr + i * (tensor_bytes + gap * i) for i in range(num_tensors)][::-1 if gap else 1]
        refused = len(names) > num_slots or any(
            name in names[:i] and name not in self.bound for i, name in enumerate(names))
        try:
            cache_id = self.table.register(addrs, num_slots, tensor_bytes, keys)
        except LLMParamInvalidError:
            assert refused
        else:
            assert not refused
            self.next_addr += 1 << 20
            self.enter(cache_id, False, False, addrs, num_slots, tensor_bytes, keys)

    @rule(num_slots=st.integers(1, 50), model=st.none() | st.sampled_from(MODELS))
    def register_blocks(self, num_slots, model):
        keys = [] if model is None else [(0, KEY_BLOCKS, NO_ID, model)]
        cache_id = self.table.register([self.next_addr], num_slots, 1000, keys, BLOCKS)
        self.enter(cache_id, False, True, [self.next_addr], num_slots, 1000, keys)
        self.next_addr += 1 << 20

    @rule(key=st.sampled_from(ALL_KEYS))
    def resolve(self, key):
        if key in self.bound:
            self.pinned(self.table.resolve(*key), *self.bound[key])
        else:
            with pytest.raises(LLMNotFoundError, match=str(key[1])):
                self.table.resolve(*key)

    @precondition(lambda self: self.last_id)
    @rule(data=st.data(), batch_index=st.integers(0, 3))
    def resolve_by_id(self, data, batch_index):
        cache = self.caches.get(data.draw(st.integers(1, self.last_id)))
        if cache and cache.published and batch_index < (1 if cache.blocks else cache.num_slots):
            self.pinned(self.table.resolve(KEY_BY_ID, cache.cache_id, 0, batch_index), cache, batch_index)
        elif cache:
            with pytest.raises(LLMNotFoundError, match=str(cache.cache_id)):
                self.table.resolve(KEY_BY_ID, cache.cache_id, 0, batch_index)

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), num_bytes=st.integers(1, 2000))
    def pin_range(self, data, num_bytes):
        cache = self.caches[data.draw(st.sampled_from(sorted(self.caches)))]
        tensor = data.draw(st.integers(0, len(cache.addrs) - 1))
        offset = data.draw(st.integers(0, cache.tensor_bytes - 1))
        addr = cache.addrs[tensor] + offset
        if cache.published and offset + num_bytes <= cache.tensor_bytes:
            pin = self.table.pin_range(addr, num_bytes)
            assert (pin.cache_id, pin.tensor, pin.offset) == (cache.cache_id, tensor, offset)
            self.pinned(pin, cache, 0)
        else:
            with pytest.raises(LLMParamInvalidError, match=hex(addr)):
                self.table.pin_range(addr, num_bytes)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        pin, cache, _ = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.table.unpin(pin)
        cache.pins -= 1
        if not cache.pins and not cache.published:
            del self.caches[cache.cache_id]

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), whole=st.booleans())
    def take(self, data, whole):
        pin, cache, key = data.draw(st.sampled_from(self.pins))
        total = pin.num_tensors
        first = 0 if whole else data.draw(st.integers(0, total - 1))
        count = total if whole else data.draw(st.integers(0, total - first))
        self.table.take(pin.key, first, count)
        # Keys are bound by allocate alone, so the same name on the same cache is still the same key.
        if key is None or self.bound.get(key, (None, None))[0] is not cache:
            return
        taken = self.taken.setdefault(key, set())
        taken.update(range(first, first + count))
        if len(taken) == total:
            self.unbind(key)
            self.settle(cache)

    @rule(key=st.sampled_from(ALL_KEYS))
    def remove_key(self, key):
        self.table.remove_key(*key)
        if key in self.bound:
            self.settle(self.unbind(key))

    @rule(data=st.data())
    def deallocate(self, data):
        cache_id = data.draw(st.integers(-1, self.last_id + 1))
        self.table.deallocate(cache_id)
        cache = self.caches.get(cache_id)
        if cache and cache.owned:
            cache.handle = False
            self.settle(cache)

    @rule(data=st.data())
    def unregister(self, data):
        cache_id = data.draw(st.integers(-1, self.last_id + 1))
        cache = self.caches.get(cache_id)
        if not cache or cache.owned:
            self.table.unregister(cache_id)
            return
        if cache.pins:
            with pytest.raises(LLMTimeoutError, match=f"cache {cache_id} .* {cache.pins} transfers"):
                self.table.unregister(cache_id, timeout_ms=0)
        else:
            self.table.unregister(cache_id)
        cache.handle = False
        self.settle(cache)

    # Comparisons.

    @invariant()
    def counts_agree(self):
        live = self.caches.values()
        stats = self.table.stats()
        assert stats["num_owned"] == sum(cache.owned for cache in live)
        assert stats["num_registered"] == sum(not cache.owned for cache in live)
        assert stats["num_keys"] == len(self.bound)
        assert stats["num_pins"] == len(self.pins)
        assert stats["num_deferred"] == sum(not cache.handle for cache in live)
        assert stats["owned_bytes"] == sum(cache.num_bytes for cache in live if cache.owned)
        assert stats["registered_bytes"] == sum(cache.num_bytes for cache in live if not cache.owned)
        assert self.pool.free_bytes == (NUM_PAGES - sum(cache.num_pages for cache in live)) * PAGE

    @invariant()
    def rows_agree(self):
        rows = {row["cache_id"]: row for row in self.table.snapshot()}
        assert set(rows) == set(self.caches)
        for cache in self.caches.values():
            row = rows[cache.cache_id]
            assert (row["pins"], row["num_keys"], row["bytes"], row["num_tensors"]) == (
                cache.pins, len(cache.keys), cache.num_bytes, len(cache.addrs))
            assert (row["owned"], row["is_blocks"], row["handle_ref"], row["published"]) == (
                cache.owned, cache.blocks, cache.handle, cache.published)

    @invariant()
    def reachable_alike(self):
        for key in ALL_KEYS:
            try:
                pin = self.table.resolve(*key)
            except LLMNotFoundError:
                assert key not in self.bound
            else:
                self.table.unpin(pin)
                assert (pin.cache_id, pin.batch_index) == (self.bound[key][0].cache_id, self.bound[key][1])
        for cache_id in range(1, self.last_id + 1):
            try:
                self.table.unpin(self.table.pin_local(cache_id))
            except LLMNotFoundError:
                assert cache_id not in self.caches or not self.caches[cache_id].published
            else:
                assert self.caches[cache_id].published

    def teardown(self):
        for pin, _, _ in self.pins:
            self.table.unpin(pin)
        for key in ALL_KEYS:
            self.table.remove_key(*key)
        for cache_id in range(1, self.last_id + 1):
            self.table.deallocate(cache_id)
            self.table.unregister(cache_id)
        stats = self.table.stats()
        assert not any(value for name, value in stats.items() if name not in ("key_bytes",)), stats
        assert self.table.snapshot() == []
        assert self.pool.runs() == [(0, NUM_PAGES, False)]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)

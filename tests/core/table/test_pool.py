"""The page pool against a model that keeps one flag per page."""
import random
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_datadist.status import LLMMemoryError, LLMParamInvalidError
from llm_datadist_probes.table import PagePool

BASE = 1 << 40
PAGE = 512


def whole(pool):
    return [(0, pool.num_pages, False)]


@pytest.mark.parametrize(
    "base, memory_size, page_shift, message",
    [
        (BASE, 1 << 20, 8, "page_shift is 8"),
        (BASE, 1 << 40, 31, "page_shift is 31"),
        (BASE, 511, 9, "smaller than a page of 512"),
        (BASE, 0, 16, "smaller than a page of 65536"),
        (0, (2**32 - 1) << 9, 9, "4294967295 pages"),
        (2**64 - 4096, 4097, 9, "end of the address space"),
    ],
)
def test_create_refuses(base, memory_size, page_shift, message):
    with pytest.raises(LLMParamInvalidError, match=message):
        PagePool(base, memory_size, page_shift)


def test_create_bounds():
    assert PagePool(BASE, 512, 9).num_pages == 1
    assert PagePool(BASE, 1 << 30, 30).num_pages == 1
    assert PagePool(BASE, 1023, 9).free_bytes == 512            # the tail is smaller than a page
    assert PagePool(2**64 - 4096, 4095, 9).num_pages == 7


def test_untouched_pages_cost_nothing():
    with open("/proc/self/maps") as maps:
        loaded = maps.read()
        if "libasan" in loaded or "libtsan" in loaded:
            pytest.skip("a sanitizer shadows every page of an allocation")
    pool = PagePool(BASE, 1 << 36, 12)                          # 2**24 pages, 256 MiB of records if they were touched
    span = pool.alloc(1 << 20)
    with open("/proc/self/statm") as statm:
        before = int(statm.read().split()[1])
    other = PagePool(BASE, 1 << 36, 12)
    other.free(other.alloc(1 << 20))
    with open("/proc/self/statm") as statm:
        assert int(statm.read().split()[1]) - before < 1000     # pages of 4 KiB
    pool.free(span)
    assert pool.largest_bytes == pool.free_bytes == 1 << 36


@pytest.mark.parametrize("num_pages", [1, 2, 31, 32, 33, 63, 64, 1000, 4095, 4097])
def test_whole_pool_in_one_run(num_pages):
    pool = PagePool(BASE, num_pages * PAGE, 9)
    span = pool.alloc(num_pages)
    assert span == 0 and pool.free_bytes == pool.largest_bytes == 0 and pool.alloc(1) is None
    pool.free(span)
    assert pool.runs() == whole(pool)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_freed_neighbours_merge(order):
    pool = PagePool(BASE, 12 * PAGE, 9)
    spans = [pool.alloc(4) for _ in range(3)]
    for i in order:
        pool.free(spans[i])
    assert pool.runs() == whole(pool)


def test_tensors_are_page_aligned_at_equal_steps():
    pool = PagePool(BASE, 100 * PAGE, 9)
    span, addrs = pool.alloc_tensors(5, 3 * PAGE - 1)
    assert addrs == [BASE + i * 3 * PAGE for i in range(5)]
    assert pool.free_bytes == 85 * PAGE
    pool.free(span)
    assert pool.runs() == whole(pool)


def fragment(pool, keep):
    """Use every page and free all but those in `keep`."""
    spans = [pool.alloc(1) for _ in range(pool.num_pages)]
    assert spans == list(range(pool.num_pages))
    for page in spans:
        if page not in keep:
            pool.free(page)
    return sorted(keep)


def test_tensors_fall_back_to_separate_runs():
    pool = PagePool(BASE, 20 * PAGE, 9)
    kept = fragment(pool, {4, 10, 13})                          # free runs: 4, 5, 2 and 6 pages
    span, addrs = pool.alloc_tensors(8, 2 * PAGE)               # 2 + 2 + 1 + 3 pieces: every one that fits
    assert len(set(addrs)) == 8 and all((addr - BASE) % PAGE == 0 for addr in addrs)
    pages = sorted(page for addr in addrs for page in range((addr - BASE) // PAGE, (addr - BASE) // PAGE + 2))
    assert len(set(pages)) == 16 and not set(pages) & set(kept)
    pool.free(span)
    for page in kept:
        pool.free(page)
    assert pool.runs() == whole(pool)


@pytest.mark.parametrize("num_tensors, pages", [(9, 2), (5, 3), (3, 5), (2, 6), (18, 1)])
def test_tensors_all_or_nothing(num_tensors, pages):
    pool = PagePool(BASE, 20 * PAGE, 9)
    fragment(pool, {4, 10, 13})                                 # 17 free pages in runs of 4, 5, 2 and 6
    before = pool.runs()
    with pytest.raises(LLMMemoryError, match=f"{num_tensors} tensors of {pages * PAGE} bytes.* 8704 are free, "
                                             "the largest run has 3072"):
        pool.alloc_tensors(num_tensors, pages * PAGE)
    assert pool.runs() == before
    pool.free(pool.alloc_tensors(num_tensors - 1, pages * PAGE)[0])
    assert pool.runs() == before


@pytest.mark.parametrize("num_pages", [65, 66, 67])
def test_a_run_that_fits_is_found_behind_shorter_ones(num_pages):
    """Bins above 64 pages hold several lengths; the latest run of a bin is looked at first."""
    pool = PagePool(BASE, (num_pages + 1 + 64 + 1) * PAGE, 9)
    long, wall, short, end = pool.alloc(num_pages), pool.alloc(1), pool.alloc(64), pool.alloc(1)
    for order in ((long, short), (short, long)):
        for span in order:
            pool.free(span)
        assert pool.alloc(num_pages + 1) is None
        assert pool.alloc(num_pages) == long
        assert pool.alloc(64) == short
    for span in (long, wall, short, end):
        pool.free(span)
    assert pool.runs() == whole(pool)


@pytest.mark.parametrize("num_tensors, tensor_bytes", [
    (1, 2**64 - 1), (2**20, 2**64 - 1), (2**20, 2**44), (1, 101 * PAGE), (101, 1), (2, 2**63),
])
def test_too_large_is_refused_without_overflow(num_tensors, tensor_bytes):
    pool = PagePool(BASE, 100 * PAGE, 9)
    with pytest.raises(LLMMemoryError, match=f"{num_tensors} tensors of {tensor_bytes} bytes"):
        pool.alloc_tensors(num_tensors, tensor_bytes)
    assert pool.alloc(2**64 - 1) is None and pool.alloc(2**32 + 1) is None
    assert pool.runs() == whole(pool)


@pytest.mark.parametrize("num_tensors, tensor_bytes", [(0, 1), (1, 0), (0, 0)])
def test_nothing_asked_for(num_tensors, tensor_bytes):
    with pytest.raises(LLMParamInvalidError, match="at least 1"):
        PagePool(BASE, PAGE, 9).alloc_tensors(num_tensors, tensor_bytes)


def test_free_refuses_what_is_not_a_span():
    pool = PagePool(BASE, 20 * PAGE, 9)
    fragment(pool, {4, 10, 13})
    span, addrs = pool.alloc_tensors(8, 2 * PAGE)
    heads = {(addr - BASE) // PAGE for addr in addrs}
    state = pool.runs()
    for page in [*(set(range(20)) - {span, 4, 10, 13}), 20, 2**32 - 2]:     # later runs of the chain among them
        with pytest.raises(LLMParamInvalidError, match=f"page {page} does not"):
            pool.free(page)
    assert heads and pool.runs() == state
    pool.free(span)
    with pytest.raises(LLMParamInvalidError):
        pool.free(span)
    pool.free(2**32 - 1)                                        # no span: nothing to do
    assert pool.free_bytes == 17 * PAGE


class PoolMachine(RuleBasedStateMachine):
    """`self.used[page]` names the allocation that holds a page."""

    @initialize(num_pages=st.integers(1, 300), shift=st.integers(9, 13))
    def create(self, num_pages, shift):
        self.page = 1 << shift
        self.pool = PagePool(BASE, num_pages * self.page, shift)
        self.used = [None] * num_pages
        self.spans = {}
        self.counter = 0

    def free_runs(self):
        runs, length = [], 0
        for owner in [*self.used, "end"]:
            if owner is None:
                length += 1
            elif length:
                runs.append(length)
                length = 0
        return runs

    def occupy(self, span, pages):
        assert all(self.used[page] is None for page in pages), "handed out twice"
        assert len(set(pages)) == len(pages)
        self.counter += 1
        for page in pages:
            self.used[page] = self.counter
        self.spans[self.counter] = span

    @rule(num_pages=st.integers(1, 320))
    def alloc(self, num_pages):
        fits = max(self.free_runs(), default=0) >= num_pages
        span = self.pool.alloc(num_pages)
        assert (span is not None) == fits
        if fits:
            self.occupy(span, list(range(span, span + num_pages)))

    @rule(sizes=st.lists(st.integers(1, 3), min_size=5, max_size=60))
    def alloc_small(self, sizes):
        for num_pages in sizes:
            self.alloc(num_pages)

    @rule(num_tensors=st.integers(1, 40), tensor_bytes=st.integers(1, 1 << 15))
    def alloc_tensors(self, num_tensors, tensor_bytes):
        pages = -(-tensor_bytes // self.page)
        runs = self.free_runs()
        fits = sum(run // pages for run in runs) >= num_tensors
        try:
            span, addrs = self.pool.alloc_tensors(num_tensors, tensor_bytes)
        except LLMMemoryError:
            assert not fits
            return
        assert fits and len(addrs) == num_tensors
        firsts = [divmod(addr - BASE, self.page) for addr in addrs]
        assert all(rest == 0 for _, rest in firsts)
        if max(runs) >= num_tensors * pages:
            assert addrs == [addrs[0] + i * pages * self.page for i in range(num_tensors)]
        self.occupy(span, [page for first, _ in firsts for page in range(first, first + pages)])

    @precondition(lambda self: self.spans)
    @rule(data=st.data())
    def free(self, data):
        owner = data.draw(st.sampled_from(sorted(self.spans)))
        self.pool.free(self.spans.pop(owner))
        self.used = [None if page == owner else page for page in self.used]

    @precondition(lambda self: self.spans)
    @rule(seed=st.integers(0, 99))
    def free_half(self, seed):
        for owner in random.Random(seed).sample(sorted(self.spans), len(self.spans) // 2):
            self.pool.free(self.spans.pop(owner))
            self.used = [None if page == owner else page for page in self.used]

    @rule()
    def runs_agree(self):
        found = self.pool.runs()
        assert [run[1] for run in found if not run[2]] == self.free_runs()

    @invariant()
    def counts_agree(self):
        if hasattr(self, "pool"):
            runs = self.free_runs()
            assert self.pool.free_bytes == sum(runs) * self.page
            assert self.pool.largest_bytes == max(runs, default=0) * self.page

    def teardown(self):
        if hasattr(self, "pool"):
            for span in self.spans.values():
                self.pool.free(span)
            assert self.pool.runs() == whole(self.pool)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_many_runs_in_wide_bins():
    """Sizes over several levels, in random order, against the sum and the final merge."""
    rng = random.Random(7)
    pool = PagePool(BASE, (1 << 20) * PAGE, 9)
    spans, used = {}, 0
    for _ in range(4000):
        if spans and rng.random() < 0.5:
            span = rng.choice(list(spans))
            used -= spans.pop(span)
            pool.free(span)
        else:
            size = int(2 ** rng.uniform(0, 15))
            span = pool.alloc(size)
            if span is not None:
                spans[span] = size
                used += size
        assert pool.free_bytes == ((1 << 20) - used) * PAGE
    assert sorted((span, size, True) for span, size in spans.items()) == [run for run in pool.runs() if run[2]]
    for span in spans:
        pool.free(span)
    assert pool.runs() == whole(pool)


def test_threads_share_a_pool():
    pool = PagePool(BASE, 4096 * PAGE, 9)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        held = []
        try:
            for _ in range(400):
                try:
                    held.append(pool.alloc_tensors(rng.randint(1, 30), rng.randint(1, 8 * PAGE)))
                except LLMMemoryError:
                    pass
                if len(held) > 4:
                    pool.free(held.pop(rng.randrange(len(held)))[0])
            for span, _ in held:
                pool.free(span)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and pool.runs() == whole(pool)

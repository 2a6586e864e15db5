"""Turn block lists into the descriptors of a one-sided batch.

Called by the transfer code without the GIL, on indices that `IndexList` has read. The planners check the
indices, merge runs that are consecutive on both sides, and write one descriptor per run and tensor. Runs are
found once and applied to every tensor.

The provider may carry out the descriptors of a batch in parallel and in any order. So no two of one plan
write the same byte: where a destination block repeats, the planner keeps what the last occurrence in list
order would leave behind, or refuses it where the list was told so (`refuses_repeats`). A list of which every
value lies above or below all values before it cannot repeat any and pays nothing for this; others pay one bitmap
pass over their runs.

Nothing here blocks or touches Python. An `ldd_desc_list` and its scratch memory belong to whoever holds it,
one thread at a time; the functions themselves may be called from any thread.
"""
from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from llm_datadist.core.base.checked_math cimport ldd_add_overflows, ldd_mul_overflows
from llm_datadist.core.base.provider cimport HixlOneSideOpDesc
from llm_datadist.core.base.status cimport LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, ldd_detail, ldd_fail, ldd_status
from llm_datadist.core.plan.index_list cimport ldd_index_error, ldd_load_index

cdef enum:
    SEEN_KEEP_WORDS = 1 << 15       # 256 KiB of bitmap are kept and cleared; a larger one is fresh zero pages
    MIN_CAPACITY = 64


cdef void ldd_desc_list_clear(ldd_desc_list* out) noexcept nogil:
    """Forget the descriptors and keep the memory."""
    out.count = 0
    out.bytes = 0


cdef void ldd_desc_list_free(ldd_desc_list* out) noexcept nogil:
    free(out.items)
    free(out.runs)
    free(out.seen)
    memset(out, 0, sizeof(out[0]))


cdef ldd_status ldd_plan_reserve(
    void** items, size_t* capacity, size_t count, size_t extra, size_t item_bytes, ldd_detail* detail
) noexcept nogil:
    """Grow an array at least twofold, so that appending stays cheap."""
    cdef uint64_t needed, nbytes
    cdef void* grown
    if ldd_add_overflows(count, extra, &needed):
        needed = UINT64_MAX
    if needed <= capacity[0]:
        return LDD_OK
    needed = max(needed, 2 * capacity[0], <size_t>MIN_CAPACITY)
    grown = NULL if ldd_mul_overflows(needed, item_bytes, &nbytes) else realloc(items[0], nbytes)
    if grown == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a plan of %zu entries", <size_t>needed)
    items[0] = grown
    capacity[0] = needed
    return LDD_OK


cdef ldd_status ldd_plan_contiguous(
    ldd_desc_list* out,
    const uint64_t* remote_addrs, uint64_t remote_offset,
    const uint64_t* local_addrs, uint64_t local_offset,
    size_t num_tensors, uint64_t nbytes, ldd_detail* detail
) noexcept nogil:
    """Plan the same bytes of one slot on either side, for every tensor."""
    cdef uint64_t remote_end, local_end
    cdef ldd_status status = _begin(out, 1, detail)
    if status < 0 or nbytes == 0:
        return status
    if ldd_add_overflows(remote_offset, nbytes, &remote_end) or ldd_add_overflows(local_offset, nbytes, &local_end):
        return _beyond(detail)
    out.runs[0].src = remote_offset
    out.runs[0].dst = local_offset
    out.runs[0].length = nbytes
    out.num_runs = 1
    return _emit(out, remote_addrs, remote_end, local_addrs, local_end, num_tensors, False, detail)


cdef ldd_status ldd_plan_blocks(
    ldd_desc_list* out,
    const uint64_t* remote_addrs, const int64_t* remote_blocks, uint64_t num_remote_blocks,
    const uint64_t* local_addrs, const int64_t* local_blocks, uint64_t num_local_blocks,
    size_t num_tensors, uint64_t block_bytes, size_t num_pairs, bint put, ldd_detail* detail
) noexcept nogil:
    """Plan whole blocks, paired by position, for every tensor."""
    cdef uint64_t remote_end, local_end
    cdef ldd_status status = _begin(out, num_pairs, detail)
    if status < 0 or num_pairs == 0:
        return status
    if put:
        status = _find_runs(out, local_blocks, num_local_blocks, remote_blocks, num_remote_blocks, num_pairs, detail)
    else:
        status = _find_runs(out, remote_blocks, num_remote_blocks, local_blocks, num_local_blocks, num_pairs, detail)
    if status < 0:
        return status
    if block_bytes == 0:
        return ldd_fail(detail, LDD_E_PARAM, b"the block size is 0 bytes")
    if (ldd_mul_overflows(num_remote_blocks, block_bytes, &remote_end)
            or ldd_mul_overflows(num_local_blocks, block_bytes, &local_end)):
        return _beyond(detail)
    _runs_to_bytes(out, block_bytes, 0)
    if put:
        return _emit(out, local_addrs, local_end, remote_addrs, remote_end, num_tensors, True, detail)
    return _emit(out, remote_addrs, remote_end, local_addrs, local_end, num_tensors, False, detail)


cdef ldd_status ldd_plan_slot_to_blocks(
    ldd_desc_list* out,
    const uint64_t* slot_addrs, uint64_t slot_offset, uint64_t slot_bytes,
    const uint64_t* block_addrs, const int64_t* blocks, uint64_t num_blocks,
    size_t num_tensors, uint64_t block_bytes, size_t num_filled, bint put, ldd_detail* detail
) noexcept nogil:
    """Plan bytes ``[i*block_bytes, min((i+1)*block_bytes, slot_bytes))`` of a slot into ``blocks[i]``."""
    cdef ldd_status status = _begin(out, num_filled + 1, detail)
    cdef uint64_t num_full, rest, slot_end, blocks_end
    if status < 0 or num_filled == 0:
        return status
    if block_bytes == 0:
        return ldd_fail(detail, LDD_E_PARAM, b"the block size is 0 bytes")
    num_full = slot_bytes // block_bytes
    rest = slot_bytes % block_bytes
    if num_filled > num_full + (rest != 0):
        return ldd_fail(detail, LDD_E_PARAM,
                        b"dst_blocks has %zu blocks of %llu bytes, but the source of %llu bytes fills only %llu",
                        num_filled, <unsigned long long>block_bytes, <unsigned long long>slot_bytes,
                        <unsigned long long>(num_full + (rest != 0)))
    num_full = min(num_full, num_filled)
    status = _find_runs(out, NULL, UINT64_MAX, blocks, num_blocks, num_full, detail)
    if status < 0:
        return status
    if (ldd_add_overflows(slot_offset, slot_bytes, &slot_end)
            or ldd_mul_overflows(num_blocks, block_bytes, &blocks_end)):
        return _beyond(detail)
    _runs_to_bytes(out, block_bytes, slot_offset)
    if num_filled > num_full:
        status = _add_partial_block(out, slot_offset, block_bytes, rest, blocks, num_full, num_blocks, detail)
        if status < 0:
            return status
    return _emit(out, slot_addrs, slot_end, block_addrs, blocks_end, num_tensors, put, detail)


cdef ldd_status _beyond(ldd_detail* detail) noexcept nogil:
    return ldd_fail(detail, LDD_E_PARAM, b"offset and size reach beyond the address space")


cdef ldd_status _begin(ldd_desc_list* out, size_t num_runs, ldd_detail* detail) noexcept nogil:
    """Reserve the worst case once, so that finding runs needs no further check; untouched pages cost nothing."""
    out.num_runs = 0
    return ldd_plan_reserve(<void**>&out.runs, &out.run_capacity, 0, num_runs, sizeof(ldd_run), detail)


cdef ldd_status _find_runs(
    ldd_desc_list* out, const int64_t* src, uint64_t num_src, const int64_t* dst, uint64_t num_dst, size_t n,
    ldd_detail* detail
) noexcept nogil:
    """Check all pairs and merge what is consecutive on both sides, rising or falling.

    ``src`` NULL stands for 0, 1, 2... Lengths are in blocks. Afterwards no destination block is in two runs.
    """
    cdef ldd_run* runs = out.runs
    cdef size_t i, k = 0
    cdef int64_t s, d
    cdef int64_t first_src = 0, first_dst = -2, length = 0     # the open run; matches no block at first
    cdef int64_t low = INT64_MAX, high = -1
    cdef bint may_repeat = False
    for i in range(n):
        d = ldd_load_index(dst + i)
        s = ldd_load_index(src + i) if src != NULL else <int64_t>i
        if <uint64_t>s >= num_src:
            return ldd_index_error(b"src_blocks", i, s, num_src, detail)
        if <uint64_t>d >= num_dst:
            return ldd_index_error(b"dst_blocks", i, d, num_dst, detail)
        may_repeat |= (d <= high) & (d >= low)
        high = max(high, d)
        low = min(low, d)
        if d - first_dst == length and s - first_src == length:
            length += 1
            continue
        if d == first_dst - 1 and s == first_src - 1:
            first_dst, first_src = d, s
            length += 1
            if k and runs[k - 1].dst + runs[k - 1].length == d and runs[k - 1].src + runs[k - 1].length == s:
                k -= 1                          # a falling run came down to the run before it
                first_dst, first_src = runs[k].dst, runs[k].src
                length += runs[k].length
            continue
        if length:
            runs[k].src, runs[k].dst, runs[k].length = first_src, first_dst, length
            k += 1
        first_src, first_dst, length = s, d, 1
    if length:
        runs[k].src, runs[k].dst, runs[k].length = first_src, first_dst, length
        k += 1
    out.num_runs = k
    return _keep_last_writers(out, high, detail) if may_repeat else LDD_OK


cdef ldd_status _keep_last_writers(ldd_desc_list* out, uint64_t highest, ldd_detail* detail) noexcept nogil:
    """Drop what a later pair overwrites. Runs are in list order, and none repeats a block within itself."""
    cdef size_t num_words = highest // 64 + 1, i
    cdef uint64_t* seen
    cdef bint repeats = False
    cdef ldd_status status = LDD_OK
    if num_words <= SEEN_KEEP_WORDS:
        status = ldd_plan_reserve(<void**>&out.seen, &out.seen_capacity, 0, num_words, sizeof(uint64_t), detail)
        if status < 0:
            return status
        seen = out.seen
        memset(seen, 0, num_words * sizeof(uint64_t))
    else:
        seen = <uint64_t*>calloc(num_words, sizeof(uint64_t))
        if seen == NULL:
            return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory to look for repeats among %llu blocks",
                            <unsigned long long>highest)
    for i in range(out.num_runs):
        repeats |= _mark(seen, out.runs[i].dst, out.runs[i].length)
    if repeats:
        memset(seen, 0, num_words * sizeof(uint64_t))
        status = _refuse_repeat(out, seen, detail) if out.refuses_repeats else _rebuild(out, seen, detail)
    if seen != out.seen:
        free(seen)
    return status


cdef ldd_status _refuse_repeat(ldd_desc_list* out, uint64_t* seen, ldd_detail* detail) noexcept nogil:
    """Name the first destination block that occurs a second time. `seen` is empty."""
    cdef size_t i
    cdef uint64_t offset
    for i in range(out.num_runs):
        for offset in range(out.runs[i].length):
            if _mark(seen, out.runs[i].dst + offset, 1):
                return _repeated(out.runs[i].dst + offset, detail)
    return LDD_OK


cdef ldd_status _repeated(uint64_t block, ldd_detail* detail) noexcept nogil:
    return ldd_fail(detail, LDD_E_PARAM,
                    b"block %llu occurs more than once in dst_blocks: the parts would overwrite each other, and which "
                    b"one stays is undefined. Name each destination block once, or set option llm.Strict='0'",
                    <unsigned long long>block)


cdef bint _mark(uint64_t* seen, uint64_t first, uint64_t length) noexcept nogil:
    """Set `length` bits from `first` on; true when one of them was set before."""
    cdef uint64_t word = first // 64, mask, found = 0
    cdef uint64_t bit = first % 64, here
    while length:
        here = min(length, 64 - bit)
        mask = (UINT64_MAX >> (64 - here)) << bit
        found |= seen[word] & mask
        seen[word] |= mask
        length -= here
        word += 1
        bit = 0
    return found != 0


cdef ldd_status _rebuild(ldd_desc_list* out, uint64_t* seen, ldd_detail* detail) noexcept nogil:
    """Rewrite the runs with only those blocks that no later one repeats, in the same order."""
    cdef size_t num_old = out.num_runs, count = num_old, i = num_old
    cdef uint64_t end, begin
    cdef ldd_run* runs
    cdef ldd_run* last
    cdef ldd_run old
    cdef ldd_status status
    while i:                                    # last writers first, each appended behind the old runs
        i -= 1
        old = out.runs[i]
        end = old.length
        while end:
            begin = end
            while begin and not _mark(seen, old.dst + begin - 1, 1):
                begin -= 1
            if begin < end:
                status = ldd_plan_reserve(<void**>&out.runs, &out.run_capacity, count, 1, sizeof(ldd_run), detail)
                if status < 0:
                    return status
                out.runs[count].src = old.src + begin
                out.runs[count].dst = old.dst + begin
                out.runs[count].length = end - begin
                count += 1
            end = begin - 1 if begin else 0     # skip the block that a later one repeats
    # Bring them to the front in list order; what lay around a dropped block may have become one run.
    runs = out.runs
    for i in range((count - num_old) // 2):
        old = runs[num_old + i]
        runs[num_old + i] = runs[count - 1 - i]
        runs[count - 1 - i] = old
    out.num_runs = 0
    for i in range(num_old, count):
        old = runs[i]
        if out.num_runs:
            last = &runs[out.num_runs - 1]
            if last.src + last.length == old.src and last.dst + last.length == old.dst:
                last.length += old.length
                continue
        runs[out.num_runs] = old
        out.num_runs += 1
    return LDD_OK


cdef void _runs_to_bytes(ldd_desc_list* out, uint64_t block_bytes, uint64_t src_offset) noexcept nogil:
    """Scale runs from blocks to bytes; `src_offset` moves the source side. The caller knows that nothing wraps."""
    cdef ldd_run* run = out.runs
    cdef const ldd_run* end = run + out.num_runs
    while run != end:
        run.src = run.src * block_bytes + src_offset
        run.dst *= block_bytes
        run.length *= block_bytes
        run += 1


cdef ldd_status _add_partial_block(
    ldd_desc_list* out, uint64_t slot_offset, uint64_t block_bytes, uint64_t rest, const int64_t* blocks,
    size_t index, uint64_t num_blocks, ldd_detail* detail
) noexcept nogil:
    """Add the last block, of which the slot fills only the first `rest` bytes.

    Where an earlier part filled the same block, its bytes behind `rest` stay, and only those.
    """
    cdef int64_t block = ldd_load_index(blocks + index)
    cdef uint64_t src, dst, head
    cdef size_t i
    cdef ldd_run* run
    cdef ldd_run* last
    cdef ldd_status status
    if <uint64_t>block >= num_blocks:
        return ldd_index_error(b"dst_blocks", index, block, num_blocks, detail)
    src = slot_offset + index * block_bytes
    dst = <uint64_t>block * block_bytes
    status = ldd_plan_reserve(<void**>&out.runs, &out.run_capacity, out.num_runs, 2, sizeof(ldd_run), detail)
    if status < 0:
        return status
    for i in range(out.num_runs):
        run = &out.runs[i]
        if run.dst <= dst < run.dst + run.length:
            if out.refuses_repeats:
                return _repeated(block, detail)
            head = dst - run.dst
            if head:                            # what lies before the hole becomes a run of its own
                last = &out.runs[out.num_runs]
                last.src, last.dst, last.length = run.src, run.dst, head
                out.num_runs += 1
            run.src += head + rest
            run.dst += head + rest
            run.length -= head + rest
            break
    if out.num_runs:
        last = &out.runs[out.num_runs - 1]
        if last.src + last.length == src and last.dst + last.length == dst:
            last.length += rest
            return LDD_OK
    last = &out.runs[out.num_runs]
    last.src, last.dst, last.length = src, dst, rest
    out.num_runs += 1
    return LDD_OK


cdef ldd_status _emit(
    ldd_desc_list* out, const uint64_t* src_addrs, uint64_t src_end, const uint64_t* dst_addrs, uint64_t dst_end,
    size_t num_tensors, bint put, ldd_detail* detail
) noexcept nogil:
    """Write every run for every tensor; where tensors follow each other on both sides, descriptors grow over.

    No run reaches beyond `src_end` and `dst_end`, so it is enough that these stay within the address space.
    """
    cdef uint64_t total = 0, unused, needed
    cdef size_t t, i
    cdef ldd_status status
    for t in range(num_tensors):
        if ldd_add_overflows(src_addrs[t], src_end, &unused) or ldd_add_overflows(dst_addrs[t], dst_end, &unused):
            return ldd_fail(detail, LDD_E_PARAM, b"tensor %zu reaches beyond the address space", t)
    for i in range(out.num_runs):
        total += out.runs[i].length
    if out.num_runs == 0:
        return LDD_OK
    if ldd_mul_overflows(out.num_runs, num_tensors, &needed):
        needed = UINT64_MAX
    status = ldd_plan_reserve(<void**>&out.items, &out.capacity, out.count, needed, sizeof(HixlOneSideOpDesc), detail)
    if status < 0:
        return status
    for t in range(num_tensors):
        if put:
            _append_runs(out, dst_addrs[t], src_addrs[t], True)
        else:
            _append_runs(out, src_addrs[t], dst_addrs[t], False)
    out.bytes += total * num_tensors
    return LDD_OK


cdef inline void _append_runs(ldd_desc_list* out, uint64_t remote, uint64_t local, bint put) noexcept nogil:
    """Write the runs of one tensor; the caller has reserved the room."""
    cdef const ldd_run* run = out.runs
    cdef const ldd_run* end = run + out.num_runs
    cdef HixlOneSideOpDesc* desc = out.items + out.count
    cdef HixlOneSideOpDesc* previous
    # Runs of one tensor are never adjacent, so only the first can continue what is there.
    if out.count and not out.by_tensor:
        previous = desc - 1
        if (<uint64_t>previous.remote_buf + previous.len == remote + (run.dst if put else run.src)
                and <uint64_t>previous.local_buf + previous.len == local + (run.src if put else run.dst)):
            previous.len += run.length
            run += 1
    while run != end:
        desc.remote_buf = <void*>(remote + (run.dst if put else run.src))
        desc.local_buf = <void*>(local + (run.src if put else run.dst))
        desc.len = run.length
        desc += 1
        run += 1
    out.count = desc - out.items

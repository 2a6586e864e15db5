"""Looking up, pinning and releasing a peer's caches in its shared table, without asking; see ``docs/protocol.md``.

The reader copies what it needs under the table's sequence, publishes a hazard (the cache it is about to touch) in its
lane, and looks once more: if nothing changed in between, the owner will see the hazard before it frees the cache. A
released key is queued in the lane, from where the owner takes it in before its next own look at the table, and marked
among the owner's release marks, which sends every other reader to the owner. Where the table cannot tell (a change in
progress, a mark, addresses without a pattern, layered releases), the peer's service thread is asked instead.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from llm_datadist.core.base.atomic cimport (
    ldd_fence, ldd_get32, ldd_get64, ldd_load32, ldd_raise, ldd_ring, ldd_set32, ldd_store32, ldd_store64,
)
from llm_datadist.core.base.sockets cimport (
    ldd_socket_connect, ldd_socket_is_own_user, ldd_socket_recv_files, ldd_socket_send,
)
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_INTERRUPTED, LDD_E_NOT_EXIST, LDD_OK, ldd_fail,
)
from llm_datadist.core.link.access cimport ldd_check_access
from llm_datadist.core.link.links cimport ldd_link_break
from llm_datadist.core.link.requests cimport ldd_reply_room, ldd_request_ping
from llm_datadist.core.link.wire cimport (
    LDD_DESC_BLOCKS, LDD_DESC_EVEN, LDD_DESC_HOST, LDD_DESC_OWNED, LDD_DESC_REMOTE_ACCESSIBLE, LDD_FRAME_HELLO,
    LDD_HELLO_FRAME_BYTES, LDD_HELLO_SHARED_TABLE, LDD_WELCOME_FRAME_BYTES, LDD_WIRE_MAGIC, LDD_WIRE_MAX_PAYLOAD,
    LDD_WIRE_VERSION, ldd_frame_header, ldd_hello, ldd_welcome,
)
from llm_datadist.core.table.cache_life cimport ldd_kind_name
from llm_datadist.core.table.key_index cimport KEY_BY_ID, KEY_REQ, LDD_NO_KEY, ldd_keys_find_shared
from llm_datadist.core.table.shared_table cimport (
    LDD_LANE_RING, LDD_MAX_CACHES, LDD_MAX_CELLS, LDD_SHOWN_BLOCKS, LDD_SHOWN_DTYPE_SHIFT, LDD_SHOWN_HOST,
    LDD_SHOWN_OWNED, LDD_SHOWN_PUBLISHED, LDD_SHOWN_REMOTE_ACCESSIBLE, ldd_lane, ldd_lane_map, ldd_seq_read,
    ldd_seq_unchanged, ldd_shared_cache, ldd_shared_cache_read, ldd_shared_key, ldd_shared_key_read, ldd_shared_reader,
    ldd_shared_table_destroy, ldd_shared_table_map,
)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    ATTEMPTS = 64                               # a table that changes this often is left to its own thread
    NUM_FILES = 3

cdef ldd_status _fetch_files(ldd_link* link, int* files, int64_t deadline_ns) noexcept nogil:
    """Ask for the files over a Unix socket named after the peer's instance, which only this host reaches."""
    cdef char name[80]
    cdef int fd = -1, i
    cdef ldd_frame_header header
    cdef ldd_hello hello
    cdef ldd_welcome answer
    cdef ldd_status status
    cdef uint8_t frame[LDD_HELLO_FRAME_BYTES]
    cdef uint8_t reply[LDD_WELCOME_FRAME_BYTES]
    ldd_shared_table_name(link.instance, name, sizeof(name))
    status = ldd_socket_connect(name, 0, deadline_ns, &fd, NULL)
    if status < 0:
        return status
    if not ldd_socket_is_own_user(fd):                     # a name is anybody's to take
        close(fd)
        return LDD_E_FAILED
    memset(&header, 0, sizeof(header))
    memset(&hello, 0, sizeof(hello))
    header.magic = LDD_WIRE_MAGIC
    header.version = LDD_WIRE_VERSION
    header.type = LDD_FRAME_HELLO
    header.length = sizeof(hello)
    hello.direction = LDD_HELLO_SHARED_TABLE
    hello.cluster_id = link.node.cluster_id
    memcpy(hello.token, link.token, 16)
    memcpy(frame, &header, sizeof(header))
    memcpy(frame + sizeof(header), &hello, sizeof(hello))
    status = ldd_socket_send(fd, frame, sizeof(frame), deadline_ns, NULL)
    if status == LDD_OK:
        status = ldd_socket_recv_files(fd, reply, sizeof(reply), files, NUM_FILES, deadline_ns)
    close(fd)
    if status == LDD_OK:
        memcpy(&answer, reply + sizeof(header), sizeof(answer))
        status = answer.status
        if status < 0:
            for i in range(NUM_FILES):
                if files[i] >= 0:
                    close(files[i])
    return status


cdef void ldd_shared_table_name(const uint8_t* instance, char* name, size_t size) noexcept nogil:
    cdef int i, at = snprintf(name, size, b"@llm_datadist.table.")
    for i in range(16):
        at += snprintf(name + at, size - at, b"%02x", <unsigned int>instance[i])


cdef ldd_status ldd_reader_attach(ldd_link* link, int64_t deadline_ns) noexcept nogil:
    cdef int files[NUM_FILES]
    cdef int i
    cdef ldd_status status
    cdef ldd_shared_reader* reader
    cdef ldd_detail ignored
    if link.reader_tried or not link.node.shares_table:
        return LDD_OK
    link.reader_tried = True
    for i in range(NUM_FILES):
        files[i] = -1
    status = _fetch_files(link, files, deadline_ns)
    if status == LDD_E_INTERRUPTED:
        link.reader_tried = False
        return status
    if status < 0:
        return LDD_OK
    reader = <ldd_shared_reader*>calloc(1, sizeof(ldd_shared_reader))
    if reader != NULL and ldd_shared_table_map(&reader.shared, files[0], files[1], &ignored) == LDD_OK:
        reader.lane = ldd_lane_map(files[2])
        if reader.lane == NULL:
            ldd_shared_table_destroy(&reader.shared)
    for i in range(NUM_FILES):
        if files[i] >= 0:
            close(files[i])
    if reader != NULL and reader.lane == NULL:
        free(reader)
        reader = NULL
    link.reader = reader
    return LDD_OK


cdef int _read_entry(ldd_shared_reader* reader, uint32_t kind, uint64_t id, uint64_t model_id, uint32_t* key_index,
                     ldd_shared_key* key, ldd_shared_cache* cache) noexcept nogil:
    """Copy the key and its cache and publish the hazard: 1 found, 0 there is none, -1 undecided."""
    cdef uint64_t* seq = &reader.shared.head.seq
    cdef uint64_t before
    cdef uint32_t mask, at
    cdef int _attempt
    for _attempt in range(ATTEMPTS):
        before = ldd_seq_read(seq)
        if before & 1:
            continue
        mask = ldd_get32(&reader.shared.head.mask)
        if mask >= LDD_MAX_CELLS:                   # LDD_NOT_SHARED, for one
            return -1
        at = ldd_keys_find_shared(reader.shared.cells, mask, reader.shared.keys, kind, id, model_id)
        if at == LDD_NO_KEY:
            if ldd_seq_unchanged(seq, before):
                return 0
            continue
        ldd_shared_key_read(&reader.shared.keys[at], key)
        if key.cache_slot >= LDD_MAX_CACHES:
            continue
        ldd_shared_cache_read(&reader.shared.caches[key.cache_slot], cache)
        ldd_store64(&reader.lane.hazard, <uint64_t>cache.generation << 32 | (key.cache_slot + 1))
        if ldd_seq_unchanged(seq, before) and not ldd_get32(&reader.lane.closed):
            key_index[0] = at
            return 1
        ldd_store64(&reader.lane.hazard, 0)
    return -1


cdef ldd_status _missing(ldd_link* link, uint32_t kind, uint64_t id, uint64_t model_id,
                        ldd_detail* detail) noexcept nogil:
    if kind == KEY_BY_ID:
        return ldd_fail(detail, LDD_E_NOT_EXIST, b"cluster %llu: there is no cache %lld",
                        <unsigned long long>link.cluster_id, <long long>id)
    return ldd_fail(detail, LDD_E_NOT_EXIST, b"cluster %llu: no cache is bound to %s %llu of model %llu",
                    <unsigned long long>link.cluster_id, ldd_kind_name(kind), <unsigned long long>id,
                    <unsigned long long>model_id)


cdef ldd_status _check_access(ldd_link* link, const ldd_shared_cache* cache, uint32_t kind, uint64_t batch_index,
                              bint write, ldd_detail* detail) noexcept nogil:
    cdef ldd_detail found
    cdef ldd_status status = ldd_check_access(
        link.node.mode, kind, write, <int64_t>cache.cache_id, cache.num_slots, (cache.flags & LDD_SHOWN_BLOCKS) != 0,
        (cache.flags & LDD_SHOWN_REMOTE_ACCESSIBLE) != 0, batch_index, &found)
    if status < 0:
        ldd_fail(detail, status, b"cluster %llu: %s", <unsigned long long>link.cluster_id, <const char*>found.text)
    return status


cdef bint _fill_addrs(ldd_shared_reader* reader, ldd_link* link, const ldd_shared_cache* cache,
                      ldd_remote_cache* out) noexcept nogil:
    cdef uint32_t i
    if cache.num_tensors == 0 or cache.num_tensors > LDD_WIRE_MAX_PAYLOAD // 8 or cache.num_slots == 0:
        return False
    if ldd_reply_room(link, 8 * <size_t>cache.num_tensors) < 0:
        return False
    out.addrs = <uint64_t*>link.reply
    if cache.step or cache.num_tensors == 1:
        for i in range(cache.num_tensors):
            out.addrs[i] = cache.base + i * cache.step
        return True
    if reader.known_id == <int64_t>cache.cache_id and reader.known_count == cache.num_tensors:
        memcpy(out.addrs, reader.known_addrs, 8 * <size_t>cache.num_tensors)
        return True
    return False


cdef ldd_status ldd_reader_resolve(ldd_link* link, uint32_t kind, uint64_t id, uint64_t model_id, uint64_t batch_index,
                                 bint write, bint release, uint16_t dtype, ldd_remote_cache* out,
                                 ldd_detail* detail) noexcept nogil:
    cdef ldd_shared_reader* reader = link.reader
    cdef ldd_shared_key key
    cdef ldd_shared_cache cache
    cdef uint32_t key_index = LDD_NO_KEY, shown
    cdef ldd_status status
    cdef int found
    if reader == NULL or ldd_load32(&reader.lane.closed):
        return LDD_READER_ASK
    memset(&cache, 0, sizeof(cache))
    memset(&key, 0, sizeof(key))
    found = _read_entry(reader, kind, id, 0 if kind == KEY_BY_ID else model_id, &key_index, &key, &cache)
    if found < 0:
        return LDD_READER_ASK
    if found == 0:
        return _missing(link, kind, id, model_id, detail)
    status = LDD_OK
    shown = cache.flags >> LDD_SHOWN_DTYPE_SHIFT
    if not cache.flags & LDD_SHOWN_PUBLISHED:
        status = _missing(link, kind, id, model_id, detail)
    elif kind == KEY_REQ and <int32_t>(ldd_load32(&reader.shared.marks.marks[key_index]) - key.generation) >= 0:
        status = LDD_READER_ASK                   # somebody says it is released: the owner knows
    elif kind == KEY_BY_ID and cache.num_keys and release:
        status = LDD_READER_ASK                   # the slot may have a key to release, which the owner looks up
    elif dtype and shown and dtype != shown:
        status = LDD_READER_ASK                   # it has the words, and this is no hurry
    else:
        status = _check_access(link, &cache, kind, batch_index, write, detail)
        if status == LDD_OK and not _fill_addrs(reader, link, &cache, out):
            status = LDD_READER_ASK
    if status != LDD_OK:
        ldd_store64(&reader.lane.hazard, 0)
        return status
    memset(&out.desc, 0, sizeof(out.desc))
    out.desc.cache_id = <int64_t>cache.cache_id
    out.desc.num_tensors = cache.num_tensors
    out.desc.flags = ((LDD_DESC_BLOCKS if cache.flags & LDD_SHOWN_BLOCKS else 0)
                      | (LDD_DESC_HOST if cache.flags & LDD_SHOWN_HOST else 0)
                      | (LDD_DESC_OWNED if cache.flags & LDD_SHOWN_OWNED else 0)
                      | (LDD_DESC_REMOTE_ACCESSIBLE if cache.flags & LDD_SHOWN_REMOTE_ACCESSIBLE else 0))
    out.desc.num_slots = cache.num_slots
    out.desc.tensor_bytes = cache.tensor_bytes
    out.desc.tensor.dtype = <uint16_t>shown
    out.desc.stride_bytes = cache.tensor_bytes // cache.num_slots
    out.desc.batch_index = <uint32_t>(batch_index if kind == KEY_BY_ID else key.batch_slot)
    out.desc.region_epoch = ldd_get64(&reader.shared.head.region_epoch)
    reader.key_index = key_index if kind == KEY_REQ and cache.flags & LDD_SHOWN_OWNED else LDD_NO_KEY
    reader.key_generation = key.generation
    return LDD_OK


cdef ldd_status _release_key(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    """Queue the key, then mark it for other readers: dying in between leaves a key that the owner takes in.

    It is queued whatever the marks say: another reader may have been first, and then the owner finds it gone.
    """
    cdef ldd_shared_reader* reader = link.reader
    cdef ldd_lane* lane = reader.lane
    cdef uint32_t head = ldd_get32(&lane.ring_head)
    cdef ldd_status status
    if head - ldd_load32(&lane.ring_tail) >= LDD_LANE_RING:
        ldd_ring(&reader.shared.marks.doorbell)
        status = ldd_request_ping(link, deadline_ns, detail)        # its answer says that the ring was taken in
        if status < 0:
            return status
    ldd_set32(&lane.ring[head % LDD_LANE_RING].key_index, reader.key_index)
    ldd_set32(&lane.ring[head % LDD_LANE_RING].key_generation, reader.key_generation)
    ldd_store32(&lane.ring_head, head + 1)
    ldd_ring(&reader.shared.marks.doorbell)
    ldd_raise(&reader.shared.marks.marks[reader.key_index], reader.key_generation)
    return LDD_OK


cdef ldd_status ldd_reader_done(ldd_link* link, bint take, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_shared_reader* reader = link.reader
    cdef ldd_status status = LDD_OK
    ldd_fence()                                     # the bytes were read before, see "Hazards" in docs/protocol.md
    if ldd_get32(&reader.lane.closed):
        status = ldd_fail(detail, LDD_E_FAILED, b"cluster %llu went away during the transfer",
                          <unsigned long long>link.cluster_id)
        ldd_link_break(link, detail.text)
    elif take and reader.key_index != LDD_NO_KEY:
        status = _release_key(link, deadline_ns, detail)
    ldd_store64(&reader.lane.hazard, 0)
    return status


cdef void ldd_reader_remember(ldd_link* link, const ldd_remote_cache* remote) noexcept nogil:
    cdef ldd_shared_reader* reader = link.reader
    cdef uint64_t* addrs
    if reader == NULL or remote.desc.flags & LDD_DESC_EVEN or reader.known_id == remote.desc.cache_id:
        return
    addrs = <uint64_t*>malloc(8 * <size_t>remote.desc.num_tensors)
    if addrs == NULL:
        return
    memcpy(addrs, remote.addrs, 8 * <size_t>remote.desc.num_tensors)
    free(reader.known_addrs)
    reader.known_addrs = addrs
    reader.known_count = remote.desc.num_tensors
    reader.known_id = remote.desc.cache_id

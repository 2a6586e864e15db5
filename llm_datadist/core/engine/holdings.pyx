"""What an engine holds at this moment: counts, keys and caches, for operators and for calls that wait for them."""
cimport cython

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from llm_datadist.core.base.atomic cimport ldd_get64
from llm_datadist.core.base.status cimport LDD_E_NO_MEMORY, raise_status
from llm_datadist.core.base.sync cimport LDD_NEVER, ldd_lock, ldd_unlock
from llm_datadist.core.link.links cimport LINK_ACTIVE, ldd_link, ldd_link_state_of, ldd_node
from llm_datadist.core.table.cache_life cimport ldd_expired
from llm_datadist.core.table.cache_table cimport ldd_cache_row, ldd_table_counts, ldd_table_snapshot, ldd_table_stats
from llm_datadist.core.table.holds cimport ldd_holds_count
from llm_datadist.core.table.key_index cimport KEY_BY_ID, ldd_key
from llm_datadist.core.table.leases cimport ldd_table_count_unpulled, ldd_table_end_leases, ldd_table_take_expired
from llm_datadist.core.table.pool cimport ldd_pool, ldd_pool_free_bytes, ldd_pool_largest_bytes

cdef enum:
    EXPIRED_AT_ONCE = 32

ctypedef struct ldd_key_row:
    int64_t cache_id
    uint32_t kind
    uint64_t id
    uint64_t model_id


@cython.no_gc_clear
cdef class EngineHoldings(EngineCore):
    """An engine that tells what it holds."""

    def stats(self):
        """What is held right now: caches, keys, pins, pools, links."""
        cdef ldd_table_counts counts
        cdef uint32_t counts_of_links[2]
        self.require_open()
        with nogil:
            ldd_table_stats(self.table, &counts)
            _count_links(&self.node, counts_of_links)
        return {
            "caches": counts.num_owned + counts.num_registered, "owned_caches": counts.num_owned,
            "registered_caches": counts.num_registered, "deferred_caches": counts.num_deferred,
            "keys": counts.num_keys, "expired_keys": counts.num_expired, "pins": counts.num_pins,
            "holds": ldd_holds_count(&self.node.holds),
            "device_pool": self._pool_stats(False), "host_pool": self._pool_stats(True),
            "links": counts_of_links[0], "broken_links": counts_of_links[1],
            "healed_links": ldd_get64(&self.node.num_healed), "requests": ldd_get64(&self.service.num_requests),
            "rejected_frames": ldd_get64(&self.service.num_rejected_frames),
            "refused_peers": ldd_get64(&self.service.num_refused), "provider": self._provider.name,
        }

    def _pool_stats(self, bint host):
        cdef ldd_pool* pool = self.host_pool if host else self.device_pool
        cdef uint64_t free_bytes, largest
        if pool == NULL:
            return None
        with nogil:
            free_bytes = ldd_pool_free_bytes(pool)
            largest = ldd_pool_largest_bytes(pool)
        return {"bytes": pool.memory_size, "free_bytes": free_bytes, "largest_free_bytes": largest}

    def keys(self):
        """One tuple per bound key, oldest cache first: cache id, kind (KEY_*), id, model id."""
        cdef ldd_key* entry
        cdef uint32_t i, count = 0, capacity
        cdef ldd_key_row* rows
        cdef ldd_table_counts counts
        self.require_open()
        with nogil:
            ldd_table_stats(self.table, &counts)
        capacity = <uint32_t>counts.num_keys + 16
        rows = <ldd_key_row*>calloc(capacity, sizeof(ldd_key_row))
        if rows == NULL:
            raise MemoryError()
        try:
            with nogil:
                ldd_lock(&self.table.mutex)
                for i in range(self.table.keys.num_entries):
                    entry = &self.table.keys.entries[i]
                    if entry.generation & 1 and entry.kind != KEY_BY_ID and count < capacity:
                        rows[count].cache_id = self.table.caches[entry.cache_slot].cache_id
                        rows[count].kind = entry.kind
                        rows[count].id = entry.id
                        rows[count].model_id = entry.model_id
                        count += 1
                ldd_unlock(&self.table.mutex)
            return sorted([(rows[i].cache_id, rows[i].kind, rows[i].id, rows[i].model_id) for i in range(count)])
        finally:
            free(rows)

    def take_expired(self):
        """Wait until request keys have expired: (cache id, id, model id, bytes, age in s); [] after `end_leases`."""
        cdef ldd_expired[EXPIRED_AT_ONCE] rows
        cdef size_t count, i
        self.require_open()
        with nogil:
            count = ldd_table_take_expired(self.table, rows, EXPIRED_AT_ONCE)
        return [(rows[i].cache_id, rows[i].id, rows[i].model_id, rows[i].bytes, rows[i].age_ns / 1e9)
                for i in range(count)]

    def end_leases(self):
        """Have `take_expired` return."""
        self.require_open()
        ldd_table_end_leases(self.table)

    def num_unpulled(self):
        """How many request keys are bound to caches that their keys keep."""
        cdef uint64_t count
        self.require_open()
        with nogil:
            count = ldd_table_count_unpulled(self.table)
        return count

    def caches(self):
        """One dict per live cache: id, bytes, num_tensors, keys, pins, owned, is_blocks, handle, age_s, lease_s."""
        cdef size_t capacity, count, i
        cdef ldd_table_counts counts
        cdef ldd_cache_row* rows
        self.require_open()
        with nogil:
            ldd_table_stats(self.table, &counts)
        capacity = counts.num_owned + counts.num_registered + 16
        rows = <ldd_cache_row*>calloc(capacity, sizeof(ldd_cache_row))
        if rows == NULL:
            raise_status(LDD_E_NO_MEMORY, NULL, b"caches", False)
        try:
            with nogil:
                count = min(ldd_table_snapshot(self.table, rows, capacity), capacity)
            return [{
                "cache_id": rows[i].cache_id, "bytes": rows[i].bytes, "num_tensors": rows[i].num_tensors,
                "keys": rows[i].num_keys, "pins": rows[i].pins, "owned": bool(rows[i].owned),
                "is_blocks": bool(rows[i].is_blocks), "handle": bool(rows[i].handle_ref),
                "age_s": rows[i].age_ns / 1e9,
                "lease_s": None if rows[i].lease_ns == LDD_NEVER else rows[i].lease_ns / 1e9,
            } for i in range(count)]
        finally:
            free(rows)


cdef void _count_links(ldd_node* node, uint32_t* counts) noexcept nogil:
    """How many links can be used, and how many are broken."""
    cdef ldd_link* link
    counts[0] = counts[1] = 0
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL:
        counts[0 if ldd_link_state_of(link) == LINK_ACTIVE else 1] += 1
        link = link.next
    ldd_unlock(&node.lock)

"""Memory that peers may reach, and the data servers that announce it."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.provider cimport (
    EndpointDesc, HixlClientHandle, HixlServerHandle, LddFetchHooks, MemHandle, ldd_provider,
)
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_mutex

cdef enum:
    MAX_DATA_SERVERS = 16

ctypedef struct ldd_region:
    uint64_t addr
    uint64_t nbytes
    bint host
    uint32_t refs                               # registrations of exactly this range; 0: the entry is free
    MemHandle handles[MAX_DATA_SERVERS]         # one per data server

# One data server per local address that peers come in by.
ctypedef struct ldd_data_server:
    HixlServerHandle handle
    uint32_t port
    char ip[64]

ctypedef struct ldd_regions:
    const ldd_provider* provider
    ldd_mutex lock                        # guards all below; no other lock is taken under it
    ldd_region* items
    uint32_t count
    uint32_t capacity
    ldd_data_server servers[MAX_DATA_SERVERS]
    uint32_t num_servers
    EndpointDesc* endpoints                     # ours on a real network; the host provider needs none
    uint32_t num_endpoints
    LddFetchHooks fetch_hooks                   # what answers pulls that are one exchange; all NULL: nothing does
    void* fetch_context
    uint64_t epoch                              # grows with every change a connected peer should see

cdef void ldd_regions_init(ldd_regions* regions, const ldd_provider* provider) noexcept nogil
# Destroys the servers; peers are cut off.
cdef void ldd_regions_close(ldd_regions* regions) noexcept nogil

# Announce a range to every server, now and later ones. The same range may be added again and is counted.
cdef ldd_status ldd_regions_add(ldd_regions* regions, uint64_t addr, uint64_t nbytes, bint host,
                                ldd_detail* detail) noexcept nogil
# Withdraw one registration of exactly this range; returns once no server touches it any more.
cdef void ldd_regions_remove(ldd_regions* regions, uint64_t addr, uint64_t nbytes) noexcept nogil

# The port of the data server at this local address, which is started when there is none.
cdef ldd_status ldd_regions_serve(ldd_regions* regions, const char* ip, uint32_t* port,
                                  ldd_detail* detail) noexcept nogil
# Register all regions with a client that is about to connect, for a provider that wants local memory registered too.
cdef ldd_status ldd_regions_register_client(ldd_regions* regions, HixlClientHandle client,
                                            ldd_detail* detail) noexcept nogil
# Nothing answers fetches any more; those under way have ended.
cdef void ldd_regions_end_fetches(ldd_regions* regions) noexcept nogil
# Let whoever knows the token of a link use the data server at this port, until ldd_regions_drop_peer. It may write: in
# either mode a peer does so to ranges on which it has a lease.
cdef ldd_status ldd_regions_admit_peer(ldd_regions* regions, uint32_t port, const uint8_t* token,
                                       ldd_detail* detail) noexcept nogil
# Returns once no server moves bytes for the link of this token any more.
cdef void ldd_regions_drop_peer(ldd_regions* regions, const uint8_t* token) noexcept nogil
cdef uint64_t ldd_regions_epoch(ldd_regions* regions) noexcept nogil
# Before the first server; a copy is kept. The first endpoint is the one links use.
cdef ldd_status ldd_regions_set_endpoints(ldd_regions* regions, const void* endpoints, uint32_t count) noexcept nogil
cdef void ldd_regions_own_endpoint(ldd_regions* regions, uint8_t* out) noexcept nogil

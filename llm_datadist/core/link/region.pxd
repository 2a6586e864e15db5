"""Memory that peers may reach, and the data servers that announce it."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.provider cimport (
    EndpointDesc, HixlClientHandle, HixlServerHandle, LddFetchHooks, MemHandle, aclrtContext, ldd_provider,
)
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_mutex
from llm_datadist.core.link.wire cimport ldd_endpoint_list

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

# What one client was told of our memory when it connected.
ctypedef struct ldd_client_range:
    uint64_t addr
    uint64_t nbytes
    MemHandle handle

ctypedef struct ldd_client_memory:
    uint64_t added                              # ldd_regions.added at that time
    uint32_t count
    ldd_client_range* items

ctypedef struct ldd_regions:
    const ldd_provider* provider
    aclrtContext context                        # of the engine: servers live on its device
    ldd_mutex lock                        # guards all below but for what is atomic; no other lock is taken under it
    ldd_region* items
    uint32_t count
    uint32_t capacity
    ldd_data_server servers[MAX_DATA_SERVERS]
    uint32_t num_servers                        # atomic; those there are do not change until the end
    EndpointDesc endpoints[16]                  # ours on a real network; the host provider needs none
    uint32_t num_endpoints
    ldd_endpoint_list offers                    # the same, as peers are told
    char* resource_config                       # JSON for servers and clients, NULL without
    bint port_is_fixed                          # by resource_config: there is but one server
    uint8_t traffic_class
    uint8_t service_level
    uint64_t added                              # counts ranges that were added; atomic
    LddFetchHooks fetch_hooks                   # what answers pulls that are one exchange; all NULL: nothing does
    void* fetch_context
    uint64_t epoch                              # grows with every change a connected peer should see

cdef void ldd_regions_init(ldd_regions* regions, const ldd_provider* provider) noexcept nogil
# Destroys the servers; peers are cut off.
cdef void ldd_regions_close(ldd_regions* regions) noexcept nogil

# Announce a range to every server, now and later ones. The same range may be added again and is counted.
cdef ldd_status ldd_regions_add(ldd_regions* regions, uint64_t addr, uint64_t nbytes, bint host,
                                ldd_detail* detail) noexcept nogil
# Withdraw one registration of exactly this range; True when it was the last, and no server touches it any more.
cdef bint ldd_regions_remove(ldd_regions* regions, uint64_t addr, uint64_t nbytes) noexcept nogil

# Whether there is a data server at this local address, and its port. Without the lock.
cdef bint ldd_regions_find_server(const ldd_regions* regions, const char* ip, uint32_t* port) noexcept nogil
# The port of the data server at this local address, which is started when there is none.
cdef ldd_status ldd_regions_serve(ldd_regions* regions, const char* ip, uint32_t* port,
                                  ldd_detail* detail) noexcept nogil
# Register all regions with a client that is about to connect, for a provider that wants local memory registered too;
# `out` is what was registered, for the caller to free, NULL for a provider that does not.
cdef ldd_status ldd_regions_register_client(ldd_regions* regions, HixlClientHandle client, ldd_client_memory** out,
                                            ldd_detail* detail) noexcept nogil
# Whether memory was added that a client with this record does not know.
cdef bint ldd_regions_are_known(ldd_regions* regions, const ldd_client_memory* known) noexcept nogil
# Nothing answers fetches any more; those under way have ended.
cdef void ldd_regions_end_fetches(ldd_regions* regions) noexcept nogil
# Let whoever knows the token of a link use the data server at this port, until ldd_regions_drop_peer. It may write: in
# either mode a peer does so to ranges on which it has a lease.
cdef ldd_status ldd_regions_admit_peer(ldd_regions* regions, uint32_t port, const uint8_t* token,
                                       ldd_detail* detail) noexcept nogil
# Returns once no server moves bytes for the link of this token any more.
cdef void ldd_regions_drop_peer(ldd_regions* regions, const uint8_t* token) noexcept nogil
cdef uint64_t ldd_regions_epoch(ldd_regions* regions) noexcept nogil
# Before the first server; copies are kept. `records` are `count` of ldd_endpoint_record, at most LDD_MAX_ENDPOINTS.
cdef ldd_status ldd_regions_configure(ldd_regions* regions, const void* records, uint32_t count,
                                      const char* resource_config, uint8_t traffic_class,
                                      uint8_t service_level) noexcept nogil
# The first of our endpoints, for the hello.
cdef void ldd_regions_own_endpoint(ldd_regions* regions, uint8_t* out) noexcept nogil

"""The links of this engine and their state, shared by the service thread and user threads; see ``links.pyx``."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.atomic cimport ldd_load32
from llm_datadist.core.base.provider cimport HixlClientHandle, aclrtContext, ldd_provider
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_cond, ldd_mutex
from llm_datadist.core.link.region cimport ldd_client_memory, ldd_regions
from llm_datadist.core.plan.block_plan cimport ldd_desc_list
from llm_datadist.core.record.record cimport ldd_peer_record, ldd_record
from llm_datadist.core.table.cache_table cimport ldd_table
from llm_datadist.core.table.holds cimport ldd_holds
from llm_datadist.core.table.shared_table cimport ldd_lane, ldd_shared_reader

cdef enum:
    MAX_LINKS = 4096
    MAX_PAST = 16384                            # clusters that are remembered after their links have gone

cdef enum ldd_link_origin:
    ORIGIN_LOCAL                                # link_clusters called here
    ORIGIN_PEER                                 # link_clusters called there
    ORIGIN_COMM                                 # both called link

cdef enum ldd_link_state:
    LINK_OPENING
    LINK_ACTIVE
    LINK_BROKEN                                 # the peer died or a transfer timed out; kept until unlinked
    LINK_CLOSED                                 # unlinked; lives on until its last user is done

# A pinned cache of the table.
ctypedef struct ldd_pin:
    uint32_t slot
    uint32_t generation

# What a peer holds: it reads or writes these caches until it releases the lease or is gone.
ctypedef struct ldd_lease:
    uint32_t id                                 # 0: the entry is free
    uint32_t num_pins
    ldd_pin first                               # all a lease on a key needs
    ldd_pin* more                               # the pins after the first, of a lease on ranges
    uint32_t key_index                          # what a release may take
    uint32_t key_generation
    bint held                                   # that is a key of node.holds, not of the table

ctypedef struct ldd_link:
    ldd_node* node
    ldd_link* next
    uint64_t cluster_id
    uint8_t instance[16]
    uint8_t token[16]
    ldd_link_origin origin
    int64_t comm_id                             # of ORIGIN_COMM, otherwise 0
    char peer_ip[64]
    char at_ip[64]                              # where the peer listens, of ORIGIN_LOCAL
    int at_port
    # written under node.lock; the state is read without it, see ldd_link_state_of
    uint32_t state                              # ldd_link_state
    uint32_t refs                               # the set, the service thread and every running operation
    uint32_t ops                                # running operations: while there are any, we may touch peer memory
    char reason[160]                            # why it broke
    bint left                                   # somebody here or there wants it gone: not made anew unless asked for
    bint says_leave                             # tell the peer so when our asking connection ends
    int64_t heal_at_ns                          # when it is tried to make it anew, once it broke; see heal.pyx
    int64_t heal_pause_ns
    # asking: one operation at a time under `lock`
    ldd_mutex lock
    int ask_fd
    uint32_t next_request
    HixlClientHandle client
    char data_ip[64]
    uint32_t data_port
    uint8_t endpoint[160]                       # the peer's EndpointDesc; all zero where there is none
    const void* own_endpoint                    # ours, of the pair that was chosen; NULL before that
    bint submits_slowly                         # a batch is moved within the call that submits it
    ldd_client_memory* own_memory               # what the client knows of our memory
    void* opening                               # a client that is made for the next transfer, see background.pyx
    void (*take_opening)(ldd_link* link) noexcept nogil     # set with it: it becomes `client`, or is left to its thread
    ldd_pin pin                                 # of the local cache of the transfer that runs, if `pinned`
    bint pinned
    uint64_t seen_epoch                         # of the peer's regions
    bint fetches                                # all of them are reached by the network, and in one exchange
    ldd_desc_list descs
    ldd_shared_reader* reader                              # the peer's shared table, see shared_reader.pyx
    bint reader_tried
    uint8_t* reply
    size_t reply_capacity
    # answering: the service thread alone
    ldd_lease* leases
    uint32_t num_leases
    uint32_t lease_capacity
    uint32_t next_lease
    uint32_t num_pins                           # of all leases
    ldd_link* next_ending                       # see replies.pyx
    ldd_lane* lane                              # what the peer writes while it reads our table
    # counters, atomic
    ldd_peer_record* record                     # of the peer; NULL before the link is published
    uint64_t pulled_bytes
    uint64_t pushed_bytes
    uint64_t num_transfers

# A cluster that is or was linked by link_clusters.
ctypedef struct ldd_past:
    uint64_t cluster_id
    bint lost                                   # its link to us broke and was not unlinked: it may come back

# A thread of ours that links to a cluster just now.
ctypedef struct ldd_attempt:
    ldd_attempt* next
    uint64_t cluster_id

ctypedef struct ldd_node:
    const ldd_provider* provider
    aclrtContext context
    ldd_table* table
    ldd_record record
    ldd_holds holds
    ldd_regions regions
    uint64_t cluster_id
    uint8_t instance[16]
    uint32_t mode                               # LDD_MODE_* bits; both ends of a link must agree
    int64_t sync_timeout_ns
    bint shares_table                           # with peers on this host, both ways
    uint8_t[2][32] secrets                      # keys made of the secrets that peers must know, ours first
    uint32_t num_secrets                        # 0: nobody is asked for one
    bint strict                                 # ends of different data types, and repeated destinations, are refused
    bint verifies                               # what arrives is held against checksums of its source
    ldd_mutex lock                        # guards the set and the fields said above; a leaf lock
    ldd_cond idle                         # signalled when a link's last operation ends
    ldd_link* links
    uint32_t num_links                          # read without the lock too: atomic
    uint32_t num_ops                            # running operations of all links, dropped ones included, and attempts
    bint closing                                # no new link is taken in
    ldd_attempt* attempts                       # of link_clusters, at most one per cluster
    ldd_cond attempted                          # signalled when one of them ends, and when a link is made or breaks
    int64_t heal_ns                             # what a call may spend on a broken link; 0: it stays broken
    bint healing                                # the thread of heal.pyx runs
    void (*on_broken)(ldd_node* node) noexcept nogil        # called without locks of ours when a link broke; NULL: not
    void* service                               # the ldd_service that links are handed to
    uint64_t num_healed                         # links made anew, atomic
    ldd_past* past                              # clusters of earlier and present links of link_clusters
    uint32_t num_past
    uint32_t past_capacity
    uint32_t next_past                          # the oldest entry, once no more are kept

cdef void ldd_node_init(ldd_node* node, const ldd_provider* provider, uint64_t cluster_id) noexcept nogil
# All links must be gone.
cdef void ldd_node_destroy(ldd_node* node) noexcept nogil

# The state at this moment. `reason` is there for whoever sees LINK_BROKEN; under node.lock it cannot change.
cdef inline ldd_link_state ldd_link_state_of(const ldd_link* link) noexcept nogil:
    return <ldd_link_state>ldd_load32(&link.state)

# A link of nobody's set yet, with one reference.
cdef ldd_link* ldd_link_new(ldd_node* node, uint64_t cluster_id, ldd_link_origin origin) noexcept nogil
cdef void ldd_link_unref(ldd_link* link) noexcept nogil
cdef void ldd_link_ref(ldd_link* link) noexcept nogil
# Make it visible and active, in the place of a broken one (NULL: of none); LDD_E_NOT_LINKED when that went away
# meanwhile.
cdef ldd_status ldd_link_publish(ldd_link* link, ldd_link* replaced, ldd_detail* detail) noexcept nogil
# An active link to this cluster with an operation counted on it; LDD_E_NOT_LINKED otherwise.
cdef ldd_status ldd_link_begin(ldd_node* node, uint64_t cluster_id, ldd_link** out, ldd_detail* detail) noexcept nogil
cdef void ldd_link_end(ldd_link* link) noexcept nogil
# One more operation on a link somebody uses, whatever its state; ends with ldd_link_end.
cdef void ldd_link_hold(ldd_link* link) noexcept nogil
# The link and its node outlive the link's end, until ldd_link_let_go: for who only reads what the link was made with.
cdef void ldd_link_keep(ldd_link* link) noexcept nogil
cdef void ldd_link_let_go(ldd_link* link) noexcept nogil
# No new operation starts on it; kept in the set.
cdef void ldd_link_break(ldd_link* link, const char* reason) noexcept nogil
# Take it out of the set.
cdef void ldd_link_drop(ldd_link* link) noexcept nogil
# Take a link that was accepted and broke out of the set: the peer may make it anew.
cdef void ldd_link_lose(ldd_link* link) noexcept nogil
# Whether it stays broken, once it breaks, until somebody links or unlinks.
cdef void ldd_link_set_left(ldd_link* link, bint left) noexcept nogil
# The peer unlinked by force.
cdef void ldd_link_leave(ldd_link* link) noexcept nogil
# The broken link to this cluster that we asked for, with a reference to it; NULL where there is none.
cdef ldd_link* ldd_link_hold_broken(ldd_node* node, uint64_t cluster_id) noexcept nogil
# Whether a link of link_clusters to this cluster exists or existed, as far back as MAX_PAST clusters.
cdef bint ldd_link_existed(ldd_node* node, uint64_t cluster_id) noexcept nogil
# Drop all that match; -1 for any origin or communicator. Returns how many there were. `for_good`: the peer is told not
# to make them anew.
cdef uint32_t ldd_links_drop(ldd_node* node, int origin, int64_t comm_id, bint any_cluster, uint64_t cluster_id,
                             bint for_good) noexcept nogil
# Drop what is left of links with a cluster that now, as `instance`, links to us: those it made before, and those we
# made that are broken or lead to an earlier process.
cdef void ldd_links_drop_stale(ldd_node* node, uint64_t cluster_id, const uint8_t* instance) noexcept nogil
# An operation on a link that is already known; False when it is no longer active.
cdef bint ldd_link_resume(ldd_link* link) noexcept nogil
# Something of the engine's that is no link's runs; False when the engine is being finalized, which waits for the end.
cdef bint ldd_node_begin(ldd_node* node) noexcept nogil
cdef void ldd_node_end(ldd_node* node) noexcept nogil
# Drop all links, take in no new ones, and wait until no operation runs, also on links that were dropped earlier.
cdef ldd_status ldd_node_close(ldd_node* node, int64_t deadline_ns) noexcept nogil

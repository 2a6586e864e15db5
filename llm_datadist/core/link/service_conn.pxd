"""Connections of the service thread: their buffers, and the list they are in."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_cond, ldd_mutex
from llm_datadist.core.link.links cimport ldd_link, ldd_node
from llm_datadist.core.link.wire cimport ldd_hello, ldd_welcome

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass

cdef enum:
    MAX_USED_TOKENS = 1024                      # remembered after their links have ended

cdef enum ldd_conn_kind:
    CONN_LISTENER
    CONN_HANDSHAKE
    CONN_PROVING                                # its hello has come, the proof of the secret has not
    CONN_SERVING

ctypedef struct ldd_bytes:
    uint8_t* data
    size_t length
    size_t capacity

# A hello whose sender is to prove that it knows the secret, and what it was asked.
ctypedef struct ldd_greeting:
    ldd_hello hello
    ldd_welcome asked

ctypedef struct ldd_conn:
    ldd_conn* next
    ldd_conn** at                               # where the list points here
    int fd
    ldd_conn_kind kind
    ldd_link* link                              # one reference, once there is a link
    ldd_greeting* greeting                      # while it proves
    int64_t deadline_ns                         # of the handshake; 0 once the link is whole
    ldd_bytes inbox
    ldd_bytes outbox
    bint closing                                # once the outbox is empty
    bint waits                                  # for a data server, with its hello in the inbox; see serve.pyx
    bint wants_write

# Both ends called link() for this communicator; filled in when the peer of higher rank has come.
ctypedef struct ldd_pending:
    uint8_t comm[32]
    uint64_t cluster_id
    int64_t comm_id
    bint accepted

cdef enum ldd_command_kind:
    COMMAND_SERVE
    COMMAND_LISTEN
    COMMAND_UNLISTEN
    COMMAND_STOP

ctypedef struct ldd_command:
    ldd_command* next
    ldd_command_kind kind
    int fd
    ldd_link* link
    bint done

ctypedef struct ldd_service:
    ldd_node* node
    pthread_t thread
    bint running
    int epoll_fd
    int wake_fd
    ldd_conn* conns                             # changed under `conns_lock`, by this thread alone
    ldd_mutex conns_lock
    ldd_service* next_watched                   # see fork.pyx
    uint32_t num_handshakes                     # connections with a deadline
    uint32_t max_links                          # accepted ones, by the limit of open files
    int spare_fd                                # given up for a moment to refuse a connection when files have run out
    ldd_link* ending                            # links whose leases are not all ended yet
    uint64_t num_used_tokens
    uint8_t[MAX_USED_TOKENS][16] used_tokens
    ldd_mutex lock                              # guards what follows, up to the counters
    bint stopping
    ldd_cond done
    ldd_command* commands
    bint server_ended                           # the thread that makes a server
    ldd_pending* pending
    uint32_t num_pending
    uint32_t pending_capacity
    # counters, relaxed
    uint64_t num_requests
    uint64_t num_rejected_frames
    uint64_t num_refused                        # hellos, whatever the reason
    # the service thread alone, and the last three the thread that makes a server while there is one
    bint makes_server
    char server_ip[64]
    ldd_status server_status
    ldd_detail server_detail
    # the service thread alone
    int64_t told_refusal_ns                     # when one was last logged
    uint64_t num_untold                         # refused since

# All of this belongs to the service thread.
cdef ldd_status ldd_bytes_append(ldd_bytes* out, const void* data, size_t nbytes) noexcept nogil
cdef void ldd_bytes_consume(ldd_bytes* out, size_t nbytes) noexcept nogil
# Takes over the descriptor; NULL without memory.
cdef ldd_conn* ldd_conn_add(ldd_service* service, int fd, ldd_conn_kind kind) noexcept nogil
# Out of epoll and the list, and freed. The link reference is the caller's.
cdef void ldd_conn_forget(ldd_service* service, ldd_conn* conn, bint close_fd) noexcept nogil
# An earlier event may have ended a connection that a later one names.
cdef bint ldd_conn_is_listed(const ldd_service* service, const ldd_conn* conn) noexcept nogil
# Send what the socket takes; False when the connection is over.
cdef bint ldd_conn_flush(ldd_service* service, ldd_conn* conn) noexcept nogil
# Queue a frame of a fixed and a variable part.
cdef ldd_status ldd_conn_reply(ldd_conn* conn, uint32_t request_id, uint32_t type, const void* fixed,
                               size_t fixed_bytes, const void* rest, size_t rest_bytes) noexcept nogil

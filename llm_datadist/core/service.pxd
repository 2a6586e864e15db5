"""The service thread: answers peers' requests without the interpreter."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from .node cimport ldd_link, ldd_node
from .status cimport ldd_detail, ldd_status
from .sync cimport ldd_cond, ldd_mutex

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass

cdef enum ldd_conn_kind:
    CONN_LISTENER
    CONN_HANDSHAKE
    CONN_SERVING

ctypedef struct ldd_bytes:
    uint8_t* data
    size_t length
    size_t capacity

ctypedef struct ldd_conn:
    ldd_conn* next
    ldd_conn** at                               # where the list points here
    int fd
    ldd_conn_kind kind
    ldd_link* link                              # one reference, once there is a link
    int64_t deadline_ns                         # of the handshake; 0 once the link is whole
    ldd_bytes inbox
    ldd_bytes outbox
    bint closing                                # once the outbox is empty
    bint wants_write

# Both ends called link() for this communicator; filled in when the peer of higher rank has come.
ctypedef struct ldd_wish:
    uint8_t comm[32]
    uint64_t cluster_id
    int64_t comm_id
    bint met

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
    ldd_conn* conns
    uint32_t num_handshakes                     # connections with a deadline
    ldd_mutex lock                              # guards what follows
    ldd_cond done
    ldd_command* commands
    ldd_wish* wishes
    uint32_t num_wishes
    uint32_t wish_capacity
    # counters, relaxed
    uint64_t num_requests
    uint64_t num_rejected_frames

cdef ldd_status ldd_service_start(ldd_service* service, ldd_node* node, ldd_detail* detail) noexcept nogil
# Closes every connection, which ends all leases.
cdef void ldd_service_stop(ldd_service* service) noexcept nogil
# The following return when the service thread has acted.
cdef void ldd_service_serve(ldd_service* service, int fd, ldd_link* link) noexcept nogil
cdef void ldd_service_listen(ldd_service* service, int fd) noexcept nogil
cdef void ldd_service_unlisten(ldd_service* service, int fd) noexcept nogil

cdef ldd_status ldd_service_wish(ldd_service* service, const uint8_t* comm, uint64_t cluster_id,
                                 int64_t comm_id) noexcept nogil
# True when the peer of this wish has come.
cdef bint ldd_service_met(ldd_service* service, int64_t comm_id, uint64_t cluster_id) noexcept nogil
cdef void ldd_service_forget(ldd_service* service, int64_t comm_id) noexcept nogil

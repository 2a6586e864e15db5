"""Stream sockets with absolute deadlines, for threads that hold no GIL."""
from libc.stdint cimport int64_t
from llm_datadist.core.base.status cimport ldd_detail, ldd_status

# An address is a numeric IPv4/IPv6 text, or "@name" for a socket in the abstract Unix name space.
cdef ldd_status ldd_socket_connect(const char* ip, int port, int64_t deadline_ns, int* fd,
                                   ldd_detail* detail) noexcept nogil
cdef ldd_status ldd_socket_listen(const char* ip, int port, int backlog, int* fd, int* bound_port,
                           ldd_detail* detail) noexcept nogil
cdef ldd_status ldd_socket_send(int fd, const void* data, size_t nbytes, int64_t deadline_ns,
                         ldd_detail* detail) noexcept nogil
cdef ldd_status ldd_socket_recv(int fd, void* data, size_t nbytes, int64_t deadline_ns,
                                ldd_detail* detail) noexcept nogil
# Receive exactly nbytes, and the descriptors that come with them (-1 where there is none).
cdef ldd_status ldd_socket_recv_files(int fd, void* data, size_t nbytes, int* files, int num_files,
                               int64_t deadline_ns) noexcept nogil
# Send all at once with descriptors; for the first bytes of a connection, which always fit.
cdef bint ldd_socket_send_files(int fd, const void* data, size_t nbytes, const int* files, int num_files) noexcept nogil
# Whether the other end is a process of this user, or of root, on this host.
cdef bint ldd_socket_is_own_user(int fd) noexcept nogil
cdef enum:
    SIGNAL_SLICE_MS = 50                        # how long a wait may go without looking for signals
# Connections made from now on end when the other side is silent for so long.
cdef void ldd_socket_set_silence(int silence_ms) noexcept nogil
cdef void ldd_socket_tune(int fd) noexcept nogil
cdef void ldd_socket_local_ip(int fd, char* text, size_t size) noexcept nogil
cdef void ldd_socket_peer_ip(int fd, char* text, size_t size) noexcept nogil
cdef void ldd_socket_shutdown(int fd) noexcept nogil
# A port that is free at this moment; 0 when there is none, for the reason in `detail`.
cdef int ldd_socket_free_port(const char* ip, ldd_detail* detail) noexcept nogil

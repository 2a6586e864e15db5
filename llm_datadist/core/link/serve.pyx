"""Data servers for peers that come in by a new local address, made while the service thread answers others.

CANN creates servers without a time limit. So a thread makes the server, one at a time, and the connection whose hello
asks for it waits: the hello stays in its inbox, unanswered, and is looked at again when the thread has ended. Why there
is no server is told to those who waited for it; who comes later has it tried again.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport strcmp

from llm_datadist.core.base.provider cimport LDD_CAP_CANCEL
from llm_datadist.core.base.status cimport LDD_E_FAILED, LDD_E_PROCESSING_LINK, LDD_OK, ldd_fail, start_detail
from llm_datadist.core.base.sync cimport ldd_lock, ldd_now_ns, ldd_unlock
from llm_datadist.core.base.thread cimport ldd_spawn
from llm_datadist.core.link.links cimport ldd_node, ldd_node_begin, ldd_node_end
from llm_datadist.core.link.region cimport ldd_regions_find_server, ldd_regions_serve

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* data, size_t nbytes)

cdef enum:
    SLOW_SERVER_NS = 120000000000               # what a peer may wait, if it has the patience


cdef void* _serve_main(void* argument) noexcept nogil:
    cdef ldd_service* service = <ldd_service*>argument
    cdef ldd_node* node = service.node
    cdef uint32_t ignored
    cdef uint64_t one = 1
    service.server_status = ldd_regions_serve(&node.regions, service.server_ip, &ignored, &service.server_detail)
    ldd_lock(&service.lock)
    service.server_ended = True
    if not service.stopping:                    # otherwise nobody waits, and the descriptor may be closed
        write(service.wake_fd, &one, sizeof(one))
    ldd_unlock(&service.lock)
    ldd_node_end(node)
    return NULL


cdef ldd_status _start(ldd_service* service, const char* ip, ldd_detail* detail) noexcept nogil:
    snprintf(service.server_ip, sizeof(service.server_ip), b"%s", ip)
    start_detail(&service.server_detail)
    if not ldd_node_begin(service.node):
        return ldd_fail(detail, LDD_E_FAILED, b"the engine is being finalized")
    service.makes_server = True
    if ldd_spawn(_serve_main, service) != 0:
        service.makes_server = False
        ldd_node_end(service.node)
        return ldd_fail(detail, LDD_E_FAILED, b"no thread to make a data server at %s", ip)
    return LDD_OK


cdef ldd_status ldd_serve(ldd_service* service, ldd_conn* conn, const char* ip, uint32_t* port,
                          ldd_detail* detail) noexcept nogil:
    cdef ldd_status status
    if ldd_regions_find_server(&service.node.regions, ip, port):
        return LDD_OK
    if service.node.provider.caps & LDD_CAP_CANCEL:
        return ldd_regions_serve(&service.node.regions, ip, port, detail)
    if not service.makes_server:
        if service.server_status < 0 and strcmp(service.server_ip, ip) == 0:
            detail[0] = service.server_detail
            return service.server_status
        status = _start(service, ip, detail)
        if status < 0:
            return status
    conn.waits = True
    conn.deadline_ns = ldd_now_ns() + <int64_t>SLOW_SERVER_NS
    return LDD_E_PROCESSING_LINK


cdef bint ldd_serve_ended(ldd_service* service) noexcept nogil:
    cdef bint ended
    ldd_lock(&service.lock)
    ended = service.server_ended
    service.server_ended = False
    ldd_unlock(&service.lock)
    if ended:
        service.makes_server = False
    return ended

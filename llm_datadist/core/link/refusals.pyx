"""Log lines about peers that were refused.

The service thread has no interpreter and must not wait for one. It leaves the text with the interpreter, whose main
thread logs it when it next runs Python.
"""
from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc

from llm_datadist.core.base.sockets cimport ldd_socket_peer_ip
from llm_datadist.core.base.sync cimport ldd_now_ns

import logging

cdef extern from "Python.h" nogil:
    int Py_AddPendingCall(int (*function)(void*) noexcept, void* argument)

cdef enum:
    LINE_BYTES = 640

cdef int64_t QUIET_NS = 10000000000


cdef int _log(void* line) noexcept with gil:
    try:
        logging.getLogger("LLM_DATADIST").error("%s", (<char*>line).decode("utf-8", "replace"))
    except Exception:                           # a handler's failure is not the business of whoever runs just now
        pass
    free(line)
    return 0


cdef void ldd_tell_refusal(ldd_service* service, int fd, const ldd_detail* detail) noexcept nogil:
    cdef char peer_ip[64]
    cdef char* line
    cdef int64_t now = ldd_now_ns()
    if service.told_refusal_ns and now - service.told_refusal_ns < QUIET_NS:
        service.num_untold += 1
        return
    line = <char*>malloc(LINE_BYTES)
    if line == NULL:
        return
    ldd_socket_peer_ip(fd, peer_ip, sizeof(peer_ip))
    snprintf(line, LINE_BYTES, b"cluster %llu refused a peer at %s: %s (%llu more since the last such line)",
             <unsigned long long>service.node.cluster_id, peer_ip, detail.text,
             <unsigned long long>service.num_untold)
    if Py_AddPendingCall(_log, line) == 0:
        service.told_refusal_ns = now
        service.num_untold = 0
    else:
        free(line)                              # its queue is full
        service.num_untold += 1

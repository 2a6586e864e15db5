"""Close inherited sockets in a forked child, so that it keeps no connection of its parent open.

A peer takes the end of a connection as the proof that we touch its memory no longer. A child that lives on with copies
of the descriptors would put that off: when this process is killed, the peer would keep what we had leased until the
child ends too. So a child closes them at once, whoever forked it. Connections come and go, and links change, under
locks that the forking thread holds meanwhile, so that the child finds both lists whole.
"""
from llm_datadist.core.base.sync cimport ldd_lock, ldd_mutex, ldd_mutex_init, ldd_unlock
from llm_datadist.core.link.links cimport ldd_link
from llm_datadist.core.link.service_conn cimport ldd_conn, ldd_service

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*before)() noexcept nogil, void (*in_parent)() noexcept nogil,
                       void (*in_child)() noexcept nogil)
cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef ldd_mutex _lock                                # guards the list
cdef ldd_service* _watched = NULL


cdef void _before_fork() noexcept nogil:
    cdef ldd_service* service
    ldd_lock(&_lock)
    service = _watched
    while service != NULL:
        ldd_lock(&service.conns_lock)
        ldd_lock(&service.node.lock)
        service = service.next_watched


cdef void _unlock_all() noexcept nogil:
    cdef ldd_service* service = _watched
    while service != NULL:
        ldd_unlock(&service.node.lock)
        ldd_unlock(&service.conns_lock)
        service = service.next_watched
    ldd_unlock(&_lock)


cdef void _in_child() noexcept nogil:
    cdef ldd_service* service = _watched
    cdef ldd_conn* conn
    cdef ldd_link* link
    while service != NULL:
        conn = service.conns
        while conn != NULL:
            close(conn.fd)
            conn = conn.next
        link = service.node.links
        while link != NULL:
            if link.ask_fd >= 0:
                close(link.ask_fd)
            link = link.next
        close(service.epoll_fd)
        close(service.wake_fd)
        service = service.next_watched
    _unlock_all()


cdef void ldd_fork_watch(ldd_service* service) noexcept nogil:
    global _watched
    ldd_lock(&_lock)
    service.next_watched = _watched
    _watched = service
    ldd_unlock(&_lock)


cdef void ldd_fork_forget(ldd_service* service) noexcept nogil:
    cdef ldd_service** at = &_watched
    ldd_lock(&_lock)
    while at[0] != NULL and at[0] != service:
        at = &at[0].next_watched
    if at[0] != NULL:
        at[0] = service.next_watched
    ldd_unlock(&_lock)


ldd_mutex_init(&_lock)
pthread_atfork(_before_fork, _unlock_all, _in_child)

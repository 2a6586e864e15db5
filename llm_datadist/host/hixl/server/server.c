/* Life cycle of a server: creation, registration, listening, dropping a client, destruction. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "hixl/server/fetch.h"
#include "hixl/server/service.h"
#include "acl/memory.h"
#include "llm_datadist/ldd_ext.h"

enum { MAX_CONNS = 16384 };

static void close_listeners(hixl_server *server) {
    hixl_close_fd(&server->tcp_fd);
    hixl_close_fd(&server->local_fd);
    hixl_close_fd(&server->epoll_fd);
    hixl_close_fd(&server->wake_fd);
}

/* Around fork(): connections come and go under the lock only, so a child finds their lists whole. */
static void before_fork(void *object) {
    hixl_server *server = object;
    pthread_mutex_lock(&server->lock);
}

static void after_fork_in_parent(void *object) {
    hixl_server *server = object;
    pthread_mutex_unlock(&server->lock);
}

static void after_fork_in_child(void *object) {
    hixl_server *server = object;
    hixl_conn *conn;
    close_listeners(server);
    TAILQ_FOREACH(conn, &server->pending, entry) {
        close(conn->fd);
    }
    TAILQ_FOREACH(conn, &server->conns, entry) {
        close(conn->fd);
    }
    hixl_regions_after_fork(&server->regions);
}

static const hixl_fork_ops fork_ops = {before_fork, after_fork_in_parent, after_fork_in_child};

LDD_EXPORT HixlStatus HixlCSServerCreate(const HixlServerDesc *desc, const HixlServerConfig *config,
                                         HixlServerHandle *out_server) {
    hixl_error *error = hixl_thread_error();
    pthread_condattr_t attributes;
    hixl_server *server;
    HixlStatus status;

    if (desc == NULL || config == NULL || out_server == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "%s is NULL",
                         desc == NULL     ? "desc"
                         : config == NULL ? "config"
                                          : "out_server");
    }
    if (desc->server_port > 65535) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "server_port %u is not in 0..65535", desc->server_port);
    }
    if (desc->endpoint_list_num > 0 && desc->endpoint_list == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "endpoint_list is NULL, endpoint_list_num %u",
                         desc->endpoint_list_num);
    }
    server = calloc(1, sizeof *server);
    if (server == NULL) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a server");
    }
    server->tcp_fd = server->local_fd = server->epoll_fd = server->wake_fd = -1;
    if (desc->server_port != 0) {
        status = hixl_parse_address(desc->server_ip, desc->server_port, &server->address, error);
        if (status != HIXL_SUCCESS) {
            free(server);
            return status;
        }
    }
    status = hixl_regions_init(&server->regions, error);
    if (status == HIXL_SUCCESS && !hixl_random_bytes(server->nonce, sizeof server->nonce)) {
        hixl_regions_destroy(&server->regions);
        status = hixl_fail(error, HIXL_FAILED, "getrandom: %s", strerror(errno));
    }
    if (status == HIXL_SUCCESS && (*out_server = hixl_handle_publish(HIXL_SERVER_HANDLE, server)) == NULL) {
        hixl_regions_destroy(&server->regions);
        status = hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "too many servers and clients are open");
    }
    if (status != HIXL_SUCCESS) {
        free(server);
        return status;
    }
    hixl_boot_id(server->boot_id);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->unserved, NULL);
    pthread_mutex_init(&server->fetch_lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&server->fetch_changed, &attributes);
    pthread_condattr_destroy(&attributes);
    TAILQ_INIT(&server->fetches);
    TAILQ_INIT(&server->pending);
    TAILQ_INIT(&server->conns);
    TAILQ_INIT(&server->finished);
    TAILQ_INIT(&server->closed);
    TAILQ_INIT(&server->sessions);
    server->pid = getpid();
    hixl_fork_watch(&server->fork_node, &fork_ops, server);
    return HIXL_SUCCESS;
}

LDD_EXPORT HixlStatus LddServerRestrict(HixlServerHandle handle) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    if (server == NULL) {
        return error->status;
    }
    if (server->listening) {
        return hixl_fail(error, HIXL_FAILED, "the server listens already");
    }
    server->admissions.restricted = true;
    return HIXL_SUCCESS;
}

static HixlStatus check_token(const uint8_t *token, hixl_error *error) {
    static const uint8_t none[16];
    return token != NULL && memcmp(token, none, sizeof none) != 0
               ? HIXL_SUCCESS
               : hixl_fail(error, HIXL_PARAM_INVALID, "token is %s: it names no client",
                           token == NULL ? "NULL" : "zero");
}

LDD_EXPORT HixlStatus LddServerAdmitPeer(HixlServerHandle handle, const uint8_t token[16], uint32_t rights) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    HixlStatus status;
    if (server == NULL) {
        return error->status;
    }
    status = check_token(token, error);
    if (status == HIXL_SUCCESS && rights != LDD_RIGHT_READ && rights != (LDD_RIGHT_READ | LDD_RIGHT_WRITE)) {
        status =
            hixl_fail(error, HIXL_PARAM_INVALID, "rights are %#x; 1 (read) or 3 (read and write) expected", rights);
    }
    if (status == HIXL_SUCCESS) {
        pthread_mutex_lock(&server->lock);
        if (!hixl_admission_add(&server->admissions, token, rights)) {
            status = hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory to admit another client");
        }
        pthread_mutex_unlock(&server->lock);
    }
    return status;
}

LDD_EXPORT HixlStatus HixlCSServerRegMem(HixlServerHandle handle, const char *tag, const CommMem *mem,
                                         MemHandle *out_handle) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    if (server == NULL) {
        return error->status;
    }
    if (mem == NULL || out_handle == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "%s is NULL", mem == NULL ? "mem" : "out_handle");
    }
    return hixl_regions_add(&server->regions, tag, mem, out_handle, error);
}

LDD_EXPORT HixlStatus HixlCSServerUnregMem(HixlServerHandle handle, MemHandle mem_handle) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    return server == NULL ? error->status : hixl_regions_remove(&server->regions, mem_handle, error);
}

static HixlStatus watch(hixl_server *server, int fd, void *tag, hixl_error *error) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = tag};
    if (epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        return hixl_fail(error, HIXL_FAILED, "epoll_ctl: %s", strerror(errno));
    }
    return HIXL_SUCCESS;
}

/* An address nobody can guess: whoever knows it has been told by this server. */
static HixlStatus open_local(hixl_server *server, int backlog, hixl_error *error) {
    uint8_t random[16];
    size_t i, used;
    if (!hixl_random_bytes(random, sizeof random)) {
        return hixl_fail(error, HIXL_FAILED, "getrandom: %s", strerror(errno));
    }
    used = (size_t)snprintf(server->local_name, sizeof server->local_name, "llm_datadist-");
    for (i = 0; i < sizeof random; i++) {
        used += (size_t)snprintf(server->local_name + used, sizeof server->local_name - used, "%02x", random[i]);
    }
    return hixl_listen_local(server->local_name, backlog, &server->local_fd, error);
}

static HixlStatus start_service(hixl_server *server, hixl_error *error) {
    sigset_t all, saved;
    int code;
    sigfillset(&all); /* signals belong to the application's threads */
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    code = pthread_create(&server->service, NULL, hixl_service_main, server);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    return code == 0 ? HIXL_SUCCESS
                     : hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "start the service thread: %s", strerror(code));
}

/* A part of the descriptors that the process may open: its links, its own clients and the application need some. */
static size_t allowed_conns(void) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur / 2 > MAX_CONNS) {
        return MAX_CONNS;
    }
    return (size_t)files.rlim_cur / 2;
}

LDD_EXPORT HixlStatus HixlCSServerListen(HixlServerHandle handle, uint32_t backlog) {
    hixl_error *error = hixl_thread_error();
    int queue = backlog == 0 ? SOMAXCONN : backlog > 65535 ? 65535 : (int)backlog;
    hixl_server *server = hixl_checked_server(handle, error);
    HixlStatus status = HIXL_SUCCESS;
    if (server == NULL) {
        return error->status;
    }
    if (server->listening) {
        return hixl_fail(error, HIXL_FAILED, "the server listens already");
    }
    if (server->address.size == 0) { /* port 0 */
        return HIXL_SUCCESS;
    }
    server->max_conns = allowed_conns();
    server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    server->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (server->epoll_fd < 0 || server->wake_fd < 0) {
        status = hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "epoll or eventfd: %s", strerror(errno));
    }
    if (status == HIXL_SUCCESS) {
        status = hixl_listen_tcp(&server->address, queue, &server->tcp_fd, error);
    }
    if (status == HIXL_SUCCESS) {
        status = open_local(server, queue, error);
    }
    if (status == HIXL_SUCCESS) {
        status = watch(server, server->tcp_fd, &server->tcp_fd, error);
    }
    if (status == HIXL_SUCCESS) {
        status = watch(server, server->local_fd, &server->local_fd, error);
    }
    if (status == HIXL_SUCCESS) {
        status = watch(server, server->wake_fd, &server->wake_fd, error);
    }
    if (status == HIXL_SUCCESS) {
        status = start_service(server, error);
    }
    if (status != HIXL_SUCCESS) {
        close_listeners(server);
        return status;
    }
    server->listening = true;
    return HIXL_SUCCESS;
}

/* Locked. A connection with this token whose thread may be moving bytes. */
static bool is_served(hixl_server *server, const uint8_t token[16]) {
    hixl_conn *conn;
    TAILQ_FOREACH(conn, &server->conns, entry) {
        if (conn->state == HIXL_CONN_SERVED && memcmp(conn->session->token, token, 16) == 0) {
            return true;
        }
    }
    return false;
}

LDD_EXPORT HixlStatus LddServerDropPeer(HixlServerHandle handle, const uint8_t token[16]) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    hixl_conn *conn;
    if (server == NULL || check_token(token, error) != HIXL_SUCCESS) {
        return error->status;
    }
    pthread_mutex_lock(&server->lock);
    hixl_admission_remove(&server->admissions, token);
    TAILQ_FOREACH(conn, &server->conns, entry) {
        if (memcmp(conn->session->token, token, 16) == 0) {
            conn->session->dropped = true; /* admits no further connection of this client */
            atomic_store(&conn->dropped, true);
            shutdown(conn->fd, SHUT_RDWR); /* wakes its thread; the service thread sees it and closes */
        }
    }
    hixl_fetch_wake(server);
    while (is_served(server, token)) {
        pthread_cond_wait(&server->unserved, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
    return HIXL_SUCCESS;
}

LDD_EXPORT HixlStatus HixlCSServerDestroy(HixlServerHandle handle) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    if (server == NULL) {
        return error->status;
    }
    if (server->listening) {
        atomic_store(&server->stopping, true);
        hixl_fetch_wake(server);
        hixl_wake_service(server);
        pthread_join(server->service, NULL); /* it ends with all connections closed, their threads joined */
        close_listeners(server);
    }
    hixl_handle_withdraw(handle);
    hixl_fork_forget(&server->fork_node);
    hixl_regions_destroy(&server->regions);
    free(server->admissions.items);
    pthread_cond_destroy(&server->fetch_changed);
    pthread_mutex_destroy(&server->fetch_lock);
    pthread_cond_destroy(&server->unserved);
    pthread_mutex_destroy(&server->lock);
    free(server);
    return HIXL_SUCCESS;
}

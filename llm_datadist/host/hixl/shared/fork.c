/* What servers and clients do around a fork of the process. */
#define _GNU_SOURCE
#include "hixl/shared/fork.h"

#include <pthread.h>
#include <stddef.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static TAILQ_HEAD(, hixl_fork_node) nodes = TAILQ_HEAD_INITIALIZER(nodes);
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void before_fork(void) {
    hixl_fork_node *node;
    pthread_mutex_lock(&lock);
    TAILQ_FOREACH(node, &nodes, entry) {
        if (node->ops->before != NULL) {
            node->ops->before(node->object);
        }
    }
}

static void after_fork_in_parent(void) {
    hixl_fork_node *node;
    TAILQ_FOREACH(node, &nodes, entry) {
        if (node->ops->parent != NULL) {
            node->ops->parent(node->object);
        }
    }
    pthread_mutex_unlock(&lock);
}

static void after_fork_in_child(void) {
    hixl_fork_node *node;
    TAILQ_FOREACH(node, &nodes, entry) {
        node->ops->child(node->object);
    }
    TAILQ_INIT(&nodes);
    pthread_mutex_init(&lock, NULL);
}

static void install(void) {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

void hixl_fork_watch(hixl_fork_node *node, const hixl_fork_ops *ops, void *object) {
    node->ops = ops;
    node->object = object;
    pthread_once(&once, install);
    pthread_mutex_lock(&lock);
    TAILQ_INSERT_TAIL(&nodes, node, entry);
    pthread_mutex_unlock(&lock);
}

void hixl_fork_forget(hixl_fork_node *node) {
    pthread_mutex_lock(&lock);
    TAILQ_REMOVE(&nodes, node, entry);
    pthread_mutex_unlock(&lock);
}

void hixl_close_fd(int *fd) {
    int closing = *fd;
    if (closing >= 0) {
        *fd = -1;
        close(closing);
    }
}

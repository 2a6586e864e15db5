/*
 * What a forked child does with its parent's servers and clients: close its copies of their descriptors.
 *
 * A child that kept them would keep the parent's port bound and its connections open after the parent's death.
 * Nothing else is touched there: the handles answer every call with an error, since they remember their process.
 */
#ifndef LLM_DATADIST_HIXL_FORK_H
#define LLM_DATADIST_HIXL_FORK_H

#include <sys/queue.h>

typedef struct {
    void (*before)(void *object);   /* lock what must be whole in the child; may be NULL, as may be the next */
    void (*parent)(void *object);   /* unlock */
    void (*child)(void *object);    /* close descriptors; take no lock */
} hixl_fork_ops;

typedef struct hixl_fork_node {
    TAILQ_ENTRY(hixl_fork_node) entry;
    const hixl_fork_ops *ops;
    void *object;
} hixl_fork_node;

void hixl_fork_watch(hixl_fork_node *node, const hixl_fork_ops *ops, void *object);
void hixl_fork_forget(hixl_fork_node *node);

/* Close a descriptor whose variable the child may read at any time: never name one that is closed already. */
void hixl_close_fd(int *fd);

#endif

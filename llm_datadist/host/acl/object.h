/*
 * Handles of contexts, streams and events.
 *
 * A handle is a slot number with a generation, never a pointer: one that was destroyed, or never was, is told
 * apart and answered with an error where dereferencing it would crash. Objects are reference counted; whoever
 * acquires one may use it after its handle is gone.
 */
#ifndef LLM_DATADIST_HOST_OBJECT_H
#define LLM_DATADIST_HOST_OBJECT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    LDD_HOST_CONTEXT = 1,
    LDD_HOST_STREAM = 2,
    LDD_HOST_EVENT = 3
} ldd_host_kind;

typedef struct ldd_host_object {
    ldd_host_kind kind;
    atomic_uint refs;
    void (*destroy)(struct ldd_host_object *object); /* frees it; called without locks when the last reference goes */
    void *handle;
} ldd_host_object;

/* Give an object with one reference its handle; the table takes that reference over. False without memory. */
bool ldd_host_publish(ldd_host_object *object);

/* The object behind a handle with a reference for the caller, or NULL. */
ldd_host_object *ldd_host_acquire(void *handle, ldd_host_kind kind);

/* End a handle. The caller gets the table's reference; NULL when the handle had ended or is of another kind. */
ldd_host_object *ldd_host_withdraw(void *handle, ldd_host_kind kind);

void ldd_host_release(ldd_host_object *object);

/*
 * References to all objects of a kind that `wanted` accepts, in an array for the caller to free after releasing
 * each. `wanted` runs under the table's lock. False without memory.
 */
bool ldd_host_collect(ldd_host_kind kind, bool (*wanted)(const ldd_host_object *, const void *), const void *argument,
                      ldd_host_object ***objects, size_t *count);

/* Grows with every withdrawal: as long as it stands still, a handle seen alive is alive. */
uint64_t ldd_host_withdrawals(void);

/* Around fork(): hold the table still, go on with it in the parent, start with an empty one in the child. */
void ldd_host_objects_before_fork(void);
void ldd_host_objects_after_fork(bool child);

#endif

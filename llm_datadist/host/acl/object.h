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

typedef enum { ACL_HOST_CONTEXT = 1, ACL_HOST_STREAM = 2, ACL_HOST_EVENT = 3 } acl_kind;

typedef struct acl_object {
    acl_kind kind;
    atomic_uint refs;
    void (*destroy)(struct acl_object *object); /* frees it; called without locks when the last reference goes */
    void *handle;
} acl_object;

/* Give an object with one reference its handle; the table takes that reference over. False without memory. */
bool acl_publish(acl_object *object);

/* The object behind a handle with a reference for the caller, or NULL. */
acl_object *acl_acquire(void *handle, acl_kind kind);

/* End a handle. The caller gets the table's reference; NULL when the handle had ended or is of another kind. */
acl_object *acl_withdraw(void *handle, acl_kind kind);

void acl_release(acl_object *object);

/*
 * References to all objects of a kind that `wanted` accepts, in an array for the caller to free after releasing
 * each. `wanted` runs under the table's lock. False without memory.
 */
bool acl_collect(acl_kind kind, bool (*wanted)(const acl_object *, const void *), const void *argument,
                 acl_object ***objects, size_t *count);

/* Grows with every withdrawal: as long as it stands still, a handle seen alive is alive. */
uint64_t acl_withdrawals(void);

/* Around fork(): hold the table still, go on with it in the parent, start with an empty one in the child. */
void acl_objects_before_fork(void);
void acl_objects_after_fork(bool child);

#endif

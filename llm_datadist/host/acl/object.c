/*
 * The one table of handles. Its lock is a leaf: nothing else is locked under it.
 */
#include <pthread.h>
#include <stdlib.h>

#include "acl/object.h"

typedef struct {
    acl_object *object; /* NULL: free */
    uint32_t generation;
    uint32_t next_free; /* slot number + 1 */
} handle_slot;

enum { SLOT_BITS = 24 };

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static handle_slot *slots;
static uint32_t num_slots, first_free;
static atomic_uint_least64_t withdrawals;

static void *handle_of(uint32_t slot) {
    return (void *)(uintptr_t)((uint64_t)slots[slot].generation << SLOT_BITS | (slot + 1u));
}

/* The slot a live handle of this kind names, or NULL. Table locked. */
static handle_slot *find_slot(void *handle, acl_kind kind) {
    uint64_t value = (uintptr_t)handle;
    uint64_t number = value & ((1u << SLOT_BITS) - 1u);
    handle_slot *slot;
    if (number == 0 || number > num_slots) {
        return NULL;
    }
    slot = &slots[number - 1];
    return slot->object != NULL && slot->object->kind == kind && slot->object->handle == handle ? slot : NULL;
}

static bool grow_table(void) {
    uint32_t wanted = num_slots == 0 ? 64 : num_slots * 2, i;
    handle_slot *grown;
    if (wanted >= 1u << SLOT_BITS) {
        return false;
    }
    grown = realloc(slots, wanted * sizeof *slots);
    if (grown == NULL) {
        return false;
    }
    slots = grown;
    for (i = num_slots; i < wanted; i++) {
        slots[i].object = NULL;
        slots[i].generation = 1;
        slots[i].next_free = i + 1 < wanted ? i + 2 : 0;
    }
    first_free = num_slots + 1;
    num_slots = wanted;
    return true;
}

bool acl_publish(acl_object *object) {
    bool published = false;
    pthread_mutex_lock(&table_lock);
    if (first_free != 0 || grow_table()) {
        uint32_t slot = first_free - 1;
        first_free = slots[slot].next_free;
        slots[slot].object = object;
        object->handle = handle_of(slot);
        published = true;
    }
    pthread_mutex_unlock(&table_lock);
    return published;
}

acl_object *acl_acquire(void *handle, acl_kind kind) {
    acl_object *object = NULL;
    handle_slot *slot;
    pthread_mutex_lock(&table_lock);
    slot = find_slot(handle, kind);
    if (slot != NULL) {
        object = slot->object;
        atomic_fetch_add_explicit(&object->refs, 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&table_lock);
    return object;
}

acl_object *acl_withdraw(void *handle, acl_kind kind) {
    acl_object *object = NULL;
    handle_slot *slot;
    pthread_mutex_lock(&table_lock);
    slot = find_slot(handle, kind);
    if (slot != NULL) {
        object = slot->object;
        slot->object = NULL;
        slot->generation++;
        slot->next_free = first_free;
        first_free = (uint32_t)(slot - slots) + 1;
        atomic_fetch_add_explicit(&withdrawals, 1, memory_order_release);
    }
    pthread_mutex_unlock(&table_lock);
    return object;
}

void acl_release(acl_object *object) {
    /* acq_rel: what other holders wrote before they let go is seen by the one who frees */
    if (atomic_fetch_sub_explicit(&object->refs, 1, memory_order_acq_rel) == 1) {
        object->destroy(object);
    }
}

bool acl_collect(acl_kind kind, bool (*wanted)(const acl_object *, const void *), const void *argument,
                 acl_object ***objects, size_t *count) {
    uint32_t i;
    *count = 0;
    pthread_mutex_lock(&table_lock);
    *objects = malloc((num_slots + 1) * sizeof **objects);
    for (i = 0; *objects != NULL && i < num_slots; i++) {
        acl_object *object = slots[i].object;
        if (object != NULL && object->kind == kind && wanted(object, argument)) {
            atomic_fetch_add_explicit(&object->refs, 1, memory_order_relaxed);
            (*objects)[(*count)++] = object;
        }
    }
    pthread_mutex_unlock(&table_lock);
    return *objects != NULL;
}

uint64_t acl_withdrawals(void) {
    return atomic_load_explicit(&withdrawals, memory_order_acquire);
}

void acl_objects_before_fork(void) {
    pthread_mutex_lock(&table_lock);
}

void acl_objects_after_fork(bool child) {
    uint32_t i;
    if (child) {
        /* The threads that served these objects are not in the child: it forgets them, and their handles end. */
        for (i = 0; i < num_slots; i++) {
            if (slots[i].object != NULL) {
                slots[i].object = NULL;
                slots[i].generation++;
                slots[i].next_free = first_free;
                first_free = i + 1;
            }
        }
        atomic_fetch_add_explicit(&withdrawals, 1, memory_order_release);
    }
    pthread_mutex_unlock(&table_lock);
}

/* Handles of servers and clients, as numbers that are checked before anything is followed. */
#include "hixl/shared/handle.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define SLOT_BITS 14
#define NUM_SLOTS ((size_t)1 << SLOT_BITS)
#define VACANT UINT64_C(0)
#define TAKEN UINT64_C(1) /* being filled: no handle looks like that, as generations start at one */

static struct {
    _Atomic uint64_t name;
    void *object;
} slots[NUM_SLOTS];

static _Atomic uint64_t last_generation;

void *hixl_handle_publish(hixl_handle_kind kind, void *object) {
    uint64_t generation = atomic_fetch_add(&last_generation, 1) + 1;
    size_t i;
    for (i = 0; i < NUM_SLOTS; i++) {
        size_t slot = (generation + i) % NUM_SLOTS;
        uint64_t vacant = VACANT;
        if (atomic_compare_exchange_strong(&slots[slot].name, &vacant, TAKEN)) {
            uint64_t name = (generation << SLOT_BITS | slot) << 1 | (uint64_t)kind;
            slots[slot].object = object;
            atomic_store_explicit(&slots[slot].name, name, memory_order_release);
            return (void *)(uintptr_t)name;
        }
    }
    return NULL;
}

void *hixl_handle_object(hixl_handle_kind kind, void *handle) {
    uint64_t name = (uintptr_t)handle;
    size_t slot = (name >> 1) % NUM_SLOTS;
    return name > TAKEN && (name & 1) == (uint64_t)kind &&
                   atomic_load_explicit(&slots[slot].name, memory_order_acquire) == name
               ? slots[slot].object
               : NULL;
}

void hixl_handle_withdraw(void *handle) {
    atomic_store(&slots[((uintptr_t)handle >> 1) % NUM_SLOTS].name, VACANT);
}

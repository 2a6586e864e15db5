/*
 * Atomic accesses by the order they have, for memory that other threads or other processes read and write meanwhile.
 *
 * get and set are relaxed: they are whole, and neither torn nor repeated by the compiler, but order nothing. load
 * acquires and store releases. Which of them stands where, and why that suffices, is in docs/protocol.md.
 */
#ifndef LLM_DATADIST_LDD_ATOMIC_H
#define LLM_DATADIST_LDD_ATOMIC_H

#include <stdint.h>

static inline uint32_t ldd_get32(const uint32_t *at) {
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}
static inline uint64_t ldd_get64(const uint64_t *at) {
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}
static inline void ldd_set32(uint32_t *at, uint32_t value) {
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}
static inline void ldd_set64(uint64_t *at, uint64_t value) {
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}
static inline uint32_t ldd_load32(const uint32_t *at) {
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
static inline uint64_t ldd_load64(const uint64_t *at) {
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
static inline void ldd_store32(uint32_t *at, uint32_t value) {
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
static inline void ldd_store64(uint64_t *at, uint64_t value) {
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
static inline void ldd_add64(uint64_t *at, uint64_t by) {
    __atomic_fetch_add(at, by, __ATOMIC_RELAXED);
}
/* Count a change that was made before, for whoever loads the count next. */
static inline void ldd_ring(uint64_t *bell) {
    __atomic_fetch_add(bell, 1, __ATOMIC_SEQ_CST);
}
/* Store a number that only ever rises, modulo 2**32. */
static inline void ldd_raise(uint32_t *at, uint32_t value) {
    uint32_t before = ldd_get32(at);
    while ((int32_t)(value - before) > 0 &&
           !__atomic_compare_exchange_n(at, &before, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
    }
}
/* Everything before comes before everything after, in one order that all processors agree on. */
static inline void ldd_fence(void) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#endif

/*
 * Memory of the caller that was registered with aclrtHostRegister.
 *
 * A processor needs no registration to reach it; what it buys is that an asynchronous copy may take it for
 * memory that stays where it is until the copy is done.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "acl/context.h"
#include "acl/register.h"

enum { PAGES_PER_PROBE = 4096 };

typedef struct {
    uint64_t addr, size;
} host_range;

static pthread_rwlock_t ranges_lock = PTHREAD_RWLOCK_INITIALIZER; /* guards what follows; a leaf */
static host_range *ranges; /* sorted by address; they never overlap */
static size_t num_ranges, max_ranges;

/* Index of the first range that ends above addr. Ranges locked. */
static size_t ending_above(uint64_t addr) {
    size_t low = 0, high = num_ranges;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (ranges[middle].addr + ranges[middle].size <= addr) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

bool acl_is_registered(uint64_t addr, uint64_t len) {
    size_t index;
    bool result;
    pthread_rwlock_rdlock(&ranges_lock);
    index = ending_above(addr);
    result =
        index < num_ranges && ranges[index].addr <= addr && len <= ranges[index].size - (addr - ranges[index].addr);
    pthread_rwlock_unlock(&ranges_lock);
    return result;
}

void acl_ranges_before_fork(void) {
    pthread_rwlock_wrlock(&ranges_lock);
}

void acl_ranges_after_fork(bool child) {
    if (child) { /* the owner noted in the lock is a thread of the parent */
        pthread_rwlock_init(&ranges_lock, NULL);
    } else {
        pthread_rwlock_unlock(&ranges_lock);
    }
}

/* Whether every page of the range is mapped. */
static bool is_mapped(uint64_t addr, uint64_t size) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t start = addr / page * page, end = (addr + size + page - 1) / page * page;
    unsigned char present[PAGES_PER_PROBE];
    while (start < end) {
        uint64_t step = end - start < PAGES_PER_PROBE * page ? end - start : PAGES_PER_PROBE * page;
        if (mincore((void *)(uintptr_t)start, step, present) != 0) {
            return false;
        }
        start += step;
    }
    return true;
}

static aclError add_range(const char *function, uint64_t addr, uint64_t size) {
    aclError error = ACL_SUCCESS;
    size_t index;
    pthread_rwlock_wrlock(&ranges_lock);
    index = ending_above(addr);
    if (index < num_ranges && ranges[index].addr < addr + size) {
        error = acl_fail(ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
                         "%s: [%#llx, +%llu) overlaps the registered [%#llx, +%llu)", function,
                         (unsigned long long)addr, (unsigned long long)size, (unsigned long long)ranges[index].addr,
                         (unsigned long long)ranges[index].size);
    } else if (num_ranges == max_ranges) {
        size_t wanted = max_ranges == 0 ? 16 : max_ranges * 2;
        host_range *grown = realloc(ranges, wanted * sizeof *grown);
        if (grown == NULL) {
            error = acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no memory for bookkeeping", function);
        } else {
            ranges = grown;
            max_ranges = wanted;
        }
    }
    if (error == ACL_SUCCESS) {
        memmove(&ranges[index + 1], &ranges[index], (num_ranges - index) * sizeof *ranges);
        ranges[index].addr = addr;
        ranges[index].size = size;
        num_ranges++;
    }
    pthread_rwlock_unlock(&ranges_lock);
    return error;
}

LDD_EXPORT aclError aclrtHostRegister(void *ptr, uint64_t size, aclrtHostRegisterType type, void **out_device_ptr) {
    int32_t device;
    aclError error;
    if (ptr == NULL || size == 0 || out_device_ptr == NULL || (uintptr_t)ptr + size < size) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: pointer is %p, size is %llu, result pointer is %p", __func__, ptr,
                        (unsigned long long)size, (void *)out_device_ptr);
    }
    if (type != ACL_HOST_REGISTER_MAPPED) {
        return acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: type %d; ACL_HOST_REGISTER_MAPPED expected", __func__,
                        (int)type);
    }
    error = acl_require_context(__func__, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    if (!is_mapped((uintptr_t)ptr, size)) {
        return acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: [%p, +%llu) is not mapped: %s", __func__, ptr,
                        (unsigned long long)size, strerror(errno));
    }
    error = add_range(__func__, (uintptr_t)ptr, size);
    if (error == ACL_SUCCESS) {
        *out_device_ptr = ptr; /* a device has the addresses of the host */
    }
    return error;
}

LDD_EXPORT aclError aclrtHostUnregister(void *ptr) {
    int32_t device;
    size_t index;
    aclError error = acl_require_context(__func__, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_rwlock_wrlock(&ranges_lock);
    index = ending_above((uintptr_t)ptr);
    if (index < num_ranges && ranges[index].addr == (uintptr_t)ptr) {
        num_ranges--;
        memmove(&ranges[index], &ranges[index + 1], (num_ranges - index) * sizeof *ranges);
    } else {
        error = acl_fail(ACL_ERROR_HOST_MEMORY_NOT_REGISTERED, "%s: %p is not the start of a registered range",
                         __func__, ptr);
    }
    pthread_rwlock_unlock(&ranges_lock);
    return error;
}

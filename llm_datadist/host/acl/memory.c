/*
 * Device and page-locked host memory: sealed memfds, and the registry of them.
 *
 * Both kinds are the memory of this machine. One memfd per allocation lets a peer map the very same pages from
 * a descriptor; the seals let it rely on the size. A range freed while something still works on it stays
 * mapped until that work lets its pin go.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "acl/context.h"
#include "acl/limits.h"
#include "acl/memory.h"
#include "acl/register.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

#define HUGE_PAGE ((uint64_t)2 << 20)

/* MemAvailable is an estimate, and the process needs memory for other things too: 1/32 of it is left alone. */
#define HEADROOM_SHARE 32

struct acl_pin {
    acl_allocation info;
    atomic_uint refs; /* the registry's, and one per pin */
};

static pthread_mutex_t admission_lock = PTHREAD_MUTEX_INITIALIZER; /* one allocation at a time asks what is left */
static pthread_rwlock_t registry_lock = PTHREAD_RWLOCK_INITIALIZER; /* guards what follows; a leaf */
static acl_pin **allocations; /* sorted by base; they never overlap */
static size_t num_allocations, max_allocations;
static uint64_t last_id;

/* ---- registry ---- */

/* Index of the first allocation whose base is above addr. Registry locked. */
static size_t above(uint64_t addr) {
    size_t low = 0, high = num_allocations;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (allocations[middle]->info.base <= addr) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The allocation that addr lies in, or NULL. Registry locked. */
static acl_pin *at(uint64_t addr) {
    size_t index = above(addr);
    acl_pin *found = index > 0 ? allocations[index - 1] : NULL;
    return found != NULL && addr - found->info.base < found->info.size ? found : NULL;
}

static bool holds(const acl_pin *allocation, uint64_t addr, uint64_t len) {
    return len <= allocation->info.size - (addr - allocation->info.base);
}

int acl_find_allocation(uint64_t addr, uint64_t len, acl_allocation *out) {
    acl_pin *found;
    int result = -1;
    pthread_rwlock_rdlock(&registry_lock);
    found = at(addr);
    if (found != NULL && holds(found, addr, len)) {
        *out = found->info;
        result = 0;
    }
    pthread_rwlock_unlock(&registry_lock);
    return result;
}

acl_pin *acl_pin_range(uint64_t addr, uint64_t len, acl_allocation *out) {
    acl_pin *found;
    pthread_rwlock_rdlock(&registry_lock);
    found = at(addr);
    if (found != NULL && holds(found, addr, len)) {
        atomic_fetch_add_explicit(&found->refs, 1, memory_order_relaxed);
        if (out != NULL) {
            *out = found->info;
        }
    } else {
        found = NULL;
    }
    pthread_rwlock_unlock(&registry_lock);
    return found;
}

void acl_unpin(acl_pin *pin) {
    /* acq_rel: whoever unmaps does so after the last access of every other holder */
    if (pin != NULL && atomic_fetch_sub_explicit(&pin->refs, 1, memory_order_acq_rel) == 1) {
        munmap((void *)(uintptr_t)pin->info.base, pin->info.mapped);
        close(pin->info.fd);
        free(pin);
    }
}

bool acl_overruns(uint64_t addr, uint64_t len) {
    acl_pin *found;
    bool result;
    pthread_rwlock_rdlock(&registry_lock);
    found = at(addr);
    result = found != NULL && !holds(found, addr, len);
    pthread_rwlock_unlock(&registry_lock);
    return result;
}

int acl_dup_allocation_fd(uint64_t id) {
    int fd = -1;
    size_t i;
    errno = ENOENT;
    pthread_rwlock_rdlock(&registry_lock);
    for (i = 0; i < num_allocations; i++) {
        if (allocations[i]->info.id == id) {
            fd = fcntl(allocations[i]->info.fd, F_DUPFD_CLOEXEC, 0);
            break;
        }
    }
    pthread_rwlock_unlock(&registry_lock);
    return fd;
}

static bool register_allocation(acl_pin *allocation) {
    size_t index;
    bool registered = false;
    pthread_rwlock_wrlock(&registry_lock);
    if (num_allocations == max_allocations) {
        size_t wanted = max_allocations == 0 ? 64 : max_allocations * 2;
        acl_pin **grown = realloc(allocations, wanted * sizeof *grown);
        if (grown != NULL) {
            allocations = grown;
            max_allocations = wanted;
        }
    }
    if (num_allocations < max_allocations) {
        allocation->info.id = ++last_id;
        index = above(allocation->info.base);
        memmove(&allocations[index + 1], &allocations[index], (num_allocations - index) * sizeof *allocations);
        allocations[index] = allocation;
        num_allocations++;
        registered = true;
    }
    pthread_rwlock_unlock(&registry_lock);
    return registered;
}

/*
 * Bytes promised by allocations that nobody has written yet: the machine counts them as free, and they are not.
 * The number of blocks of a memfd is what of it exists.
 */
static uint64_t promised_bytes(void) {
    uint64_t promised = 0;
    size_t i;
    pthread_rwlock_rdlock(&registry_lock);
    for (i = 0; i < num_allocations; i++) {
        struct stat status;
        uint64_t present = 0;
        if (fstat(allocations[i]->info.fd, &status) == 0) {
            present = (uint64_t)status.st_blocks * 512u;
        }
        promised += present < allocations[i]->info.mapped ? allocations[i]->info.mapped - present : 0;
    }
    pthread_rwlock_unlock(&registry_lock);
    return promised;
}

/* What may still be allocated, and what there is in all. */
static uint64_t free_bytes(uint64_t *total) {
    uint64_t available, promised = promised_bytes();
    acl_machine_memory(&available, total);
    available -= available / HEADROOM_SHARE;
    return available > promised ? available - promised : 0;
}

void acl_memory_before_fork(void) {
    pthread_mutex_lock(&admission_lock);
    pthread_rwlock_wrlock(&registry_lock);
}

void acl_memory_after_fork(bool child) {
    if (child) { /* the owner noted in the lock is a thread of the parent */
        pthread_rwlock_init(&registry_lock, NULL);
    } else {
        pthread_rwlock_unlock(&registry_lock);
    }
    pthread_mutex_unlock(&admission_lock);
}

/* ---- allocation ---- */

static int create_sealed_memfd(uint64_t size) {
    int fd = memfd_create("llm_datadist", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) { /* kernels before 6.3 */
        fd = memfd_create("llm_datadist", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    }
    if (fd >= 0 && (fchmod(fd, S_IRUSR | S_IWUSR) != 0 || ftruncate(fd, (off_t)size) != 0 ||
                    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)) {
        int reason = errno;
        close(fd);
        errno = reason;
        return -1;
    }
    return fd;
}

/* Map a memfd; at a multiple of the huge page size when it has that size, since only then huge pages fit. */
static void *map_memfd(int fd, uint64_t size) {
    uint8_t *area, *start;
    uint64_t before, after;
    if (size < HUGE_PAGE) {
        return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    area = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        return MAP_FAILED;
    }
    before = (HUGE_PAGE - (uintptr_t)area % HUGE_PAGE) % HUGE_PAGE;
    after = HUGE_PAGE - before;
    start = area + before;
    if (mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        int reason = errno;
        munmap(area, size + HUGE_PAGE);
        errno = reason;
        return MAP_FAILED;
    }
    if (before > 0) {
        munmap(area, before);
    }
    munmap(start + size, after);
    madvise(start, size, MADV_HUGEPAGE); /* advice: small pages do as well */
    return start;
}

static aclError system_failure(const char *function, const char *call, uint64_t size, aclError out_of_memory) {
    const char *hint = errno == EMFILE   ? " (RLIMIT_NOFILE is reached: every allocation holds one descriptor)"
                       : errno == ENOMEM ? " (see RLIMIT_AS and vm.max_map_count)"
                                         : "";
    aclError error = errno == EMFILE || errno == ENFILE ? ACL_ERROR_RT_RESOURCE_ALLOC_FAIL : out_of_memory;
    return acl_fail(error, "%s: %s of %llu bytes: %s%s", function, call, (unsigned long long)size, strerror(errno),
                    hint);
}

/* Build and register an allocation that was admitted. */
static aclError allocate_admitted(const char *function, acl_allocation *wanted, aclError out_of_memory) {
    acl_pin *allocation = malloc(sizeof *allocation);
    void *start;
    if (allocation == NULL) {
        return acl_fail(out_of_memory, "%s: no memory for bookkeeping", function);
    }
    wanted->fd = create_sealed_memfd(wanted->mapped);
    if (wanted->fd < 0) {
        aclError error = system_failure(function, "memfd", wanted->mapped, out_of_memory);
        free(allocation);
        return error;
    }
    start = map_memfd(wanted->fd, wanted->mapped);
    if (start == MAP_FAILED) {
        aclError error = system_failure(function, "mmap", wanted->mapped, out_of_memory);
        close(wanted->fd);
        free(allocation);
        return error;
    }
    wanted->base = (uintptr_t)start;
    allocation->info = *wanted;
    allocation->refs = 1;
    if (!register_allocation(allocation)) {
        acl_unpin(allocation);
        return acl_fail(out_of_memory, "%s: no memory for bookkeeping", function);
    }
    return ACL_SUCCESS;
}

static aclError allocate(const char *function, void **out_ptr, size_t size, CommMemType kind, aclError out_of_memory) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), unit = size >= HUGE_PAGE ? HUGE_PAGE : page;
    acl_allocation wanted = {.size = size, .kind = kind, .fd = -1};
    uint64_t left, total;
    aclError error;
    if (out_ptr == NULL || size == 0) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is %p, size is %zu; neither may be 0", function,
                        (void *)out_ptr, size);
    }
    error = acl_require_context(function, &wanted.device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&admission_lock);
    left = free_bytes(&total);
    if (size > left) { /* before rounding, which could overflow */
        error = acl_fail(out_of_memory, "%s: %zu bytes asked for, %llu of %llu available", function, size,
                         (unsigned long long)left, (unsigned long long)total);
    } else {
        wanted.mapped = (size + unit - 1) / unit * unit;
        error = allocate_admitted(function, &wanted, out_of_memory);
    }
    pthread_mutex_unlock(&admission_lock);
    if (error == ACL_SUCCESS) {
        *out_ptr = (void *)(uintptr_t)wanted.base;
    }
    return error;
}

static aclError free_allocation(const char *function, void *ptr, CommMemType kind) {
    acl_pin *found;
    int32_t device;
    aclError error;
    if (ptr == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: pointer is NULL", function);
    }
    error = acl_require_context(function, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_rwlock_wrlock(&registry_lock);
    found = at((uintptr_t)ptr);
    if (found != NULL && found->info.base == (uintptr_t)ptr && found->info.kind == kind) {
        size_t index = above((uintptr_t)ptr);
        memmove(&allocations[index - 1], &allocations[index], (num_allocations - index) * sizeof *allocations);
        num_allocations--;
    } else {
        found = NULL;
    }
    pthread_rwlock_unlock(&registry_lock);
    if (found == NULL) {
        return acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is not the start of %s memory", function, ptr,
                        kind == COMM_MEM_TYPE_DEVICE ? "device" : "page-locked host");
    }
    acl_unpin(found);
    return ACL_SUCCESS;
}

/* ---- the interface ---- */

/*
 * Policies are advice here: large allocations always ask for 2 MiB pages, and get what the machine has. One GiB
 * pages would have to be reserved beforehand and are refused.
 */
LDD_EXPORT aclError aclrtMalloc(void **out_ptr, size_t size, aclrtMemMallocPolicy policy) {
    const unsigned bandwidths = ACL_MEM_TYPE_LOW_BAND_WIDTH | ACL_MEM_TYPE_HIGH_BAND_WIDTH;
    unsigned pages = (unsigned)policy & ~bandwidths;
    if (pages > ACL_MEM_MALLOC_HUGE1G_ONLY_P2P) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: policy is %#x", __func__, (unsigned)policy);
    }
    if (pages == ACL_MEM_MALLOC_HUGE1G_ONLY || pages == ACL_MEM_MALLOC_HUGE1G_ONLY_P2P) {
        return acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: pages of 1 GiB", __func__);
    }
    return allocate(__func__, out_ptr, size, COMM_MEM_TYPE_DEVICE, ACL_ERROR_RT_DEVICE_OOM);
}

LDD_EXPORT aclError aclrtMallocWithCfg(void **out_ptr, size_t size, aclrtMemMallocPolicy policy,
                                       aclrtMallocConfig *config) {
    if (config != NULL) {
        return acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: a configuration; NULL expected", __func__);
    }
    return aclrtMalloc(out_ptr, size, policy);
}

LDD_EXPORT aclError aclrtFree(void *ptr) {
    return free_allocation(__func__, ptr, COMM_MEM_TYPE_DEVICE);
}

LDD_EXPORT aclError aclrtMallocHost(void **out_ptr, size_t size) {
    return allocate(__func__, out_ptr, size, COMM_MEM_TYPE_HOST, ACL_ERROR_RT_MEMORY_ALLOCATION);
}

LDD_EXPORT aclError aclrtFreeHost(void *ptr) {
    return free_allocation(__func__, ptr, COMM_MEM_TYPE_HOST);
}

/* All devices and both kinds share what the machine has. */
LDD_EXPORT aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *out_free, size_t *out_total) {
    uint64_t left, total;
    int32_t device;
    aclError error;
    if (out_free == NULL || out_total == NULL || (unsigned)attr > ACL_HBM_MEM_NORMAL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: a result pointer is NULL, or attribute %d is unknown", __func__,
                        (int)attr);
    }
    error = acl_require_context(__func__, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    left = free_bytes(&total);
    *out_free = left;
    *out_total = total;
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtPointerGetAttributes(const void *ptr, aclrtPtrAttributes *out_attributes) {
    acl_allocation found;
    if (ptr == NULL || out_attributes == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: pointer is %p, result pointer is %p", __func__, ptr,
                        (void *)out_attributes);
    }
    memset(out_attributes, 0, sizeof *out_attributes);
    out_attributes->pageSize = (uint32_t)sysconf(_SC_PAGESIZE);
    if (acl_find_allocation((uintptr_t)ptr, 0, &found) == 0) {
        bool on_device = found.kind == COMM_MEM_TYPE_DEVICE;
        out_attributes->location.type = on_device ? ACL_MEM_LOCATION_TYPE_DEVICE : ACL_MEM_LOCATION_TYPE_HOST;
        out_attributes->location.id = on_device ? (uint32_t)found.device : 0;
    } else {
        bool registered = acl_is_registered((uintptr_t)ptr, 1);
        out_attributes->location.type = registered ? ACL_MEM_LOCATION_TYPE_HOST : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    }
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtMemGetAddressRange(void *ptr, void **out_base, size_t *out_size) {
    acl_allocation found;
    if (ptr == NULL || (out_base == NULL && out_size == NULL)) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: pointer is %p, and no result is asked for", __func__, ptr);
    }
    if (acl_find_allocation((uintptr_t)ptr, 0, &found) != 0) {
        return acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is in no allocation", __func__, ptr);
    }
    if (out_base != NULL) {
        *out_base = (void *)(uintptr_t)found.base;
    }
    if (out_size != NULL) {
        *out_size = found.size;
    }
    return ACL_SUCCESS;
}

/*
 * Copies and fills.
 *
 * Every range is checked against the allocations before a byte moves: one that starts inside an allocation has to
 * end inside it. Memory of the caller is taken on trust, as on a device. What `kind` says is checked for
 * meaning only; the addresses decide.
 */
#include <stdlib.h>
#include <string.h>

#include "acl/register.h"
#include "acl/stream.h"

static aclError check_range(const char *function, const char *what, const void *ptr, size_t size) {
    if (ptr == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: %s is NULL", function, what);
    }
    if (acl_overruns((uintptr_t)ptr, size)) {
        return acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %s %p with %zu bytes leaves its allocation", function, what,
                        ptr, size);
    }
    return ACL_SUCCESS;
}

static aclError check_copy(const char *function, const void *dst, size_t dst_max, const void *src, size_t count) {
    aclError error;
    if (count > dst_max) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: %zu bytes to copy, %zu at the destination", function, count,
                        dst_max);
    }
    error = check_range(function, "destination", dst, count);
    return error != ACL_SUCCESS ? error : check_range(function, "source", src, count);
}

static aclError check_kind(const char *function, aclrtMemcpyKind kind) {
    if ((unsigned)kind > ACL_MEMCPY_INTER_DEVICE_TO_DEVICE) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: kind is %d", function, (int)kind);
    }
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtMemset(void *ptr, size_t max_count, int32_t value, size_t count) {
    int32_t device;
    aclError error = acl_require_context(__func__, &device);
    if (error == ACL_SUCCESS && count > max_count) {
        error = acl_fail(ACL_ERROR_INVALID_PARAM, "%s: %zu bytes to fill, %zu there", __func__, count, max_count);
    }
    if (error == ACL_SUCCESS) {
        error = check_range(__func__, "pointer", ptr, count);
    }
    if (error == ACL_SUCCESS) {
        memset(ptr, value, count);
    }
    return error;
}

LDD_EXPORT aclError aclrtMemcpy(void *dst, size_t dst_max, const void *src, size_t count, aclrtMemcpyKind kind) {
    int32_t device;
    aclError error = acl_require_context(__func__, &device);
    if (error == ACL_SUCCESS) {
        error = check_kind(__func__, kind);
    }
    if (error == ACL_SUCCESS) {
        error = check_copy(__func__, dst, dst_max, src, count);
    }
    if (error == ACL_SUCCESS) {
        memmove(dst, src, count);
    }
    return error;
}

/*
 * Check one copy and pin what it touches. *caller_owned is set when a side is memory of the caller that is not
 * registered: it may be gone or reused right after the call, so the call has to wait for the copy.
 */
static aclError prepare_copy(const char *function, void *dst, size_t dst_max, const void *src, size_t count,
                             acl_copy *copy, bool *caller_owned) {
    acl_allocation dst_found = {.kind = COMM_MEM_TYPE_HOST}, src_found = {.kind = COMM_MEM_TYPE_HOST};
    aclError error = check_copy(function, dst, dst_max, src, count);
    if (error != ACL_SUCCESS) {
        return error;
    }
    copy->dst = dst;
    copy->src = src;
    copy->size = count;
    copy->dst_pin = acl_pin_range((uintptr_t)dst, count, &dst_found);
    copy->src_pin = acl_pin_range((uintptr_t)src, count, &src_found);
    if (dst_found.kind == COMM_MEM_TYPE_HOST && src_found.kind == COMM_MEM_TYPE_HOST) {
        acl_unpin_copy(copy);
        return acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: both %p and %p are host memory", function, dst, src);
    }
    *caller_owned |= (copy->dst_pin == NULL && !acl_is_registered((uintptr_t)dst, count)) ||
                     (copy->src_pin == NULL && !acl_is_registered((uintptr_t)src, count));
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtMemcpyAsync(void *dst, size_t dst_max, const void *src, size_t count, aclrtMemcpyKind kind,
                                     aclrtStream stream) {
    acl_stream *found;
    acl_copy copy;
    bool wait = false;
    aclError error = acl_enter_stream(__func__, stream, &found);
    if (error != ACL_SUCCESS) {
        return error;
    }
    error = check_kind(__func__, kind);
    if (error == ACL_SUCCESS && kind == ACL_MEMCPY_HOST_TO_HOST) {
        error = acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: copies from host to host", __func__);
    }
    if (error == ACL_SUCCESS) {
        error = prepare_copy(__func__, dst, dst_max, src, count, &copy, &wait);
    }
    if (error == ACL_SUCCESS) {
        error = acl_submit_copies(found, &copy, 1, wait);
    }
    acl_release_stream(found);
    return error;
}

static aclError check_batch(const char *function, void **dsts, size_t *dst_maxs, void **srcs, size_t *sizes,
                            size_t num_copies, aclrtMemcpyBatchAttr *attrs, size_t *attr_indexes, size_t num_attrs) {
    size_t i;
    if (dsts == NULL || dst_maxs == NULL || srcs == NULL || sizes == NULL || num_copies == 0) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: %zu copies, or an array is NULL", function, num_copies);
    }
    if (num_attrs > num_copies || (num_attrs > 0 && (attrs == NULL || attr_indexes == NULL))) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: %zu attributes for %zu copies, or their arrays are NULL",
                        function, num_attrs, num_copies);
    }
    for (i = 0; i < num_attrs; i++) { /* each names the first copy it is for; the addresses say the same */
        if (attr_indexes[i] >= num_copies || (i > 0 && attr_indexes[i] <= attr_indexes[i - 1])) {
            return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: attribute %zu is for copy %zu of %zu", function, i,
                            attr_indexes[i], num_copies);
        }
    }
    return ACL_SUCCESS;
}

/* Nothing is copied when a copy of the batch is wrong; *out_fail_index names it, and is SIZE_MAX otherwise. */
LDD_EXPORT aclError aclrtMemcpyBatch(void **dsts, size_t *dst_maxs, void **srcs, size_t *sizes, size_t num_copies,
                                     aclrtMemcpyBatchAttr *attrs, size_t *attr_indexes, size_t num_attrs,
                                     size_t *out_fail_index) {
    int32_t device;
    size_t i;
    aclError error = acl_require_context(__func__, &device);
    if (error == ACL_SUCCESS && out_fail_index == NULL) {
        error = acl_fail(ACL_ERROR_INVALID_PARAM, "%s: fail index pointer is NULL", __func__);
    }
    if (error != ACL_SUCCESS) {
        return error;
    }
    *out_fail_index = SIZE_MAX;
    error = check_batch(__func__, dsts, dst_maxs, srcs, sizes, num_copies, attrs, attr_indexes, num_attrs);
    for (i = 0; error == ACL_SUCCESS && i < num_copies; i++) {
        error = check_copy(__func__, dsts[i], dst_maxs[i], srcs[i], sizes[i]);
        if (error != ACL_SUCCESS) {
            *out_fail_index = i;
        }
    }
    for (i = 0; error == ACL_SUCCESS && i < num_copies; i++) {
        memmove(dsts[i], srcs[i], sizes[i]);
    }
    return error;
}

/* Check and pin all copies of a batch. On failure none stays pinned and *out_fail_index names the wrong one. */
static aclError prepare_batch(const char *function, void **dsts, size_t *dst_maxs, void **srcs, size_t *sizes,
                              size_t num_copies, acl_copy *copies, bool *wait, size_t *out_fail_index) {
    aclError error = ACL_SUCCESS;
    size_t i;
    for (i = 0; i < num_copies; i++) {
        error = prepare_copy(function, dsts[i], dst_maxs[i], srcs[i], sizes[i], &copies[i], wait);
        if (error != ACL_SUCCESS) {
            *out_fail_index = i;
            while (i-- > 0) {
                acl_unpin_copy(&copies[i]);
            }
            break;
        }
    }
    return error;
}

LDD_EXPORT aclError aclrtMemcpyBatchAsync(void **dsts, size_t *dst_maxs, void **srcs, size_t *sizes, size_t num_copies,
                                          aclrtMemcpyBatchAttr *attrs, size_t *attr_indexes, size_t num_attrs,
                                          size_t *out_fail_index, aclrtStream stream) {
    acl_stream *found;
    acl_copy *copies = NULL;
    bool wait = false;
    aclError error = acl_enter_stream(__func__, stream, &found);
    if (error != ACL_SUCCESS) {
        return error;
    }
    if (out_fail_index == NULL) {
        error = acl_fail(ACL_ERROR_INVALID_PARAM, "%s: fail index pointer is NULL", __func__);
    } else {
        *out_fail_index = SIZE_MAX;
        error = check_batch(__func__, dsts, dst_maxs, srcs, sizes, num_copies, attrs, attr_indexes, num_attrs);
    }
    if (error == ACL_SUCCESS) {
        copies = calloc(num_copies, sizeof *copies);
        error = copies != NULL
                    ? prepare_batch(__func__, dsts, dst_maxs, srcs, sizes, num_copies, copies, &wait, out_fail_index)
                    : acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no memory for %zu copies", __func__, num_copies);
    }
    if (error == ACL_SUCCESS) {
        error = acl_submit_copies(found, copies, num_copies, wait);
    }
    free(copies);
    acl_release_stream(found);
    return error;
}

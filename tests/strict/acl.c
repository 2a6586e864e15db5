/* The runtime: what it refuses is a missing context, and an asynchronous copy from host to host. */
#include "strict.h"

static _Thread_local char error_text[160];

int32_t strict_device(void) {
    int32_t device = -1;
    return strict_get_device(&device) == ACL_SUCCESS ? device : -1;
}

static int refuse(int code, const char *function, const char *why) {
    snprintf(error_text, sizeof error_text, "%s: %s", function, why);
    return strict_leave(code);
}

EXPORT const char *aclGetRecentErrMsg(void) {
    return error_text[0] != '\0' ? error_text : strict_real->acl.aclGetRecentErrMsg();
}

/* A call that works without a context, and one that does not. */
#define FREE_CALL(fn, params, args, subject)                                                                       \
    EXPORT aclError fn params {                                                                                    \
        int code;                                                                                                  \
        error_text[0] = '\0';                                                                                      \
        return strict_enter(#fn, subject, &code) ? code : strict_leave(strict_real->acl.fn args);                  \
    }
#define CALL(fn, params, args, subject)                                                                            \
    EXPORT aclError fn params {                                                                                    \
        int code;                                                                                                  \
        error_text[0] = '\0';                                                                                      \
        if (strict_enter(#fn, subject, &code)) {                                                                   \
            return code;                                                                                           \
        }                                                                                                          \
        return strict_device() < 0 ? refuse(ACL_ERROR_RT_CONTEXT_NULL, #fn, "the thread has no context")           \
                                   : strict_leave(strict_real->acl.fn args);                                       \
    }
/* Making and ending something: counted under a name. What ends it is carried out even when it is made to fail. */
#define MAKE(fn, params, args, name)                                                                               \
    EXPORT aclError fn params {                                                                                    \
        int code;                                                                                                  \
        error_text[0] = '\0';                                                                                      \
        if (strict_enter(#fn, NULL, &code)) {                                                                      \
            return code;                                                                                           \
        }                                                                                                          \
        code = strict_real->acl.fn args;                                                                           \
        strict_add(name, code == ACL_SUCCESS);                                                                     \
        return strict_leave(code);                                                                                 \
    }
#define END(fn, params, args, name, subject)                                                                       \
    EXPORT aclError fn params {                                                                                    \
        int told = ACL_SUCCESS, code;                                                                              \
        bool fails = strict_enter(#fn, subject, &told);                                                            \
        error_text[0] = '\0';                                                                                      \
        code = strict_real->acl.fn args;                                                                           \
        strict_add(name, -(code == ACL_SUCCESS));                                                                  \
        return fails ? told : strict_leave(code);                                                                  \
    }

enum { SHIFT = 64 };

FREE_CALL(aclInit, (const char *path), (path), NULL)
FREE_CALL(aclrtGetVersion, (int32_t *a, int32_t *b, int32_t *c), (a, b, c), NULL)
FREE_CALL(aclrtGetDeviceCount, (uint32_t *out), (out), NULL)
FREE_CALL(aclrtSetCurrentContext, (aclrtContext context), (context), context)
FREE_CALL(aclrtGetCurrentContext, (aclrtContext *out), (out), NULL)

EXPORT aclError aclrtGetDevice(int32_t *out) {
    return strict_get_device(out);
}

MAKE(aclrtSetDevice, (int32_t device), (device), "devices")

/* A reset may leave its thread without a context, whichever it had. */
EXPORT aclError aclrtResetDevice(int32_t device) {
    int told = ACL_SUCCESS, code;
    bool fails = strict_enter(__func__, NULL, &told);
    aclrtContext passing;
    error_text[0] = '\0';
    code = strict_real->acl.aclrtResetDevice(device);
    strict_add("devices", -(code == ACL_SUCCESS));
    if (strict_real->acl.aclrtCreateContext(&passing, 0) == ACL_SUCCESS) {
        strict_real->acl.aclrtDestroyContext(passing);
    }
    return fails ? told : strict_leave(code);
}

MAKE(aclrtCreateContext, (aclrtContext *out, int32_t device), (out, device), "contexts")
END(aclrtDestroyContext, (aclrtContext context), (context), "contexts", context)
MAKE(aclrtCreateStream, (aclrtStream *out), (out), "streams")
END(aclrtDestroyStream, (aclrtStream stream), (stream), "streams", stream)
/* Device memory starts at a multiple of 64 bytes, as CANN promises, and of nothing larger. */
EXPORT aclError aclrtMalloc(void **out, size_t size, aclrtMemMallocPolicy policy) {
    int code;
    error_text[0] = '\0';
    if (strict_enter(__func__, NULL, &code)) {
        return code;
    }
    code = strict_real->acl.aclrtMalloc(out, size + SHIFT, policy);
    strict_note("policy", policy);
    strict_add("memory", code == ACL_SUCCESS);
    *out = code == ACL_SUCCESS ? (char *)*out + SHIFT : NULL;
    return strict_leave(code);
}

END(aclrtFree, (void *ptr), (ptr != NULL ? (char *)ptr - SHIFT : ptr), "memory", ptr)
MAKE(aclrtMallocHost, (void **out, size_t size), (out, size), "memory")
END(aclrtFreeHost, (void *ptr), (ptr), "memory", ptr)
CALL(aclrtSynchronizeStreamWithTimeout, (aclrtStream stream, int32_t ms), (stream, ms), stream)
CALL(aclrtStreamAbort, (aclrtStream stream), (stream), stream)
/* Device memory lies on huge pages, unless LDD_STRICT_PAGE_BYTES says otherwise. */
EXPORT aclError aclrtPointerGetAttributes(const void *ptr, aclrtPtrAttributes *out) {
    int code;
    error_text[0] = '\0';
    if (strict_enter(__func__, ptr, &code)) {
        return code;
    }
    code = strict_real->acl.aclrtPointerGetAttributes(ptr, out);
    if (code == ACL_SUCCESS && out->location.type == ACL_MEM_LOCATION_TYPE_DEVICE) {
        out->pageSize = getenv("LDD_STRICT_PAGE_BYTES") != NULL ? (uint32_t)strict_ms("LDD_STRICT_PAGE_BYTES") : 2u << 20;
    }
    return strict_leave(code);
}

/* Where memory lies as far as `kind` says; memory that was not taken from the runtime is whatever the caller says. */
static bool is_on(const void *ptr, bool host) {
    aclrtPtrAttributes attributes;
    if (strict_real->acl.aclrtPointerGetAttributes(ptr, &attributes) != ACL_SUCCESS ||
        attributes.location.type > ACL_MEM_LOCATION_TYPE_DEVICE) {
        return true;
    }
    return host == (attributes.location.type == ACL_MEM_LOCATION_TYPE_HOST);
}

/* Older runtimes go by the kind alone, and none of them knows "by address". */
static const char *wrong_kind(const void *dst, const void *src, aclrtMemcpyKind kind) {
    bool to_host = kind == ACL_MEMCPY_HOST_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_HOST;
    bool from_host = kind == ACL_MEMCPY_HOST_TO_HOST || kind == ACL_MEMCPY_HOST_TO_DEVICE;
    if (kind < ACL_MEMCPY_HOST_TO_HOST || kind > ACL_MEMCPY_DEVICE_TO_DEVICE) {
        return "the kind of copy is unknown to older runtimes";
    }
    return is_on(dst, to_host) && is_on(src, from_host) ? NULL : "the kind of copy is not that of the addresses";
}

EXPORT aclError aclrtMemcpy(void *dst, size_t max, const void *src, size_t count, aclrtMemcpyKind kind) {
    int code;
    const char *wrong;
    error_text[0] = '\0';
    if (strict_enter(__func__, dst, &code)) {
        return code;
    }
    if (strict_device() < 0) {
        return refuse(ACL_ERROR_RT_CONTEXT_NULL, __func__, "the thread has no context");
    }
    wrong = wrong_kind(dst, src, kind);
    return wrong != NULL ? refuse(ACL_ERROR_RT_PARAM_INVALID, __func__, wrong)
                         : strict_leave(strict_real->acl.aclrtMemcpy(dst, max, src, count, kind));
}

EXPORT aclError aclrtMemcpyAsync(void *dst, size_t max, const void *src, size_t count, aclrtMemcpyKind kind,
                                 aclrtStream stream) {
    int code;
    const char *wrong;
    error_text[0] = '\0';
    if (strict_enter(__func__, dst, &code)) {
        return code;
    }
    if (strict_device() < 0) {
        return refuse(ACL_ERROR_RT_CONTEXT_NULL, __func__, "the thread has no context");
    }
    wrong = wrong_kind(dst, src, kind);
    if (wrong != NULL) {
        return refuse(ACL_ERROR_RT_PARAM_INVALID, __func__, wrong);
    }
    if (kind == ACL_MEMCPY_HOST_TO_HOST) {
        return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, __func__, "no asynchronous copy from host to host");
    }
    return strict_leave(strict_real->acl.aclrtMemcpyAsync(dst, max, src, count, kind, stream));
}

static aclError remap(const char *function, int32_t id, int from, int to, int32_t *out) {
    int code;
    uint32_t count = 0;
    error_text[0] = '\0';
    if (strict_enter(function, NULL, &code)) {
        return code;
    }
    strict_real->acl.aclrtGetDeviceCount(&count);
    if (id < from || id - from >= (int32_t)count) {
        return refuse(ACL_ERROR_RT_INVALID_DEVICEID, function, "no such device");
    }
    *out = id - from + to;
    return strict_leave(ACL_SUCCESS);
}

EXPORT aclError aclrtGetLogicDevIdByUserDevId(int32_t id, int32_t *out) {
    return remap(__func__, id, 0, LOGIC_OFFSET, out);
}

EXPORT aclError aclrtGetPhyDevIdByLogicDevId(int32_t id, int32_t *out) {
    return remap(__func__, id, LOGIC_OFFSET, PHYSICAL_OFFSET, out);
}

EXPORT aclError aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *out) {
    int code;
    int64_t super_pod;
    error_text[0] = '\0';
    if (strict_enter(__func__, NULL, &code)) {
        return code;
    }
    super_pod = getenv("LDD_STRICT_SUPER_POD") != NULL ? strict_ms("LDD_STRICT_SUPER_POD") : SUPER_POD;
    *out = attribute == ACL_DEV_ATTR_SUPER_POD_DEVICE_ID   ? (int64_t)device + SUPER_DEVICE_OFFSET
           : attribute == ACL_DEV_ATTR_SUPER_POD_SERVER_ID ? 3
                                                           : super_pod;
    return strict_leave(ACL_SUCCESS);
}

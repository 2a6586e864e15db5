/*
 * The function table of a provider, filled with dlopen and dlsym when an engine is initialised.
 *
 * One list per library names every function once; slots, their types and the check come from it. Required
 * symbols are looked up before anybody sees the table, so whoever holds one may call them without asking; a
 * slot of an optional list is NULL where the provider lacks the symbol. Nothing is opened at import.
 *
 * Needs _GNU_SOURCE (Python.h defines it) for dlinfo.
 */
#ifndef LLM_DATADIST_LDD_PROVIDER_H
#define LLM_DATADIST_LDD_PROVIDER_H

#ifndef _GNU_SOURCE
#error "define _GNU_SOURCE before the first include: dlinfo tells where a library was found"
#endif

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "acl/acl_rt.h"
#include "cs/hixl_cs.h"
#include "llm_datadist/ldd_ext.h"
#include "llm_datadist/ldd_status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ACL_REQUIRED(X)                  \
    X(aclrtGetDeviceCount)               \
    X(aclrtSetDevice)                    \
    X(aclrtResetDevice)                  \
    X(aclrtCreateContext)                \
    X(aclrtDestroyContext)               \
    X(aclrtSetCurrentContext)            \
    X(aclrtGetCurrentContext)            \
    X(aclrtCreateStream)                 \
    X(aclrtDestroyStream)                \
    X(aclrtSynchronizeStreamWithTimeout) \
    X(aclrtMalloc)                       \
    X(aclrtFree)                         \
    X(aclrtMallocHost)                   \
    X(aclrtFreeHost)                     \
    X(aclrtMemcpy)                       \
    X(aclrtMemcpyAsync)

#define ACL_OPTIONAL(X)              \
    X(aclInit)                       \
    X(aclGetRecentErrMsg)            \
    X(aclrtGetVersion)               \
    X(aclrtStreamAbort)              \
    X(aclrtGetLogicDevIdByUserDevId) \
    X(aclrtGetPhyDevIdByLogicDevId)  \
    X(aclrtGetDeviceInfo)            \
    X(aclrtPointerGetAttributes)

#define HIXL_REQUIRED(X)               \
    X(HixlCSServerCreate)              \
    X(HixlCSServerRegMem)              \
    X(HixlCSServerListen)              \
    X(HixlCSServerUnregMem)            \
    X(HixlCSServerDestroy)             \
    X(HixlCSClientCreate)              \
    X(HixlCSClientRegMem)              \
    X(HixlCSClientUnregMem)            \
    X(HixlCSClientConnect)             \
    X(HixlCSClientGetRemoteMem)        \
    X(HixlCSClientBatchPutAsync)       \
    X(HixlCSClientBatchGetAsync)       \
    X(HixlCSClientQueryCompleteStatus) \
    X(HixlCSClientDestroy)

#define EXT_OPTIONAL(X)    \
    X(LddCapabilities)     \
    X(LddLastError)        \
    X(LddClientWait)       \
    X(LddClientCancel)     \
    X(LddServerRestrict)   \
    X(LddServerAdmitPeer)  \
    X(LddServerDropPeer)   \
    X(LddServerSetFetch)   \
    X(LddClientFetchAsync) \
    X(LddClientPaths)

#define LDD_SLOT(fn) __typeof__(&fn) fn;

typedef struct {
    ACL_REQUIRED(LDD_SLOT)
    ACL_OPTIONAL(LDD_SLOT)
} ldd_acl_table;

typedef struct {
    HIXL_REQUIRED(LDD_SLOT)
} ldd_hixl_table;

typedef struct {
    EXT_OPTIONAL(LDD_SLOT)
} ldd_ext_table;

#undef LDD_SLOT

typedef struct ldd_provider {
    ldd_acl_table acl;
    ldd_hixl_table hixl;
    ldd_ext_table ext;
    uint32_t caps; /* LDD_CAP_* bits whose symbols are there as well */
    char name[16]; /* "host" or "cann" */
    void *acl_lib, *hixl_lib;
    char acl_path[256], hixl_path[256]; /* where the loader found them */
    char version[32];                   /* of the runtime, "" when it does not tell */
} ldd_provider;

/*
 * A library by file name: the copy already in the process, then $ASCEND_HOME_PATH/lib64, then the loader's path.
 * A second copy of a runtime whose first copy the framework opened would know nothing of its contexts, hence
 * the order. The reason of a failure is appended to `reason`.
 */
static inline void *ldd_open_toolkit_library(const char *file, char *reason, size_t reason_size) {
    void *lib = dlopen(file, RTLD_NOW | RTLD_NOLOAD);
    size_t used = strlen(reason);
    const char *home = getenv("ASCEND_HOME_PATH"), *error = NULL;
    char path[4096];

    if (lib != NULL) {
        return lib;
    }
    if (home != NULL && home[0] != '\0') {
        int length = snprintf(path, sizeof path, "%s/lib64/%s", home, file);
        if (length > 0 && (size_t)length < sizeof path && access(path, F_OK) == 0) {
            lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
            error = lib == NULL ? dlerror() : NULL;
        }
    }
    if (error != NULL) { /* it is there and does not load: that says more than what the search below may find */
        snprintf(reason + used, reason_size - used, "%s%s", used ? "; " : "", error);
        used = strlen(reason);
    }
    if (lib == NULL) {
        lib = dlopen(file, RTLD_NOW | RTLD_LOCAL);
        if (lib == NULL && error == NULL) {
            error = dlerror();
            snprintf(reason + used, reason_size - used, "%s%s", used ? "; " : "", error != NULL ? error : file);
        }
    }
    return lib;
}

static inline void ldd_library_path(void *lib, char *path, size_t size) {
    struct link_map *map = NULL;
    if (dlinfo(lib, RTLD_DI_LINKMAP, &map) == 0 && map != NULL && map->l_name != NULL) {
        snprintf(path, size, "%s", map->l_name);
    }
}

static inline ldd_status ldd_missing(const ldd_provider *provider, const char *path, const char *symbol,
                                     ldd_detail *detail) {
    const char *error = dlerror();
    return ldd_fail(detail, LDD_E_NOT_ENABLED, "%s lacks symbol %s (runtime version %s): %s", path, symbol,
                    provider->version[0] ? provider->version : "unknown", error != NULL ? error : "no reason given");
}

/* dlsym returns data pointers; POSIX wants them stored through void ** into a function pointer. */
#define LDD_LOOK_UP(table, lib, fn) (*(void **)&(table).fn = dlsym((lib), #fn))

/* Fill every slot from provider->acl_lib and provider->hixl_lib. */
static inline ldd_status ldd_provider_fill(ldd_provider *provider, ldd_detail *detail) {
    int32_t major = 0, minor = 0, patch = 0;

    ldd_library_path(provider->acl_lib, provider->acl_path, sizeof provider->acl_path);
    ldd_library_path(provider->hixl_lib, provider->hixl_path, sizeof provider->hixl_path);

#define LDD_FILL(fn) LDD_LOOK_UP(provider->acl, provider->acl_lib, fn);
    ACL_OPTIONAL(LDD_FILL)
#undef LDD_FILL
    if (provider->acl.aclrtGetVersion != NULL && provider->acl.aclrtGetVersion(&major, &minor, &patch) == ACL_SUCCESS) {
        snprintf(provider->version, sizeof provider->version, "%d.%d.%d", major, minor, patch);
    }

#define LDD_FILL(fn)                                                   \
    if (LDD_LOOK_UP(provider->acl, provider->acl_lib, fn) == NULL) {   \
        return ldd_missing(provider, provider->acl_path, #fn, detail); \
    }
    ACL_REQUIRED(LDD_FILL)
#undef LDD_FILL

#define LDD_FILL(fn)                                                    \
    if (LDD_LOOK_UP(provider->hixl, provider->hixl_lib, fn) == NULL) {  \
        return ldd_missing(provider, provider->hixl_path, #fn, detail); \
    }
    HIXL_REQUIRED(LDD_FILL)
#undef LDD_FILL

#define LDD_FILL(fn) LDD_LOOK_UP(provider->ext, provider->hixl_lib, fn);
    EXT_OPTIONAL(LDD_FILL)
#undef LDD_FILL
    if (provider->ext.LddCapabilities != NULL) {
        provider->caps = provider->ext.LddCapabilities();
        if (provider->ext.LddClientWait == NULL) {
            provider->caps &= ~(uint32_t)LDD_CAP_WAIT;
        }
        if (provider->ext.LddClientCancel == NULL) {
            provider->caps &= ~(uint32_t)LDD_CAP_CANCEL;
        }
        if (provider->ext.LddServerDropPeer == NULL) {
            provider->caps &= ~(uint32_t)LDD_CAP_DROP_PEER;
        }
        if (provider->ext.LddServerRestrict == NULL || provider->ext.LddServerAdmitPeer == NULL ||
            provider->ext.LddServerDropPeer == NULL) {
            provider->caps &= ~(uint32_t)LDD_CAP_ADMIT;
        }
        if (provider->ext.LddServerSetFetch == NULL || provider->ext.LddClientFetchAsync == NULL) {
            provider->caps &= ~(uint32_t)LDD_CAP_FETCH;
        }
    }
    return LDD_OK;
}

#undef LDD_LOOK_UP

static inline ldd_status ldd_no_toolkit_library(const char *file, const char *reason, ldd_detail *detail) {
    const char *home = getenv("ASCEND_HOME_PATH");
    return ldd_fail(detail, LDD_E_NOT_ENABLED, "CANN library %s is unavailable%s: %s", file,
                    home == NULL || home[0] == '\0' ? " (ASCEND_HOME_PATH is not set)" : "", reason);
}

static inline ldd_status ldd_provider_open_cann(ldd_provider *provider, ldd_detail *detail) {
    char reason[320] = "";

    snprintf(provider->name, sizeof provider->name, "cann");
    provider->acl_lib = ldd_open_toolkit_library("libacl_rt.so", reason, sizeof reason);
    if (provider->acl_lib == NULL) { /* its name on older installations */
        provider->acl_lib = ldd_open_toolkit_library("libascendcl.so", reason, sizeof reason);
    }
    if (provider->acl_lib == NULL) {
        return ldd_no_toolkit_library("libacl_rt.so", reason, detail);
    }
    reason[0] = '\0';
    provider->hixl_lib = ldd_open_toolkit_library("libcann_hixl.so", reason, sizeof reason);
    if (provider->hixl_lib == NULL) {
        return ldd_no_toolkit_library("libcann_hixl.so", reason, detail);
    }
    return ldd_provider_fill(provider, detail);
}

static inline ldd_status ldd_provider_open_host(ldd_provider *provider, const char *path, ldd_detail *detail) {
    memset(provider, 0, sizeof *provider);
    snprintf(provider->name, sizeof provider->name, "host");
    provider->acl_lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (provider->acl_lib == NULL) {
        const char *error = dlerror();
        return ldd_fail(detail, LDD_E_NOT_ENABLED, "host provider library is unavailable: %s", error ? error : path);
    }
    provider->hixl_lib = provider->acl_lib;
    return ldd_provider_fill(provider, detail);
}

/* "auto": CANN when it opens and has a device, otherwise the host provider; detail->text then keeps why not CANN. */
static inline ldd_status ldd_provider_open_auto(ldd_provider *provider, const char *path, ldd_detail *detail) {
    ldd_detail host_detail = {0, ""};
    uint32_t num_devices = 0;
    ldd_status status = ldd_provider_open_cann(provider, detail);
    if (status == LDD_OK) {
        aclError error = provider->acl.aclrtGetDeviceCount(&num_devices);
        if (error == ACL_SUCCESS && num_devices > 0) {
            return LDD_OK;
        }
        if (error != ACL_SUCCESS && detail != NULL) {
            detail->provider_code = error;
        }
        ldd_fail(detail, LDD_E_NOT_ENABLED, "CANN runtime %s: no device (aclrtGetDeviceCount returned %d, %u devices)",
                 provider->acl_path, error, num_devices);
    }
    status = ldd_provider_open_host(provider, path, &host_detail);
    if (status != LDD_OK && detail != NULL) {
        *detail = host_detail;
    }
    return status;
}

/*
 * Open a provider: "cann", "host" (from host_library_path), or "auto". LDD_E_NOT_ENABLED names library, symbol,
 * version and the loader's text; *out is NULL then.
 */
static inline ldd_status ldd_provider_open(const char *which, const char *host_library_path, ldd_provider **out,
                                           ldd_detail *detail) {
    ldd_provider *provider;
    ldd_status status;

    *out = NULL;
    provider = (ldd_provider *)calloc(1, sizeof *provider);
    if (provider == NULL) {
        return ldd_fail(detail, LDD_E_NO_MEMORY, "function table of %zu bytes", sizeof *provider);
    }
    if (strcmp(which, "cann") == 0) {
        status = ldd_provider_open_cann(provider, detail);
    } else if (strcmp(which, "host") == 0) {
        status = ldd_provider_open_host(provider, host_library_path, detail);
    } else if (strcmp(which, "auto") == 0) {
        status = ldd_provider_open_auto(provider, host_library_path, detail);
    } else {
        status = ldd_fail(detail, LDD_E_PARAM, "provider is '%.64s'; known: auto, host, cann", which);
    }
    if (status != LDD_OK) {
        free(provider);
        return status;
    }
    *out = provider;
    return LDD_OK;
}

/* The libraries stay loaded: their own threads may still run, and a toolkit is shared with the framework. */
static inline void ldd_provider_close(ldd_provider *provider) {
    free(provider);
}

#ifdef __cplusplus
}
#endif
#endif

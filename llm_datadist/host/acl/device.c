/*
 * Process, emulated devices and contexts.
 *
 * A device is a number: all of them share the memory and the processors of the machine. What is real about
 * them is the discipline, which is that of CANN: a thread needs a current context, aclrtSetDevice is counted,
 * and a context that ended is an error and not an accident.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <unistd.h>

#include "acl/context.h"
#include "acl/memory.h"
#include "acl/register.h"
#include "acl/stream.h"

enum { MAX_DEVICES = ACL_HOST_MAX_DEVICES, DEFAULT_DEVICES = 8 };

/* What aclrtGetVersion answers: the interface that this provider implements. */
enum { VERSION_MAJOR = 1, VERSION_MINOR = 0, VERSION_PATCH = 0 };

typedef struct {
    uint32_t sets;   /* aclrtSetDevice calls that aclrtResetDevice has not undone */
    void *primary;   /* handle of the default context while sets > 0 */
} device_state;

static pthread_mutex_t device_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the two below */
static device_state devices[MAX_DEVICES];
static uint64_t num_inits; /* aclInit calls that aclFinalizeReference has not undone */

/* ---- devices ---- */

static aclError count_devices(const char *function, uint32_t *count) {
    const char *text = getenv("LLM_DATADIST_HOST_DEVICES");
    unsigned long value = DEFAULT_DEVICES;
    if (text != NULL && text[0] != '\0') {
        char *end;
        value = strtoul(text, &end, 10);
        if (*end != '\0' || text[0] == '-' || value > MAX_DEVICES) {
            return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: LLM_DATADIST_HOST_DEVICES is '%.32s'; 0 to %d expected",
                            function, text, MAX_DEVICES);
        }
    }
    *count = (uint32_t)value;
    return ACL_SUCCESS;
}

static aclError check_device(const char *function, int32_t device) {
    uint32_t count = 0;
    aclError error = count_devices(function, &count);
    if (error != ACL_SUCCESS) {
        return error;
    }
    if (count == 0) {
        return acl_fail(ACL_ERROR_RT_NO_DEVICE, "%s: LLM_DATADIST_HOST_DEVICES is 0", function);
    }
    if (device < 0 || (uint32_t)device >= count) {
        return acl_fail(ACL_ERROR_RT_INVALID_DEVICEID, "%s: device is %d; 0 to %u expected", function, device,
                        count - 1);
    }
    return ACL_SUCCESS;
}

static aclError check_out(const char *function, const void *out) {
    return out != NULL ? ACL_SUCCESS : acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is NULL", function);
}

LDD_EXPORT aclError aclrtGetDeviceCount(uint32_t *out_count) {
    aclError error = check_out(__func__, out_count);
    return error != ACL_SUCCESS ? error : count_devices(__func__, out_count);
}

/* ---- contexts ---- */

/* End a context and its streams; threads that have it current get ACL_ERROR_RT_CONTEXT_NULL from now on. */
static bool end_context(void *handle) {
    acl_context *context = (acl_context *)acl_withdraw(handle, ACL_HOST_CONTEXT);
    if (context == NULL) {
        return false;
    }
    pthread_mutex_lock(&context->lock);
    context->closed = true;
    pthread_mutex_unlock(&context->lock);
    acl_end_streams(handle);
    acl_release(&context->object);
    return true;
}

LDD_EXPORT aclError aclrtSetDevice(int32_t device) {
    aclError error = check_device(__func__, device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&device_lock);
    if (devices[device].sets == 0) {
        error = acl_create_context(__func__, device, true, &devices[device].primary);
    }
    if (error == ACL_SUCCESS) {
        devices[device].sets++;
        acl_make_current(devices[device].primary, device, acl_withdrawals());
    }
    pthread_mutex_unlock(&device_lock);
    return error;
}

static aclError reset_device(const char *function, int32_t device, bool force) {
    void *ended = NULL;
    aclError error = check_device(function, device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&device_lock);
    if (devices[device].sets == 0) {
        error = acl_fail(ACL_ERROR_RT_CONTEXT_NULL, "%s: device %d is not set", function, device);
    } else {
        devices[device].sets = force ? 0 : devices[device].sets - 1;
        if (devices[device].sets == 0) {
            ended = devices[device].primary;
            devices[device].primary = NULL;
        }
    }
    pthread_mutex_unlock(&device_lock);
    if (ended != NULL) {
        end_context(ended);
    }
    return error;
}

LDD_EXPORT aclError aclrtResetDevice(int32_t device) {
    return reset_device(__func__, device, false);
}

LDD_EXPORT aclError aclrtResetDeviceForce(int32_t device) {
    return reset_device(__func__, device, true);
}

LDD_EXPORT aclError aclrtGetDevice(int32_t *out_device) {
    aclError error = check_out(__func__, out_device);
    int32_t device = 0;
    if (error == ACL_SUCCESS) {
        error = acl_require_context(__func__, &device);
    }
    if (error == ACL_SUCCESS) {
        *out_device = device;
    }
    return error;
}

LDD_EXPORT aclError aclrtCreateContext(aclrtContext *out_context, int32_t device) {
    uint64_t withdrawals = acl_withdrawals();
    aclError error = check_out(__func__, out_context);
    if (error == ACL_SUCCESS) {
        error = check_device(__func__, device);
    }
    if (error == ACL_SUCCESS) {
        error = acl_create_context(__func__, device, false, out_context);
    }
    if (error == ACL_SUCCESS) {
        acl_make_current(*out_context, device, withdrawals);
    }
    return error;
}

LDD_EXPORT aclError aclrtDestroyContext(aclrtContext context) {
    acl_context *found = (acl_context *)acl_acquire(context, ACL_HOST_CONTEXT);
    bool primary;
    if (found == NULL) {
        return acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no context", __func__, context);
    }
    primary = found->primary;
    acl_release(&found->object);
    if (primary) {
        return acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is a default context; aclrtResetDevice ends it", __func__,
                        context);
    }
    if (!end_context(context)) { /* another thread was faster */
        return acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no context", __func__, context);
    }
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtSetCurrentContext(aclrtContext context) {
    uint64_t withdrawals = acl_withdrawals();
    acl_context *found;
    if (context == NULL) {
        return acl_fail(ACL_ERROR_RT_CONTEXT_NULL, "%s: context is NULL", __func__);
    }
    found = (acl_context *)acl_acquire(context, ACL_HOST_CONTEXT);
    if (found == NULL) {
        return acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no context", __func__, context);
    }
    acl_make_current(context, found->device, withdrawals);
    acl_release(&found->object);
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtGetCurrentContext(aclrtContext *out_context) {
    aclError error = check_out(__func__, out_context);
    int32_t device;
    if (error == ACL_SUCCESS) {
        error = acl_require_context(__func__, &device);
    }
    if (error == ACL_SUCCESS) {
        *out_context = acl_current_handle();
    }
    return error;
}

LDD_EXPORT aclError aclrtCtxGetCurrentDefaultStream(aclrtStream *out_stream) {
    acl_context *context;
    aclError error = check_out(__func__, out_stream);
    if (error == ACL_SUCCESS) {
        error = acl_enter_context(__func__, &context);
    }
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&context->lock);
    if (context->default_stream == NULL) {
        error = acl_create_stream(context, true, &context->default_stream);
    }
    *out_stream = context->default_stream;
    pthread_mutex_unlock(&context->lock);
    acl_release(&context->object);
    return error;
}

/* ---- facts about devices ---- */

LDD_EXPORT const char *aclrtGetSocName(void) {
    return "host";
}

LDD_EXPORT aclError aclrtGetVersion(int32_t *out_major, int32_t *out_minor, int32_t *out_patch) {
    if (out_major == NULL || out_minor == NULL || out_patch == NULL) {
        return check_out(__func__, NULL);
    }
    *out_major = VERSION_MAJOR;
    *out_minor = VERSION_MINOR;
    *out_patch = VERSION_PATCH;
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtGetRunMode(aclrtRunMode *out_mode) {
    aclError error = check_out(__func__, out_mode);
    if (error == ACL_SUCCESS) {
        *out_mode = ACL_HOST;
    }
    return error;
}

/* User, logic and physical numbers of an emulated device are the same. */
static aclError same_device(const char *function, int32_t device, int32_t *out_device) {
    aclError error = check_out(function, out_device);
    if (error == ACL_SUCCESS) {
        error = check_device(function, device);
    }
    if (error == ACL_SUCCESS) {
        *out_device = device;
    }
    return error;
}

LDD_EXPORT aclError aclrtGetLogicDevIdByUserDevId(int32_t user_id, int32_t *out_logic_id) {
    return same_device(__func__, user_id, out_logic_id);
}

LDD_EXPORT aclError aclrtGetPhyDevIdByLogicDevId(int32_t logic_id, int32_t *out_physical_id) {
    return same_device(__func__, logic_id, out_physical_id);
}

LDD_EXPORT aclError aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *out_value) {
    aclError error = check_out(__func__, out_value);
    if (error == ACL_SUCCESS) {
        error = check_device(__func__, device > INT32_MAX ? -1 : (int32_t)device);
    }
    if (error == ACL_SUCCESS) {
        error = acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: an emulated device has no attribute %d", __func__,
                         attribute);
    }
    return error;
}

LDD_EXPORT aclError aclrtDeviceCanAccessPeer(int32_t *out_can_access, int32_t device, int32_t peer) {
    aclError error = check_out(__func__, out_can_access);
    if (error == ACL_SUCCESS) {
        error = check_device(__func__, device);
    }
    if (error == ACL_SUCCESS) {
        error = check_device(__func__, peer);
    }
    if (error == ACL_SUCCESS) {
        *out_can_access = 1; /* one memory serves all of them */
    }
    return error;
}

LDD_EXPORT aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
    int32_t device;
    aclError error = acl_require_context(__func__, &device);
    if (error == ACL_SUCCESS) {
        error = check_device(__func__, peer);
    }
    if (error == ACL_SUCCESS && flags != 0) {
        error = acl_fail(ACL_ERROR_INVALID_PARAM, "%s: flags are %u; 0 expected", __func__, flags);
    }
    return error;
}

/* ---- process ---- */

LDD_EXPORT aclError aclInit(const char *config_path) {
    bool repeated;
    if (config_path != NULL && config_path[0] != '\0' && access(config_path, R_OK) != 0) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: configuration file %.256s is not readable", __func__,
                        config_path);
    }
    pthread_mutex_lock(&device_lock);
    repeated = num_inits++ > 0;
    pthread_mutex_unlock(&device_lock);
    return repeated ? acl_fail(ACL_ERROR_REPEAT_INITIALIZE, "%s: initialised before; this call is counted", __func__)
                    : ACL_SUCCESS;
}

/* Undo one aclInit, or all; the last one ends the default context of every device. */
static aclError finalize(const char *function, bool all, uint64_t *out_count) {
    void *ended[MAX_DEVICES] = {NULL};
    int i;
    pthread_mutex_lock(&device_lock);
    if (num_inits == 0) {
        pthread_mutex_unlock(&device_lock);
        return acl_fail(ACL_ERROR_REPEAT_FINALIZE, "%s: not initialised, or finalised before", function);
    }
    num_inits = all ? 0 : num_inits - 1;
    if (out_count != NULL) {
        *out_count = num_inits;
    }
    for (i = 0; num_inits == 0 && i < MAX_DEVICES; i++) {
        ended[i] = devices[i].primary;
        devices[i].primary = NULL;
        devices[i].sets = 0;
    }
    pthread_mutex_unlock(&device_lock);
    for (i = 0; i < MAX_DEVICES; i++) {
        if (ended[i] != NULL) {
            end_context(ended[i]);
        }
    }
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclFinalize(void) {
    return finalize(__func__, true, NULL);
}

LDD_EXPORT aclError aclFinalizeReference(uint64_t *out_count) {
    return finalize(__func__, false, out_count);
}

/* ---- fork ---- */

/*
 * A child made by fork() has none of our threads: it starts without contexts, streams and events, while its
 * memory stays mapped. Locks are taken in their usual order and so are not held by anybody at the moment of fork.
 */
static void before_fork(void) {
    pthread_mutex_lock(&device_lock);
    acl_objects_before_fork();
    acl_memory_before_fork();
    acl_ranges_before_fork();
}

static void after_fork_in_parent(void) {
    acl_ranges_after_fork(false);
    acl_memory_after_fork(false);
    acl_objects_after_fork(false);
    pthread_mutex_unlock(&device_lock);
}

static void after_fork_in_child(void) {
    int i;
    acl_ranges_after_fork(true);
    acl_memory_after_fork(true);
    acl_objects_after_fork(true);
    acl_forget_streams();
    for (i = 0; i < MAX_DEVICES; i++) {
        devices[i].primary = NULL;
        devices[i].sets = 0;
    }
    num_inits = 0;
    acl_make_current(NULL, -1, 0);
    pthread_mutex_unlock(&device_lock);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

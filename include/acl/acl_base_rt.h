/*
 * Types and numbers of the acl runtime, restated for LP64 Linux.
 *
 * ABI-compatible with the header of the same name in CANN: only what this package calls or answers is
 * here. Enumerations travel as 4-byte integers; every layout below is asserted.
 */
#ifndef LLM_DATADIST_ACL_BASE_RT_H
#define LLM_DATADIST_ACL_BASE_RT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int aclError;

typedef void *aclrtContext;
typedef void *aclrtStream;
typedef void *aclrtEvent;
typedef void *aclrtNotify;
typedef void *aclrtDrvMemHandle;

enum {
    ACL_SUCCESS = 0,

    /* acl layer */
    ACL_ERROR_INVALID_PARAM = 100000,
    ACL_ERROR_UNINITIALIZE = 100001,
    ACL_ERROR_REPEAT_INITIALIZE = 100002, /* harmless */
    ACL_ERROR_REPEAT_FINALIZE = 100037,
    ACL_ERROR_BAD_ALLOC = 200000,

    /* runtime layer: the caller */
    ACL_ERROR_RT_PARAM_INVALID = 107000,
    ACL_ERROR_RT_INVALID_DEVICEID = 107001,
    ACL_ERROR_RT_CONTEXT_NULL = 107002,
    ACL_ERROR_RT_STREAM_CONTEXT = 107003,
    ACL_ERROR_RT_INVALID_HANDLE = 107017,
    ACL_ERROR_RT_WAIT_TIMEOUT = 107019,
    ACL_ERROR_RT_TASK_TIMEOUT = 107020,
    ACL_ERROR_RT_DEVICE_TASK_ABORT = 107022,
    ACL_ERROR_RT_STREAM_ABORT = 107023,

    /* runtime layer: resources */
    ACL_ERROR_RT_FEATURE_NOT_SUPPORT = 207000,
    ACL_ERROR_RT_MEMORY_ALLOCATION = 207001,
    ACL_ERROR_RT_NO_DEVICE = 207004,
    ACL_ERROR_RT_RESOURCE_ALLOC_FAIL = 207005,
    ACL_ERROR_RT_NO_STREAM_RESOURCE = 207008,
    ACL_ERROR_RT_DEVICE_OOM = 207018,

    /* runtime layer: the machine */
    ACL_ERROR_RT_INTERNAL_ERROR = 507000,
    ACL_ERROR_RT_SYS_DMA = 507013,
    ACL_ERROR_RT_STREAM_SYNC_TIMEOUT = 507046,
    ACL_ERROR_RT_EVENT_SYNC_TIMEOUT = 507047,
    ACL_ERROR_RT_DEVICE_MEM_ERROR = 507053,
    ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR = 507054,
    ACL_ERROR_RT_SUSPECT_DEVICE_MEM_ERROR = 507055,
    ACL_ERROR_RT_LINK_ERROR = 507056,
    ACL_ERROR_RT_SUSPECT_REMOTE_ERROR = 507057,
    ACL_ERROR_RT_DRV_INTERNAL_ERROR = 507899,
    ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 507910,
    ACL_ERROR_HOST_MEMORY_NOT_REGISTERED = 507911
};

typedef enum {
    ACL_MEMCPY_HOST_TO_HOST = 0,
    ACL_MEMCPY_HOST_TO_DEVICE = 1,
    ACL_MEMCPY_DEVICE_TO_HOST = 2,
    ACL_MEMCPY_DEVICE_TO_DEVICE = 3,
    ACL_MEMCPY_DEFAULT = 4, /* the addresses decide */
    ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE = 5,
    ACL_MEMCPY_INNER_DEVICE_TO_DEVICE = 6,
    ACL_MEMCPY_INTER_DEVICE_TO_DEVICE = 7
} aclrtMemcpyKind;

typedef enum {
    ACL_MEM_MALLOC_HUGE_FIRST = 0,
    ACL_MEM_MALLOC_HUGE_ONLY = 1,
    ACL_MEM_MALLOC_NORMAL_ONLY = 2,
    ACL_MEM_MALLOC_HUGE_FIRST_P2P = 3,
    ACL_MEM_MALLOC_HUGE_ONLY_P2P = 4,
    ACL_MEM_MALLOC_NORMAL_ONLY_P2P = 5,
    ACL_MEM_MALLOC_HUGE1G_ONLY = 6,
    ACL_MEM_MALLOC_HUGE1G_ONLY_P2P = 7,
    ACL_MEM_TYPE_LOW_BAND_WIDTH = 0x0100,
    ACL_MEM_TYPE_HIGH_BAND_WIDTH = 0x1000
} aclrtMemMallocPolicy;

/* The opposite numbering of the older aclrtEventStatus. */
typedef enum {
    ACL_EVENT_RECORDED_STATUS_NOT_READY = 0,
    ACL_EVENT_RECORDED_STATUS_COMPLETE = 1
} aclrtEventRecordedStatus;

typedef enum {
    ACL_STREAM_STATUS_COMPLETE = 0,
    ACL_STREAM_STATUS_NOT_READY = 1,
    ACL_STREAM_STATUS_RESERVED = 0xFFFF
} aclrtStreamStatus;

typedef enum { ACL_DEVICE = 0, ACL_HOST = 1 } aclrtRunMode;

typedef enum {
    ACL_MEM_LOCATION_TYPE_HOST = 0,
    ACL_MEM_LOCATION_TYPE_DEVICE = 1,
    ACL_MEM_LOCATION_TYPE_UNREGISTERED = 2,
    ACL_MEM_LOCATION_TYPE_MANAGED = 3,
    ACL_MEM_LOCATION_TYPE_HOST_NUMA = 4
} aclrtMemLocationType;

typedef enum {
    ACL_HOST_REGISTER_MAPPED = 0,
    ACL_HOST_REGISTER_IOMEMORY = 4,
    ACL_HOST_REGISTER_READONLY = 8
} aclrtHostRegisterType;

typedef enum {
    ACL_DDR_MEM = 0,
    ACL_HBM_MEM = 1,
    ACL_DDR_MEM_HUGE = 2,
    ACL_DDR_MEM_NORMAL = 3,
    ACL_HBM_MEM_HUGE = 4,
    ACL_HBM_MEM_NORMAL = 5
} aclrtMemAttr;

/* Flags of aclrtCreateStreamWithConfig. */
enum {
    ACL_STREAM_FAST_LAUNCH = 0x01,
    ACL_STREAM_FAST_SYNC = 0x02,
    ACL_STREAM_PERSISTENT = 0x04,
    ACL_STREAM_HUGE = 0x08,
    ACL_STREAM_CPU_SCHEDULE = 0x10,
    ACL_STREAM_DEVICE_USE_ONLY = 0x20
};

/* Modes of aclrtSetStreamFailureMode. */
enum { ACL_CONTINUE_ON_FAILURE = 0, ACL_STOP_ON_FAILURE = 1 };

/* Flags of aclrtCreateEventExWithFlag. */
enum {
    ACL_EVENT_SYNC = 0x01,
    ACL_EVENT_CAPTURE_STREAM_PROGRESS = 0x02,
    ACL_EVENT_TIME_LINE = 0x08,
    ACL_EVENT_DEVICE_USE_ONLY = 0x10,
    ACL_EVENT_EXTERNAL = 0x20,
    ACL_EVENT_IPC = 0x40
};

/* Attributes of aclrtGetDeviceInfo that link set-up asks for. */
enum {
    ACL_DEV_ATTR_SUPER_POD_DEVICE_ID = 403,
    ACL_DEV_ATTR_SUPER_POD_SERVER_ID = 404,
    ACL_DEV_ATTR_SUPER_POD_ID = 405
};

typedef struct {
    uint32_t id;
    aclrtMemLocationType type;
} aclrtMemLocation;

typedef struct {
    aclrtMemLocation location;
    uint32_t pageSize;
    uint32_t rsv[4];
} aclrtPtrAttributes;

typedef struct {
    int handleType;
    int allocationType;
    aclrtMemAttr memAttr;
    aclrtMemLocation location;
    uint64_t reserve;
} aclrtPhysicalMemProp;

typedef struct {
    int flags; /* 0 no access, 1 read, 3 read and write */
    aclrtMemLocation location;
    uint8_t rsv[12];
} aclrtMemAccessDesc;

typedef struct {
    aclrtMemLocation dstLoc;
    aclrtMemLocation srcLoc;
    uint8_t rsv[16];
} aclrtMemcpyBatchAttr;

typedef struct {
    uint8_t data[128];
} aclrtMemFabricHandle;

typedef struct aclrtMallocConfig aclrtMallocConfig; /* opaque here: only NULL is passed */

static_assert(sizeof(aclError) == 4, "aclError is a 4-byte integer");
static_assert(sizeof(aclrtMemcpyKind) == 4, "enumerations are 4-byte integers");
static_assert(sizeof(aclrtMemLocation) == 8, "memory location");
static_assert(offsetof(aclrtMemLocation, id) == 0 && offsetof(aclrtMemLocation, type) == 4, "memory location");
static_assert(sizeof(aclrtPtrAttributes) == 28, "pointer attributes");
static_assert(offsetof(aclrtPtrAttributes, location) == 0 && offsetof(aclrtPtrAttributes, pageSize) == 8 &&
                  offsetof(aclrtPtrAttributes, rsv) == 12,
              "pointer attributes");
static_assert(sizeof(aclrtPhysicalMemProp) == 32, "physical memory property");
static_assert(offsetof(aclrtPhysicalMemProp, handleType) == 0 && offsetof(aclrtPhysicalMemProp, allocationType) == 4 &&
                  offsetof(aclrtPhysicalMemProp, memAttr) == 8 && offsetof(aclrtPhysicalMemProp, location) == 12 &&
                  offsetof(aclrtPhysicalMemProp, reserve) == 24,
              "physical memory property");
static_assert(sizeof(aclrtMemAccessDesc) == 24, "access descriptor");
static_assert(offsetof(aclrtMemAccessDesc, flags) == 0 && offsetof(aclrtMemAccessDesc, location) == 4 &&
                  offsetof(aclrtMemAccessDesc, rsv) == 12,
              "access descriptor");
static_assert(sizeof(aclrtMemcpyBatchAttr) == 32, "batch copy attribute");
static_assert(offsetof(aclrtMemcpyBatchAttr, dstLoc) == 0 && offsetof(aclrtMemcpyBatchAttr, srcLoc) == 8 &&
                  offsetof(aclrtMemcpyBatchAttr, rsv) == 16,
              "batch copy attribute");
static_assert(sizeof(aclrtMemFabricHandle) == 128, "fabric handle");

#ifdef __cplusplus
}
#endif
#endif

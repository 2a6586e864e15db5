"""The C API of CANN and the function table of a provider, as the core sees them.

Declarations only. Calls go through a table, ``provider.acl.aclrtMalloc(...)``; a slot of an optional list is
NULL where the provider lacks the symbol, see ``llm_datadist/ldd_provider.h``.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status

cdef extern from "acl/acl_base_rt.h" nogil:
    ctypedef int aclError
    ctypedef void* aclrtContext
    ctypedef void* aclrtStream
    ctypedef void* aclrtEvent
    enum:
        ACL_SUCCESS
        ACL_ERROR_INVALID_PARAM
        ACL_ERROR_UNINITIALIZE
        ACL_ERROR_REPEAT_INITIALIZE
        ACL_ERROR_REPEAT_FINALIZE
        ACL_ERROR_BAD_ALLOC
        ACL_ERROR_RT_PARAM_INVALID
        ACL_ERROR_RT_INVALID_DEVICEID
        ACL_ERROR_RT_CONTEXT_NULL
        ACL_ERROR_RT_STREAM_CONTEXT
        ACL_ERROR_RT_INVALID_HANDLE
        ACL_ERROR_RT_WAIT_TIMEOUT
        ACL_ERROR_RT_TASK_TIMEOUT
        ACL_ERROR_RT_DEVICE_TASK_ABORT
        ACL_ERROR_RT_STREAM_ABORT
        ACL_ERROR_RT_FEATURE_NOT_SUPPORT
        ACL_ERROR_RT_MEMORY_ALLOCATION
        ACL_ERROR_RT_NO_DEVICE
        ACL_ERROR_RT_RESOURCE_ALLOC_FAIL
        ACL_ERROR_RT_NO_STREAM_RESOURCE
        ACL_ERROR_RT_DEVICE_OOM
        ACL_ERROR_RT_INTERNAL_ERROR
        ACL_ERROR_RT_SYSTEM_DMA_ERROR
        ACL_ERROR_RT_STREAM_SYNC_TIMEOUT
        ACL_ERROR_RT_EVENT_SYNC_TIMEOUT
        ACL_ERROR_RT_DEVICE_MEM_ERROR
        ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR
        ACL_ERROR_RT_SUSPECT_DEVICE_MEM_ERROR
        ACL_ERROR_RT_LINK_ERROR
        ACL_ERROR_RT_SUSPECT_REMOTE_ERROR
        ACL_ERROR_RT_DRV_INTERNAL_ERROR
        ACL_ERROR_RT_HOST_MEMORY_ALREADY_REGISTERED
        ACL_ERROR_RT_HOST_MEMORY_NOT_REGISTERED
        ACL_CONTINUE_ON_FAILURE
        ACL_STOP_ON_FAILURE
        ACL_DEV_ATTR_SUPER_POD_DEVICE_ID
        ACL_DEV_ATTR_SUPER_POD_SERVER_ID
        ACL_DEV_ATTR_SUPER_POD_ID
    ctypedef enum aclrtMemcpyKind:
        ACL_MEMCPY_HOST_TO_HOST
        ACL_MEMCPY_HOST_TO_DEVICE
        ACL_MEMCPY_DEVICE_TO_HOST
        ACL_MEMCPY_DEVICE_TO_DEVICE
        ACL_MEMCPY_DEFAULT
    ctypedef enum aclrtMemMallocPolicy:
        ACL_MEM_MALLOC_HUGE_FIRST
        ACL_MEM_MALLOC_HUGE_ONLY
        ACL_MEM_MALLOC_NORMAL_ONLY
        ACL_MEM_TYPE_HIGH_BAND_WIDTH
    ctypedef enum aclrtEventRecordedStatus:
        ACL_EVENT_RECORDED_STATUS_NOT_READY
        ACL_EVENT_RECORDED_STATUS_COMPLETE
    ctypedef enum aclrtStreamStatus:
        ACL_STREAM_STATUS_COMPLETE
        ACL_STREAM_STATUS_NOT_READY
    ctypedef enum aclrtRunMode:
        ACL_DEVICE
        ACL_HOST
    ctypedef enum aclrtMemLocationType:
        ACL_MEM_LOCATION_TYPE_HOST
        ACL_MEM_LOCATION_TYPE_DEVICE
        ACL_MEM_LOCATION_TYPE_UNREGISTERED
    ctypedef enum aclrtHostRegisterType:
        ACL_HOST_REGISTER_MAPPED
    ctypedef enum aclrtMemAttr:
        ACL_DDR_MEM
        ACL_HBM_MEM
    ctypedef struct aclrtMemLocation:
        uint32_t id
        aclrtMemLocationType type
    ctypedef struct aclrtPtrAttributes:
        aclrtMemLocation location
        uint32_t pageSize
    ctypedef struct aclrtMemcpyBatchAttr:
        aclrtMemLocation dstLoc
        aclrtMemLocation srcLoc
    ctypedef struct aclrtMallocConfig:
        pass

cdef extern from "hcomm/hcomm_types.h" nogil:
    ctypedef void* MemHandle
    ctypedef enum CommMemType:
        COMM_MEM_TYPE_INVALID
        COMM_MEM_TYPE_DEVICE
        COMM_MEM_TYPE_HOST
    ctypedef enum CommProtocol:
        COMM_PROTOCOL_RESERVED
        COMM_PROTOCOL_HCCS
        COMM_PROTOCOL_ROCE
        COMM_PROTOCOL_PCIE
        COMM_PROTOCOL_SIO
        COMM_PROTOCOL_UBC_CTP
        COMM_PROTOCOL_UBC_TP
        COMM_PROTOCOL_UB_MEM
        COMM_PROTOCOL_UBOE
        COMM_PROTOCOL_HCCS_ONLY
        COMM_PROTOCOL_UBG
    ctypedef enum CommAddrType:
        COMM_ADDR_TYPE_RESERVED
        COMM_ADDR_TYPE_IP_V4
        COMM_ADDR_TYPE_IP_V6
        COMM_ADDR_TYPE_ID
        COMM_ADDR_TYPE_EID
    ctypedef enum EndpointLocType:
        ENDPOINT_LOC_TYPE_RESERVED
        ENDPOINT_LOC_TYPE_DEVICE
        ENDPOINT_LOC_TYPE_HOST
    ctypedef struct CommMem:
        CommMemType type
        void* addr
        uint64_t size
    ctypedef struct in_addr:
        pass
    ctypedef struct in6_addr:
        pass
    ctypedef struct CommAddr:                  # a union after `type`: set one of them
        CommAddrType type
        uint8_t raws[36]
        in_addr addr
        in6_addr addr6
        uint32_t id
        uint8_t eid[16]
    ctypedef struct EndpointLocOnDevice "__typeof__(((EndpointLoc *)0)->device)":
        uint32_t devPhyId
        uint32_t superDevId
        uint32_t serverIdx
        uint32_t superPodIdx
    ctypedef struct EndpointLocOnHost "__typeof__(((EndpointLoc *)0)->host)":
        uint32_t id
    ctypedef struct EndpointLoc:               # a union after `locType`: set one of them
        EndpointLocType locType
        uint8_t raws[60]
        EndpointLocOnDevice device
        EndpointLocOnHost host
    ctypedef struct EndpointDesc:
        CommProtocol protocol
        CommAddr commAddr
        EndpointLoc loc
        uint8_t raws[52]
    void EndpointDescInit(EndpointDesc* endpoint) noexcept

cdef extern from "cs/hixl_cs.h" nogil:
    ctypedef uint32_t HixlStatus
    ctypedef void* HixlServerHandle
    ctypedef void* HixlClientHandle
    ctypedef void* CompleteHandle
    enum:
        HIXL_SUCCESS
        HIXL_PARAM_INVALID
        HIXL_TIMEOUT
        HIXL_NOT_CONNECTED
        HIXL_ALREADY_CONNECTED
        HIXL_NOTIFY_FAILED
        HIXL_UNSUPPORTED
        HIXL_RESOURCE_EXHAUSTED
        HIXL_FAILED
    ctypedef enum HixlCompleteStatus:
        HIXL_COMPLETE_STATUS_WAITING
        HIXL_COMPLETE_STATUS_COMPLETED
        HIXL_COMPLETE_STATUS_TIMEOUT
        HIXL_COMPLETE_STATUS_FAILED
    ctypedef struct HixlServerConfig:
        const char* global_resource_config
    ctypedef struct HixlClientConfig:
        const char* global_resource_config
    ctypedef struct HixlServerDesc:
        const EndpointDesc* endpoint_list
        const char* server_ip
        uint32_t server_port
        uint32_t endpoint_list_num
    ctypedef struct HixlClientDesc:
        const EndpointDesc* local_endpoint
        const EndpointDesc* remote_endpoint
        const char* server_ip
        uint32_t server_port
        uint8_t tc
        uint8_t sl
    ctypedef struct HixlOneSideOpDesc:
        void* remote_buf
        void* local_buf
        uint64_t len

cdef extern from "llm_datadist/ldd_ext.h" nogil:
    enum:
        LDD_CAP_LATE_REGISTRATION
        LDD_CAP_ANY_LOCAL
        LDD_CAP_WAIT
        LDD_CAP_CANCEL
        LDD_CAP_DROP_PEER
        LDD_CAP_FETCH
        LDD_CAP_ADMIT
        LDD_RIGHT_READ
        LDD_RIGHT_WRITE
        LDD_FETCH_MAX_REQUEST_BYTES
        LDD_FETCH_OPEN
        LDD_FETCH_CONFIRMED
        LDD_FETCH_DONE
    ctypedef struct LddPiece:
        uint64_t addr
        uint64_t bytes
    ctypedef struct LddFetchSource:
        const LddPiece* pieces
        size_t num_pieces
        int32_t never_unmapped
        void* ticket
    ctypedef struct LddFetchHooks:
        int32_t (*begin)(void* context, const uint8_t* token, const void* request, size_t request_bytes,
            uint64_t num_bytes, void* fetch, LddFetchSource* source, char* text, size_t text_size) noexcept nogil
        void (*look)(void* context) noexcept nogil
        void (*end)(void* context, void* ticket) noexcept nogil
    ctypedef struct LddFetchReply:
        int32_t status
        char text[320]

cdef extern from "llm_datadist/ldd_provider.h" nogil:
    ctypedef struct ldd_acl_table:
        aclError (*aclrtGetDeviceCount)(uint32_t* out_count) noexcept nogil
        aclError (*aclrtSetDevice)(int32_t device) noexcept nogil
        aclError (*aclrtResetDevice)(int32_t device) noexcept nogil
        aclError (*aclrtGetDevice)(int32_t* out_device) noexcept nogil
        aclError (*aclrtCreateContext)(aclrtContext* out_context, int32_t device) noexcept nogil
        aclError (*aclrtDestroyContext)(aclrtContext context) noexcept nogil
        aclError (*aclrtSetCurrentContext)(aclrtContext context) noexcept nogil
        aclError (*aclrtGetCurrentContext)(aclrtContext* out_context) noexcept nogil
        aclError (*aclrtCreateStream)(aclrtStream* out_stream) noexcept nogil
        aclError (*aclrtDestroyStream)(aclrtStream stream) noexcept nogil
        aclError (*aclrtSynchronizeStream)(aclrtStream stream) noexcept nogil
        aclError (*aclrtSynchronizeStreamWithTimeout)(aclrtStream stream, int32_t timeout_ms) noexcept nogil
        aclError (*aclrtMalloc)(void** out_ptr, size_t size, aclrtMemMallocPolicy policy) noexcept nogil
        aclError (*aclrtFree)(void* ptr) noexcept nogil
        aclError (*aclrtMallocHost)(void** out_ptr, size_t size) noexcept nogil
        aclError (*aclrtFreeHost)(void* ptr) noexcept nogil
        aclError (*aclrtMemset)(void* ptr, size_t max_count, int32_t value, size_t count) noexcept nogil
        aclError (*aclrtMemcpy)(void* dst, size_t dst_max, const void* src, size_t count,
            aclrtMemcpyKind kind) noexcept nogil
        aclError (*aclrtMemcpyAsync)(void* dst, size_t dst_max, const void* src, size_t count, aclrtMemcpyKind kind,
            aclrtStream stream) noexcept nogil
        aclError (*aclInit)(const char* config_path) noexcept nogil
        aclError (*aclFinalizeReference)(uint64_t* out_count) noexcept nogil
        const char* (*aclGetRecentErrMsg)() noexcept nogil
        aclError (*aclrtGetVersion)(int32_t* out_major, int32_t* out_minor, int32_t* out_patch) noexcept nogil
        const char* (*aclrtGetSocName)() noexcept nogil
        aclError (*aclrtGetRunMode)(aclrtRunMode* out_mode) noexcept nogil
        aclError (*aclrtGetLogicDevIdByUserDevId)(int32_t user_id, int32_t* out_logic_id) noexcept nogil
        aclError (*aclrtGetPhyDevIdByLogicDevId)(int32_t logic_id, int32_t* out_physical_id) noexcept nogil
        aclError (*aclrtGetDeviceInfo)(uint32_t device, int attribute, int64_t* out_value) noexcept nogil
        aclError (*aclrtDeviceCanAccessPeer)(int32_t* out_can_access, int32_t device, int32_t peer) noexcept nogil
        aclError (*aclrtDeviceEnablePeerAccess)(int32_t peer, uint32_t flags) noexcept nogil
        aclError (*aclrtSynchronizeDevice)() noexcept nogil
        aclError (*aclrtSynchronizeDeviceWithTimeout)(int32_t timeout_ms) noexcept nogil
        aclError (*aclrtCtxGetCurrentDefaultStream)(aclrtStream* out_stream) noexcept nogil
        aclError (*aclrtCreateStreamWithConfig)(aclrtStream* out_stream, uint32_t priority,
            uint32_t flags) noexcept nogil
        aclError (*aclrtDestroyStreamForce)(aclrtStream stream) noexcept nogil
        aclError (*aclrtStreamQuery)(aclrtStream stream, aclrtStreamStatus* out_status) noexcept nogil
        aclError (*aclrtStreamAbort)(aclrtStream stream) noexcept nogil
        aclError (*aclrtSetStreamFailureMode)(aclrtStream stream, uint64_t mode) noexcept nogil
        aclError (*aclrtStreamWaitEvent)(aclrtStream stream, aclrtEvent event) noexcept nogil
        aclError (*aclrtCreateEvent)(aclrtEvent* out_event) noexcept nogil
        aclError (*aclrtCreateEventExWithFlag)(aclrtEvent* out_event, uint32_t flags) noexcept nogil
        aclError (*aclrtDestroyEvent)(aclrtEvent event) noexcept nogil
        aclError (*aclrtRecordEvent)(aclrtEvent event, aclrtStream stream) noexcept nogil
        aclError (*aclrtQueryEventStatus)(aclrtEvent event, aclrtEventRecordedStatus* out_status) noexcept nogil
        aclError (*aclrtSynchronizeEvent)(aclrtEvent event) noexcept nogil
        aclError (*aclrtSynchronizeEventWithTimeout)(aclrtEvent event, int32_t timeout_ms) noexcept nogil
        aclError (*aclrtMallocWithCfg)(void** out_ptr, size_t size, aclrtMemMallocPolicy policy,
            aclrtMallocConfig* config) noexcept nogil
        aclError (*aclrtMemcpyBatch)(void** dsts, size_t* dst_maxs, void** srcs, size_t* sizes, size_t num_copies,
            aclrtMemcpyBatchAttr* attrs, size_t* attr_indexes, size_t num_attrs, size_t* out_fail_index) noexcept nogil
        aclError (*aclrtMemcpyBatchAsync)(void** dsts, size_t* dst_maxs, void** srcs, size_t* sizes,
            size_t num_copies, aclrtMemcpyBatchAttr* attrs, size_t* attr_indexes, size_t num_attrs,
            size_t* out_fail_index, aclrtStream stream) noexcept nogil
        aclError (*aclrtGetMemInfo)(aclrtMemAttr attr, size_t* out_free, size_t* out_total) noexcept nogil
        aclError (*aclrtPointerGetAttributes)(const void* ptr, aclrtPtrAttributes* out_attributes) noexcept nogil
        aclError (*aclrtMemGetAddressRange)(void* ptr, void** out_base, size_t* out_size) noexcept nogil
        aclError (*aclrtHostRegister)(void* ptr, uint64_t size, aclrtHostRegisterType type,
            void** out_device_ptr) noexcept nogil
        aclError (*aclrtHostUnregister)(void* ptr) noexcept nogil

    ctypedef struct ldd_hixl_table:
        HixlStatus (*HixlCSServerCreate)(const HixlServerDesc* desc, const HixlServerConfig* config,
            HixlServerHandle* out_server) noexcept nogil
        HixlStatus (*HixlCSServerRegMem)(HixlServerHandle server, const char* tag, const CommMem* mem,
            MemHandle* out_handle) noexcept nogil
        HixlStatus (*HixlCSServerListen)(HixlServerHandle server, uint32_t backlog) noexcept nogil
        HixlStatus (*HixlCSServerUnregMem)(HixlServerHandle server, MemHandle handle) noexcept nogil
        HixlStatus (*HixlCSServerDestroy)(HixlServerHandle server) noexcept nogil
        HixlStatus (*HixlCSClientCreate)(const HixlClientDesc* desc, const HixlClientConfig* config,
            HixlClientHandle* out_client) noexcept nogil
        HixlStatus (*HixlCSClientRegMem)(HixlClientHandle client, const char* tag, const CommMem* mem,
            MemHandle* out_handle) noexcept nogil
        HixlStatus (*HixlCSClientUnregMem)(HixlClientHandle client, MemHandle handle) noexcept nogil
        HixlStatus (*HixlCSClientConnect)(HixlClientHandle client, uint32_t timeout_ms) noexcept nogil
        HixlStatus (*HixlCSClientGetRemoteMem)(HixlClientHandle client, CommMem** out_list, char*** out_tags,
            uint32_t* out_count, uint32_t timeout_ms) noexcept nogil
        HixlStatus (*HixlCSClientBatchPutAsync)(HixlClientHandle client, uint32_t num_ops,
            const HixlOneSideOpDesc* ops, CompleteHandle* out_handle) noexcept nogil
        HixlStatus (*HixlCSClientBatchGetAsync)(HixlClientHandle client, uint32_t num_ops,
            const HixlOneSideOpDesc* ops, CompleteHandle* out_handle) noexcept nogil
        HixlStatus (*HixlCSClientBatchPutSync)(HixlClientHandle client, uint32_t num_ops,
            const HixlOneSideOpDesc* ops, uint32_t timeout_ms) noexcept nogil
        HixlStatus (*HixlCSClientBatchGetSync)(HixlClientHandle client, uint32_t num_ops,
            const HixlOneSideOpDesc* ops, uint32_t timeout_ms) noexcept nogil
        HixlStatus (*HixlCSClientQueryCompleteStatus)(HixlClientHandle client, CompleteHandle handle,
            HixlCompleteStatus* out_status) noexcept nogil
        HixlStatus (*HixlCSClientDestroy)(HixlClientHandle client) noexcept nogil

    ctypedef struct ldd_ext_table:
        uint32_t (*LddCapabilities)() noexcept nogil
        const char* (*LddLastError)() noexcept nogil
        HixlStatus (*LddClientWait)(HixlClientHandle client, CompleteHandle handle, int64_t timeout_ns,
            HixlCompleteStatus* status) noexcept nogil
        HixlStatus (*LddClientCancel)(HixlClientHandle client, CompleteHandle handle) noexcept nogil
        HixlStatus (*LddServerRestrict)(HixlServerHandle server) noexcept nogil
        HixlStatus (*LddServerAdmitPeer)(HixlServerHandle server, const uint8_t* token, uint32_t rights) noexcept nogil
        HixlStatus (*LddServerDropPeer)(HixlServerHandle server, const uint8_t* token) noexcept nogil
        HixlStatus (*LddServerSetFetch)(HixlServerHandle server, const LddFetchHooks* hooks,
            void* context) noexcept nogil
        HixlStatus (*LddClientFetchAsync)(HixlClientHandle client, const void* request, uint32_t request_bytes,
            uint32_t num_ops, const HixlOneSideOpDesc* ops, LddFetchReply* reply,
            CompleteHandle* out_handle) noexcept nogil
        int32_t (*LddFetchConfirmed)(void* fetch) noexcept nogil
        HixlStatus (*LddClientPaths)(HixlClientHandle client, char* text, size_t size) noexcept nogil

    ctypedef struct ldd_provider:
        ldd_acl_table acl
        ldd_hixl_table hixl
        ldd_ext_table ext
        uint32_t caps
        char name[16]
        char acl_path[256]
        char hixl_path[256]
        char version[32]

    ldd_status ldd_provider_open(const char* which, const char* host_library_path, ldd_provider** out,
                                 ldd_detail* detail) noexcept
    void ldd_provider_close(ldd_provider* provider) noexcept


cdef class Provider:
    cdef ldd_provider* table                   # whole and valid as long as this object lives
    cdef readonly str why_not_cann

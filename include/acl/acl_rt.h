/*
 * Functions of the acl runtime, restated: the same symbols and parameter order as in CANN.
 *
 * Every function returns an aclError (0 is success) unless its declaration says otherwise; parameters
 * named out_* receive results. A call on memory, streams or events needs a current context in the calling
 * thread (aclrtSetDevice or aclrtSetCurrentContext), otherwise it answers ACL_ERROR_RT_CONTEXT_NULL.
 * Timeouts are milliseconds; -1 waits for ever.
 */
#ifndef LLM_DATADIST_ACL_RT_H
#define LLM_DATADIST_ACL_RT_H

#include "acl/acl_base_rt.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Process and device */
aclError aclInit(const char *config_path);
aclError aclFinalize(void);
aclError aclFinalizeReference(uint64_t *out_count);
const char *aclGetRecentErrMsg(void);
aclError aclrtGetVersion(int32_t *out_major, int32_t *out_minor, int32_t *out_patch);
const char *aclrtGetSocName(void);
aclError aclrtGetRunMode(aclrtRunMode *out_mode);
aclError aclrtGetDeviceCount(uint32_t *out_count);
aclError aclrtSetDevice(int32_t device);
aclError aclrtResetDevice(int32_t device);
aclError aclrtResetDeviceForce(int32_t device);
aclError aclrtGetDevice(int32_t *out_device);
aclError aclrtGetLogicDevIdByUserDevId(int32_t user_id, int32_t *out_logic_id);
aclError aclrtGetPhyDevIdByLogicDevId(int32_t logic_id, int32_t *out_physical_id);
aclError aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *out_value);
aclError aclrtDeviceCanAccessPeer(int32_t *out_can_access, int32_t device, int32_t peer);
aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags);
aclError aclrtSynchronizeDevice(void);
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms);

/* Contexts: one is current per thread */
aclError aclrtCreateContext(aclrtContext *out_context, int32_t device);
aclError aclrtDestroyContext(aclrtContext context);
aclError aclrtSetCurrentContext(aclrtContext context);
aclError aclrtGetCurrentContext(aclrtContext *out_context);
aclError aclrtCtxGetCurrentDefaultStream(aclrtStream *out_stream);

/* Streams */
aclError aclrtCreateStream(aclrtStream *out_stream);
aclError aclrtCreateStreamWithConfig(aclrtStream *out_stream, uint32_t priority, uint32_t flags);
aclError aclrtDestroyStream(aclrtStream stream);
aclError aclrtDestroyStreamForce(aclrtStream stream);
aclError aclrtSynchronizeStream(aclrtStream stream);
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout_ms);
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *out_status);
aclError aclrtStreamAbort(aclrtStream stream);
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode);
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event);

/* Events */
aclError aclrtCreateEvent(aclrtEvent *out_event);
aclError aclrtCreateEventExWithFlag(aclrtEvent *out_event, uint32_t flags);
aclError aclrtDestroyEvent(aclrtEvent event);
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream);
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *out_status);
aclError aclrtSynchronizeEvent(aclrtEvent event);
aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout_ms);

/* Memory */
aclError aclrtMalloc(void **out_ptr, size_t size, aclrtMemMallocPolicy policy);
aclError aclrtMallocWithCfg(void **out_ptr, size_t size, aclrtMemMallocPolicy policy, aclrtMallocConfig *config);
aclError aclrtFree(void *ptr);
aclError aclrtMallocHost(void **out_ptr, size_t size);
aclError aclrtFreeHost(void *ptr);
aclError aclrtMemset(void *ptr, size_t max_count, int32_t value, size_t count);
aclError aclrtMemcpy(void *dst, size_t dst_max, const void *src, size_t count, aclrtMemcpyKind kind);
aclError aclrtMemcpyAsync(void *dst, size_t dst_max, const void *src, size_t count, aclrtMemcpyKind kind,
                          aclrtStream stream);
aclError aclrtMemcpyBatch(void **dsts, size_t *dst_maxs, void **srcs, size_t *sizes, size_t num_copies,
                          aclrtMemcpyBatchAttr *attrs, size_t *attr_indexes, size_t num_attrs, size_t *out_fail_index);
aclError aclrtMemcpyBatchAsync(void **dsts, size_t *dst_maxs, void **srcs, size_t *sizes, size_t num_copies,
                               aclrtMemcpyBatchAttr *attrs, size_t *attr_indexes, size_t num_attrs,
                               size_t *out_fail_index, aclrtStream stream);
aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *out_free, size_t *out_total);
aclError aclrtPointerGetAttributes(const void *ptr, aclrtPtrAttributes *out_attributes);
aclError aclrtMemGetAddressRange(void *ptr, void **out_base, size_t *out_size);
aclError aclrtHostRegister(void *ptr, uint64_t size, aclrtHostRegisterType type, void **out_device_ptr);
aclError aclrtHostUnregister(void *ptr);

/* Sharing device memory between processes of one host (optional in a provider) */
aclError aclrtIpcMemGetExportKey(void *base, size_t size, char *key, size_t key_length, uint64_t flags);
aclError aclrtIpcMemSetImportPid(const char *key, int32_t *pids, size_t num_pids);
aclError aclrtIpcMemImportByKey(void **out_ptr, const char *key, uint64_t flags);
aclError aclrtIpcMemClose(const char *key);
aclError aclrtDeviceGetBareTgid(int32_t *out_pid);

/* Physical memory and shareable handles (optional in a provider) */
aclError aclrtMallocPhysical(aclrtDrvMemHandle *out_handle, size_t size, const aclrtPhysicalMemProp *prop,
                             uint64_t flags);
aclError aclrtFreePhysical(aclrtDrvMemHandle handle);
aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *prop, int option, size_t *out_granularity);
aclError aclrtReserveMemAddress(void **out_ptr, size_t size, size_t alignment, void *hint, uint64_t flags);
aclError aclrtReserveMemAddressNoUCMemory(void **out_ptr, size_t size, size_t alignment, void *hint, uint64_t flags);
aclError aclrtReleaseMemAddress(void *ptr);
aclError aclrtMapMem(void *ptr, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t flags);
aclError aclrtUnmapMem(void *ptr);
aclError aclrtMemSetAccess(void *ptr, size_t size, aclrtMemAccessDesc *descs, size_t num_descs);
aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, int handle_type, uint64_t flags,
                                         uint64_t *out_shareable);
aclError aclrtMemImportFromShareableHandle(uint64_t shareable, int32_t device, aclrtDrvMemHandle *out_handle);
aclError aclrtMemSetPidToShareableHandle(uint64_t shareable, int32_t *pids, size_t num_pids);
aclError aclrtMemExportToShareableHandleV2(aclrtDrvMemHandle handle, uint64_t flags, int share_type,
                                           void *out_shareable);
aclError aclrtMemImportFromShareableHandleV2(void *shareable, int share_type, uint64_t flags,
                                             aclrtDrvMemHandle *out_handle);

#ifdef __cplusplus
}
#endif
#endif

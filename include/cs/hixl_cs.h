/*
 * The HIXL client/server interface: one-sided reads and writes of memory a peer registered.
 *
 * A server registers memory and listens; a client registers its own memory, connects, and then gets (remote
 * to local) or puts (local to remote) batches. Parameters named out_* receive results.
 */
#ifndef LLM_DATADIST_HIXL_CS_H
#define LLM_DATADIST_HIXL_CS_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#include "hcomm/hcomm_res_defs.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef uint32_t HixlStatus;

enum {
    HIXL_SUCCESS = 0,
    HIXL_PARAM_INVALID = 103900,
    HIXL_TIMEOUT = 103901,
    HIXL_NOT_CONNECTED = 103902,
    HIXL_ALREADY_CONNECTED = 103903,
    HIXL_NOTIFY_FAILED = 103904,
    HIXL_UNSUPPORTED = 103905,
    HIXL_RESOURCE_EXHAUSTED = 203900,
    HIXL_FAILED = 503900
};

typedef void *HixlServerHandle;
typedef void *HixlClientHandle;
typedef void *CompleteHandle;

typedef enum {
    HIXL_COMPLETE_STATUS_WAITING = 0,
    HIXL_COMPLETE_STATUS_COMPLETED = 1,
    HIXL_COMPLETE_STATUS_TIMEOUT = 2, /* reserved */
    HIXL_COMPLETE_STATUS_FAILED = 3
} HixlCompleteStatus;

/* JSON text, NULL or "" for the defaults. */
typedef struct {
    const char *global_resource_config;
    uint8_t reserved[120];
} HixlServerConfig;

typedef struct {
    const char *global_resource_config;
    uint8_t reserved[120];
} HixlClientConfig;

typedef struct {
    const EndpointDesc *endpoint_list;
    const char *server_ip;
    uint32_t server_port; /* 0 does not listen */
    uint32_t endpoint_list_num;
    uint8_t reserved[104];
} HixlServerDesc;

typedef struct {
    const EndpointDesc *local_endpoint;
    const EndpointDesc *remote_endpoint;
    const char *server_ip;
    uint32_t server_port;
    uint8_t tc;
    uint8_t sl;
    uint8_t reserved[98];
} HixlClientDesc;

typedef struct {
    void *remote_buf;
    void *local_buf;
    uint64_t len;
} HixlOneSideOpDesc;

static_assert(sizeof(HixlServerConfig) == 128 && offsetof(HixlServerConfig, global_resource_config) == 0 &&
                  offsetof(HixlServerConfig, reserved) == 8,
              "server config");
static_assert(sizeof(HixlClientConfig) == 128 && offsetof(HixlClientConfig, global_resource_config) == 0 &&
                  offsetof(HixlClientConfig, reserved) == 8,
              "client config");
static_assert(sizeof(HixlServerDesc) == 128, "server description");
static_assert(offsetof(HixlServerDesc, endpoint_list) == 0 && offsetof(HixlServerDesc, server_ip) == 8 &&
                  offsetof(HixlServerDesc, server_port) == 16 && offsetof(HixlServerDesc, endpoint_list_num) == 20 &&
                  offsetof(HixlServerDesc, reserved) == 24,
              "server description");
static_assert(sizeof(HixlClientDesc) == 128, "client description");
static_assert(offsetof(HixlClientDesc, local_endpoint) == 0 && offsetof(HixlClientDesc, remote_endpoint) == 8 &&
                  offsetof(HixlClientDesc, server_ip) == 16 && offsetof(HixlClientDesc, server_port) == 24 &&
                  offsetof(HixlClientDesc, tc) == 28 && offsetof(HixlClientDesc, sl) == 29 &&
                  offsetof(HixlClientDesc, reserved) == 30,
              "client description");
static_assert(sizeof(HixlOneSideOpDesc) == 24, "operation description");
static_assert(offsetof(HixlOneSideOpDesc, remote_buf) == 0 && offsetof(HixlOneSideOpDesc, local_buf) == 8 &&
                  offsetof(HixlOneSideOpDesc, len) == 16,
              "operation description");

HixlStatus HixlCSServerCreate(const HixlServerDesc *desc, const HixlServerConfig *config, HixlServerHandle *out_server);
HixlStatus HixlCSServerRegMem(HixlServerHandle server, const char *tag, const CommMem *mem, MemHandle *out_handle);
HixlStatus HixlCSServerListen(HixlServerHandle server, uint32_t backlog);
HixlStatus HixlCSServerUnregMem(HixlServerHandle server, MemHandle handle);
HixlStatus HixlCSServerDestroy(HixlServerHandle server);

HixlStatus HixlCSClientCreate(const HixlClientDesc *desc, const HixlClientConfig *config, HixlClientHandle *out_client);
HixlStatus HixlCSClientRegMem(HixlClientHandle client, const char *tag, const CommMem *mem, MemHandle *out_handle);
HixlStatus HixlCSClientUnregMem(HixlClientHandle client, MemHandle handle);
HixlStatus HixlCSClientConnect(HixlClientHandle client, uint32_t timeout_ms);

/* The lists belong to the library and last until the next such call on this client. */
HixlStatus HixlCSClientGetRemoteMem(HixlClientHandle client, CommMem **out_list, char ***out_tags, uint32_t *out_count,
                                    uint32_t timeout_ms);

HixlStatus HixlCSClientBatchPutAsync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                     CompleteHandle *out_handle);
HixlStatus HixlCSClientBatchGetAsync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                     CompleteHandle *out_handle);
HixlStatus HixlCSClientBatchPutSync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                    uint32_t timeout_ms);
HixlStatus HixlCSClientBatchGetSync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                    uint32_t timeout_ms);

/* COMPLETED and FAILED end the handle: it must not be queried again. */
HixlStatus HixlCSClientQueryCompleteStatus(HixlClientHandle client, CompleteHandle handle,
                                           HixlCompleteStatus *out_status);
HixlStatus HixlCSClientDestroy(HixlClientHandle client);

#ifdef __cplusplus
}
#endif
#endif

/*
 * Endpoint and memory descriptions of hcomm that the HIXL client/server interface takes, restated.
 *
 * Fill an EndpointDesc with EndpointDescInit before the real values: absent fields are all ones there.
 */
#ifndef LLM_DATADIST_HCOMM_RES_DEFS_H
#define LLM_DATADIST_HCOMM_RES_DEFS_H

#include <assert.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void *MemHandle;

typedef enum { COMM_MEM_TYPE_INVALID = -1, COMM_MEM_TYPE_DEVICE = 0, COMM_MEM_TYPE_HOST = 1 } CommMemType;

typedef enum {
    COMM_PROTOCOL_RESERVED = -1,
    COMM_PROTOCOL_HCCS = 0,
    COMM_PROTOCOL_ROCE = 1,
    COMM_PROTOCOL_PCIE = 2,
    COMM_PROTOCOL_SIO = 3,
    COMM_PROTOCOL_UBC_CTP = 4,
    COMM_PROTOCOL_UBC_TP = 5,
    COMM_PROTOCOL_UB_MEM = 6,
    COMM_PROTOCOL_UBOE = 7,
    COMM_PROTOCOL_HCCS_ONLY = 8,
    COMM_PROTOCOL_UBG = 9
} CommProtocol;

typedef enum {
    COMM_ADDR_TYPE_RESERVED = -1,
    COMM_ADDR_TYPE_IP_V4 = 0,
    COMM_ADDR_TYPE_IP_V6 = 1,
    COMM_ADDR_TYPE_ID = 2,
    COMM_ADDR_TYPE_EID = 3
} CommAddrType;

typedef enum {
    ENDPOINT_LOC_TYPE_RESERVED = -1,
    ENDPOINT_LOC_TYPE_DEVICE = 0,
    ENDPOINT_LOC_TYPE_HOST = 1
} EndpointLocType;

typedef struct {
    CommMemType type;
    void *addr;
    uint64_t size;
} CommMem;

typedef struct {
    CommAddrType type;
    union {
        uint8_t raws[36];
        struct in_addr addr;
        struct in6_addr addr6;
        uint32_t id;
        uint8_t eid[16];
    };
} CommAddr;

typedef struct {
    EndpointLocType locType;
    union {
        uint8_t raws[60];
        struct {
            uint32_t devPhyId;
            uint32_t superDevId;
            uint32_t serverIdx;
            uint32_t superPodIdx;
        } device;
        struct {
            uint32_t id;
        } host;
    };
} EndpointLoc;

typedef struct {
    CommProtocol protocol;
    CommAddr commAddr;
    EndpointLoc loc;
    uint8_t raws[52];
} EndpointDesc;

static inline void EndpointDescInit(EndpointDesc *endpoints, uint32_t count) {
    uint32_t i;
    memset(endpoints, 0xFF, count * sizeof *endpoints);
    for (i = 0; i < count; i++) {
        endpoints[i].protocol = COMM_PROTOCOL_RESERVED;
        endpoints[i].commAddr.type = COMM_ADDR_TYPE_RESERVED;
        endpoints[i].loc.locType = ENDPOINT_LOC_TYPE_RESERVED;
    }
}

static_assert(sizeof(CommMem) == 24, "CommMem");
static_assert(offsetof(CommMem, type) == 0 && offsetof(CommMem, addr) == 8 && offsetof(CommMem, size) == 16, "CommMem");
static_assert(sizeof(CommAddr) == 40, "CommAddr");
static_assert(offsetof(CommAddr, type) == 0 && offsetof(CommAddr, raws) == 4 && offsetof(CommAddr, addr) == 4 &&
                  offsetof(CommAddr, addr6) == 4 && offsetof(CommAddr, id) == 4 && offsetof(CommAddr, eid) == 4,
              "CommAddr");
static_assert(sizeof(EndpointLoc) == 64, "EndpointLoc");
static_assert(offsetof(EndpointLoc, locType) == 0 && offsetof(EndpointLoc, raws) == 4 &&
                  offsetof(EndpointLoc, device) == 4 && offsetof(EndpointLoc, host) == 4,
              "EndpointLoc");
static_assert(sizeof(EndpointDesc) == 160, "EndpointDesc");
static_assert(offsetof(EndpointDesc, protocol) == 0 && offsetof(EndpointDesc, commAddr) == 4 &&
                  offsetof(EndpointDesc, loc) == 44 && offsetof(EndpointDesc, raws) == 108,
              "EndpointDesc");

#ifdef __cplusplus
}
#endif
#endif

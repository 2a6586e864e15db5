/*
 * HIXL's client/server part: contexts, endpoints, registrations, channels and batches, each held against its rules.
 *
 * A batch over a host endpoint is moved within the submitting call; one over a device endpoint by a thread of its
 * own, as late as the test wants.
 */
#include "strict.h"

#include <ctype.h>

enum { MAX_RANGES = 8192, MAX_UNQUERIED = 4096 };

typedef struct {
    uint64_t addr, size;
    void *handle;
} range;

typedef struct {
    range items[MAX_RANGES];
    uint32_t count;
} range_set;

typedef struct batch {
    struct batch *next;
    struct peer_end *client;
    HixlOneSideOpDesc *ops;
    uint32_t num_ops;
    bool put;
    pthread_t thread;
    int status; /* HixlCompleteStatus */
} batch;

/* A server or a client. */
typedef struct peer_end {
    struct peer_end *next;
    void *real;
    bool is_client, connected, on_host, poisoned;
    int32_t device, users;
    long listen_port; /* of a server, 0: whichever is free */
    range_set local, remote;
    batch *batches;
    uint32_t num_unqueried;
} peer_end;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static peer_end *ends;
static _Thread_local char why[200];

static HixlStatus refuse(HixlStatus code, const char *function, const char *text) {
    snprintf(why, sizeof why, "%s: %s", function, text);
    if (getenv("LDD_STRICT_VERBOSE") != NULL) {
        fprintf(stderr, "strict: %s\n", why);
    }
    strict_add("refusals", 1);
    return (HixlStatus)strict_leave((int)code);
}

/* ---- what both ends are created with ---- */

static bool all_ones(const uint8_t *bytes, size_t count) {
    while (count > 0 && bytes[count - 1] == 0xff) {
        count--;
    }
    return count == 0;
}

static const char *bad_endpoint(const EndpointDesc *endpoint, bool is_own) {
    int address = endpoint->commAddr.type, want;
    size_t used;
    switch (endpoint->protocol) {
    case COMM_PROTOCOL_ROCE:
    case COMM_PROTOCOL_UBOE:
        want = address == COMM_ADDR_TYPE_IP_V6 ? COMM_ADDR_TYPE_IP_V6 : COMM_ADDR_TYPE_IP_V4;
        used = address == COMM_ADDR_TYPE_IP_V6 ? 16 : 4;
        break;
    case COMM_PROTOCOL_HCCS:
        want = COMM_ADDR_TYPE_ID;
        used = 4;
        break;
    case COMM_PROTOCOL_UBC_CTP:
    case COMM_PROTOCOL_UBG:
        want = COMM_ADDR_TYPE_EID;
        used = 16;
        break;
    default:
        return "an endpoint's protocol is unknown";
    }
    if (address != want) {
        return "an endpoint's address is not of the kind of its protocol";
    }
    if (!all_ones(endpoint->commAddr.raws + used, sizeof endpoint->commAddr.raws - used) ||
        !all_ones(endpoint->raws, sizeof endpoint->raws)) {
        return "unused bytes of an endpoint are not 0xff";
    }
    if (endpoint->loc.locType == ENDPOINT_LOC_TYPE_HOST) {
        return all_ones(endpoint->loc.raws + 4, sizeof endpoint->loc.raws - 4) ? NULL : "unused bytes of a location";
    }
    if (endpoint->loc.locType != ENDPOINT_LOC_TYPE_DEVICE) {
        return "an endpoint is neither on a device nor on the host";
    }
    if (!all_ones(endpoint->loc.raws + 16, sizeof endpoint->loc.raws - 16)) {
        return "unused bytes of a location are not 0xff";
    }
    if (is_own && (int64_t)endpoint->loc.device.devPhyId != (int64_t)strict_device() + PHYSICAL_OFFSET) {
        return "an endpoint's device is not the physical device that is current";
    }
    if (is_own && endpoint->protocol == COMM_PROTOCOL_HCCS && endpoint->loc.device.superDevId != 0xffffffff &&
        endpoint->loc.device.superDevId != endpoint->loc.device.devPhyId - PHYSICAL_OFFSET + SUPER_DEVICE_OFFSET) {
        return "the super device id is not what the runtime reports";
    }
    if (is_own && endpoint->protocol == COMM_PROTOCOL_HCCS && endpoint->commAddr.id != endpoint->loc.device.devPhyId) {
        return "the address of an HCCS endpoint is not its device";
    }
    return NULL;
}

static long number_of(const char *json, const char *key, long without) {
    const char *at = json != NULL ? strstr(json, key) : NULL;
    if (at == NULL) {
        return without;
    }
    at += strlen(key);
    at += strspn(at, " \t\r\n\":");
    return strtol(at, NULL, 10);
}

static bool number_is_bad(const char *json, const char *key, long min, long max) {
    long value = number_of(json, key, min);
    return value < min || value > max;
}

static const char *bad_config(const char *json) {
    int depth = 0;
    bool in_text = false;
    const char *at;
    if (json == NULL || json[0] == '\0') {
        return NULL;
    }
    for (at = json; *at != '\0'; at++) {
        in_text ^= *at == '"' && (at == json || at[-1] != '\\');
        depth += !in_text && *at == '{';
        depth -= !in_text && *at == '}';
    }
    if (json[strspn(json, " \t\r\n")] != '{' || depth != 0 || in_text) {
        return "global_resource_config is no JSON object";
    }
    if (strstr(json, "ldd_") != NULL) {
        return "global_resource_config has keys nobody here knows";
    }
    if (number_is_bad(json, "listen_port\"", 1, 65535)) {
        return "listen_port is not in 1..65535";
    }
    if (number_is_bad(json, "comm_resource_config.qos\"", 0, 7)) {
        return "qos is not in 0..7";
    }
    return number_is_bad(json, "max_active_channels\"", 1, 1 << 30) ? "max_active_channels is below 1" : NULL;
}

static void note_config(const char *name, const char *json) {
    uint64_t sum = 0;
    for (; json != NULL && *json != '\0'; json++) {
        sum = sum * 131 + (uint8_t)*json;
    }
    strict_note(name, (int64_t)(sum & 0x7fffffff));
}

static peer_end *add_end(void *real, bool is_client, bool on_host) {
    peer_end *end = calloc(1, sizeof *end);
    end->real = real;
    end->is_client = is_client;
    end->on_host = on_host;
    end->device = strict_device();
    pthread_mutex_lock(&lock);
    end->next = ends;
    ends = end;
    pthread_mutex_unlock(&lock);
    return end;
}

static bool port_is_taken(long port) {
    const peer_end *end;
    bool taken = false;
    pthread_mutex_lock(&lock);
    for (end = ends; end != NULL && port != 0; end = end->next) {
        taken |= end->listen_port == port;
    }
    pthread_mutex_unlock(&lock);
    return taken;
}

/* Begin a call on a server or client: the context must be of the device it was created on. NULL: refused with *code. */
static peer_end *begin(const char *function, void *handle, bool is_client, HixlStatus *code) {
    peer_end *end;
    why[0] = '\0';
    if (strict_device() < 0) {
        *code = refuse(ACL_ERROR_RT_CONTEXT_NULL, function, "the thread has no context");
        return NULL;
    }
    pthread_mutex_lock(&lock);
    for (end = ends; end != NULL && !(end == handle && end->is_client == is_client); end = end->next) {
    }
    if (end != NULL && end->users < 0) {
        fprintf(stderr, "strict: %s overlaps the destruction of its handle\n", function);
        abort();
    }
    if (end != NULL && end->device != strict_device()) {
        *code = ACL_ERROR_RT_STREAM_CONTEXT;
        end = NULL;
    } else if (end == NULL) {
        *code = HIXL_PARAM_INVALID;
    } else {
        end->users++;
    }
    pthread_mutex_unlock(&lock);
    if (end == NULL) {
        refuse(*code, function, *code == HIXL_PARAM_INVALID ? "no such handle" : "another device is current");
    }
    return end;
}

static HixlStatus finish(peer_end *end, HixlStatus code) {
    pthread_mutex_lock(&lock);
    end->users--;
    pthread_mutex_unlock(&lock);
    return (HixlStatus)strict_leave((int)code);
}

static HixlStatus reject(peer_end *end, const char *function, const char *text) {
    refuse(HIXL_PARAM_INVALID, function, text);
    return finish(end, HIXL_PARAM_INVALID);
}

/* Take an end out, whom nobody may be using. */
static peer_end *withdraw(const char *function, void *handle, bool is_client, HixlStatus *code) {
    peer_end *end = begin(function, handle, is_client, code), **at;
    if (end == NULL) {
        return NULL;
    }
    pthread_mutex_lock(&lock);
    if (end->users != 1) {
        fprintf(stderr, "strict: %s while %d other calls use the handle\n", function, end->users - 1);
        abort();
    }
    end->users = -1;
    for (at = &ends; *at != end; at = &(*at)->next) {
    }
    *at = end->next;
    pthread_mutex_unlock(&lock);
    return end;
}

/* ---- ranges ---- */

static const char *add_range(range_set *set, const CommMem *mem, void *handle) {
    uint64_t addr = (uint64_t)(uintptr_t)mem->addr;
    uint32_t i;
    for (i = 0; i < set->count; i++) {
        if (addr < set->items[i].addr + set->items[i].size && set->items[i].addr < addr + mem->size) {
            return "memory overlaps a registered range";
        }
    }
    if (set->count == MAX_RANGES) {
        return "too many registrations";
    }
    set->items[set->count++] = (range){addr, mem->size, handle};
    return NULL;
}

static bool holds(const range_set *set, const void *ptr, uint64_t size) {
    uint64_t addr = (uint64_t)(uintptr_t)ptr;
    uint32_t i;
    for (i = 0; i < set->count; i++) {
        if (addr >= set->items[i].addr && addr - set->items[i].addr <= set->items[i].size &&
            size <= set->items[i].size - (addr - set->items[i].addr)) {
            return true;
        }
    }
    return false;
}

static HixlStatus register_memory(const char *function, void *handle, bool is_client, const CommMem *mem,
                                  MemHandle *out) {
    HixlStatus status = HIXL_SUCCESS;
    const char *wrong;
    int code;
    peer_end *end;
    if (strict_enter(function, mem != NULL ? mem->addr : NULL, &code)) {
        return (HixlStatus)code;
    }
    end = begin(function, handle, is_client, &status);
    if (end == NULL) {
        return status;
    }
    strict_sleep_ms(is_client ? strict_ms("LDD_STRICT_REGISTER_MS") : 0);
    if (is_client && end->connected) {
        return reject(end, function, "the client is connected: memory comes too late");
    }
    status = is_client ? strict_real->hixl.HixlCSClientRegMem(end->real, NULL, mem, out)
                       : strict_real->hixl.HixlCSServerRegMem(end->real, NULL, mem, out);
    if (status == HIXL_SUCCESS) {
        wrong = add_range(&end->local, mem, *out);
        if (wrong != NULL) {
            return reject(end, function, wrong);
        }
        strict_add("registrations", 1);
    }
    return finish(end, status);
}

static HixlStatus unregister_memory(const char *function, void *handle, bool is_client, MemHandle mem) {
    HixlStatus status = HIXL_SUCCESS;
    uint32_t i;
    int told;
    bool fails = strict_enter(function, mem, &told);
    peer_end *end = begin(function, handle, is_client, &status);
    if (end == NULL) {
        return status;
    }
    status = is_client ? strict_real->hixl.HixlCSClientUnregMem(end->real, mem)
                       : strict_real->hixl.HixlCSServerUnregMem(end->real, mem);
    for (i = 0; status == HIXL_SUCCESS && i < end->local.count; i++) {
        if (end->local.items[i].handle == mem) {
            end->local.items[i] = end->local.items[--end->local.count];
            strict_add("registrations", -1);
            break;
        }
    }
    return finish(end, fails ? (HixlStatus)told : status);
}

/* ---- server ---- */

EXPORT HixlStatus HixlCSServerCreate(const HixlServerDesc *desc, const HixlServerConfig *config,
                                     HixlServerHandle *out) {
    HixlStatus status;
    const char *wrong;
    void *real = NULL;
    peer_end *end;
    uint32_t i;
    long port;
    int code;
    why[0] = '\0';
    if (strict_enter(__func__, NULL, &code)) {
        return (HixlStatus)code;
    }
    if (strict_device() < 0) {
        return refuse(ACL_ERROR_RT_CONTEXT_NULL, __func__, "the thread has no context");
    }
    if (desc->endpoint_list == NULL || desc->endpoint_list_num == 0) {
        return refuse(HIXL_PARAM_INVALID, __func__, "the list of endpoints is empty");
    }
    for (i = 0; i < desc->endpoint_list_num; i++) {
        wrong = bad_endpoint(&desc->endpoint_list[i], true);
        if (wrong != NULL) {
            return refuse(HIXL_PARAM_INVALID, __func__, wrong);
        }
    }
    wrong = bad_config(config->global_resource_config);
    if (wrong != NULL) {
        return refuse(HIXL_PARAM_INVALID, __func__, wrong);
    }
    port = number_of(config->global_resource_config, "listen_port\"", 0);
    if (port_is_taken(port)) {
        return refuse(HIXL_FAILED, __func__, "another server has the listen_port");
    }
    note_config("server_config", config->global_resource_config);
    strict_note("server_endpoints", desc->endpoint_list_num);
    strict_note("super_device", desc->endpoint_list[0].loc.device.superDevId);
    strict_note("super_pod", desc->endpoint_list[0].loc.device.superPodIdx);
    strict_sleep_ms(strict_ms("LDD_STRICT_SERVER_MS"));
    status = strict_real->hixl.HixlCSServerCreate(desc, config, &real);
    if (status == HIXL_SUCCESS) {
        *out = end = add_end(real, false, false);
        end->listen_port = port;
        strict_add("servers", 1);
    }
    return (HixlStatus)strict_leave((int)status);
}

EXPORT HixlStatus HixlCSServerRegMem(HixlServerHandle server, const char *tag, const CommMem *mem, MemHandle *out) {
    (void)tag;
    return register_memory(__func__, server, false, mem, out);
}

EXPORT HixlStatus HixlCSServerUnregMem(HixlServerHandle server, MemHandle mem) {
    return unregister_memory(__func__, server, false, mem);
}

EXPORT HixlStatus HixlCSServerListen(HixlServerHandle server, uint32_t backlog) {
    HixlStatus status = HIXL_SUCCESS;
    int code;
    peer_end *end;
    if (strict_enter(__func__, server, &code)) {
        return (HixlStatus)code;
    }
    end = begin(__func__, server, false, &status);
    return end == NULL ? status : finish(end, strict_real->hixl.HixlCSServerListen(end->real, backlog));
}

static HixlStatus destroy(peer_end *end, HixlStatus status) {
    strict_add(end->is_client ? "clients" : "servers", -1);
    strict_add("registrations", -(int64_t)end->local.count);
    free(end);
    return (HixlStatus)strict_leave((int)status);
}

EXPORT HixlStatus HixlCSServerDestroy(HixlServerHandle server) {
    HixlStatus status = HIXL_SUCCESS;
    int told;
    bool fails = strict_enter(__func__, server, &told);
    peer_end *end = withdraw(__func__, server, false, &status);
    if (end == NULL) {
        return status;
    }
    status = strict_real->hixl.HixlCSServerDestroy(end->real);
    return destroy(end, fails ? (HixlStatus)told : status);
}

/* ---- client ---- */

EXPORT HixlStatus HixlCSClientCreate(const HixlClientDesc *desc, const HixlClientConfig *config,
                                     HixlClientHandle *out) {
    HixlStatus status;
    const char *wrong;
    void *real = NULL;
    int code;
    why[0] = '\0';
    if (strict_enter(__func__, NULL, &code)) {
        return (HixlStatus)code;
    }
    if (strict_device() < 0) {
        return refuse(ACL_ERROR_RT_CONTEXT_NULL, __func__, "the thread has no context");
    }
    if (desc->local_endpoint == NULL || desc->remote_endpoint == NULL) {
        return refuse(HIXL_PARAM_INVALID, __func__, "an endpoint is missing");
    }
    wrong = bad_endpoint(desc->local_endpoint, true);
    wrong = wrong != NULL ? wrong : bad_endpoint(desc->remote_endpoint, false);
    if (wrong == NULL && desc->local_endpoint->protocol != desc->remote_endpoint->protocol) {
        wrong = "the two endpoints differ in protocol";
    }
    wrong = wrong != NULL ? wrong : bad_config(config->global_resource_config);
    if (wrong != NULL) {
        return refuse(HIXL_PARAM_INVALID, __func__, wrong);
    }
    strict_note("tc", desc->tc);
    strict_note("sl", desc->sl);
    strict_note("protocol", desc->local_endpoint->protocol);
    strict_note("location", desc->local_endpoint->loc.locType);
    note_config("client_config", config->global_resource_config);
    strict_sleep_ms(strict_ms("LDD_STRICT_CREATE_MS"));
    status = strict_real->hixl.HixlCSClientCreate(desc, config, &real);
    if (status == HIXL_SUCCESS) {
        *out = add_end(real, true, desc->local_endpoint->loc.locType == ENDPOINT_LOC_TYPE_HOST);
        strict_add("clients", 1);
    }
    return (HixlStatus)strict_leave((int)status);
}

EXPORT HixlStatus HixlCSClientRegMem(HixlClientHandle client, const char *tag, const CommMem *mem, MemHandle *out) {
    (void)tag;
    return register_memory(__func__, client, true, mem, out);
}

EXPORT HixlStatus HixlCSClientUnregMem(HixlClientHandle client, MemHandle mem) {
    return unregister_memory(__func__, client, true, mem);
}

static HixlStatus read_remote(peer_end *end, CommMem **list, char ***tags, uint32_t *count, uint32_t timeout_ms) {
    HixlStatus status = strict_real->hixl.HixlCSClientGetRemoteMem(end->real, list, tags, count, timeout_ms);
    uint32_t i;
    if (status == HIXL_SUCCESS) {
        end->remote.count = 0;
        for (i = 0; i < *count && i < MAX_RANGES; i++) {
            end->remote.items[end->remote.count++] =
                (range){(uint64_t)(uintptr_t)(*list)[i].addr, (*list)[i].size, NULL};
        }
    }
    return status;
}

EXPORT HixlStatus HixlCSClientConnect(HixlClientHandle client, uint32_t timeout_ms) {
    HixlStatus status = HIXL_SUCCESS;
    CommMem *list;
    char **tags;
    uint32_t count;
    int code;
    peer_end *end;
    if (strict_enter(__func__, client, &code)) {
        return (HixlStatus)code;
    }
    end = begin(__func__, client, true, &status);
    if (end == NULL) {
        return status;
    }
    status = strict_real->hixl.HixlCSClientConnect(end->real, timeout_ms);
    if (status == HIXL_SUCCESS) {
        end->connected = true;
        status = read_remote(end, &list, &tags, &count, timeout_ms);
    }
    return finish(end, status);
}

EXPORT HixlStatus HixlCSClientGetRemoteMem(HixlClientHandle client, CommMem **list, char ***tags, uint32_t *count,
                                           uint32_t timeout_ms) {
    HixlStatus status = HIXL_SUCCESS;
    int code;
    peer_end *end;
    if (strict_enter(__func__, client, &code)) {
        return (HixlStatus)code;
    }
    end = begin(__func__, client, true, &status);
    return end == NULL ? status : finish(end, read_remote(end, list, tags, count, timeout_ms));
}

/* ---- batches ---- */

static HixlStatus move(batch *work) {
    void *real = work->client->real;
    return work->put ? strict_put(real, work->num_ops, work->ops, 60000)
                     : strict_get(real, work->num_ops, work->ops, 60000);
}

static void *run(void *argument) {
    batch *work = argument;
    HixlStatus status;
    strict_sleep_ms(strict_ms("LDD_STRICT_LATE_MS"));
    status = move(work);
    strict_add("moved", 1);
    pthread_mutex_lock(&lock);
    work->status = status == HIXL_SUCCESS ? HIXL_COMPLETE_STATUS_COMPLETED : HIXL_COMPLETE_STATUS_FAILED;
    pthread_mutex_unlock(&lock);
    return NULL;
}

static const char *bad_ops(const peer_end *end, uint32_t num_ops, const HixlOneSideOpDesc *ops) {
    uint32_t i;
    for (i = 0; i < num_ops; i++) {
        if (!holds(&end->local, ops[i].local_buf, ops[i].len)) {
            return "local memory was not registered before the client connected";
        }
        if (!holds(&end->remote, ops[i].remote_buf, ops[i].len)) {
            return "remote memory is unknown to this channel";
        }
    }
    return num_ops == 0 ? "the batch is empty" : NULL;
}

static HixlStatus submit(const char *function, void *client, bool put, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                         CompleteHandle *out) {
    HixlStatus status = HIXL_SUCCESS;
    const char *wrong;
    batch *work;
    int code;
    peer_end *end;
    if (strict_enter(function, client, &code)) {
        return (HixlStatus)code;
    }
    end = begin(function, client, true, &status);
    if (end == NULL) {
        return status;
    }
    if (!end->connected || end->poisoned) {
        refuse(HIXL_FAILED, function, end->poisoned ? "an earlier batch failed" : "not connected");
        return finish(end, HIXL_FAILED);
    }
    wrong = bad_ops(end, num_ops, ops);
    if (wrong != NULL) {
        return reject(end, function, wrong);
    }
    if (end->num_unqueried >= MAX_UNQUERIED) {
        return finish(end, HIXL_RESOURCE_EXHAUSTED);
    }
    work = calloc(1, sizeof *work);
    work->client = end;
    work->ops = malloc(num_ops * sizeof *ops);
    memcpy(work->ops, ops, num_ops * sizeof *ops);
    work->num_ops = num_ops;
    work->put = put;
    if (end->on_host) {
        strict_sleep_ms(strict_ms("LDD_STRICT_SUBMIT_MS"));
        status = move(work);
        strict_add("moved", 1);
        work->status = HIXL_COMPLETE_STATUS_COMPLETED;
    } else {
        pthread_create(&work->thread, NULL, run, work);
    }
    if (status != HIXL_SUCCESS) {
        end->poisoned = true;
        free(work->ops);
        free(work);
        return finish(end, status);
    }
    pthread_mutex_lock(&lock);
    work->next = end->batches;
    end->batches = work;
    end->num_unqueried++;
    pthread_mutex_unlock(&lock);
    *out = work;
    return finish(end, HIXL_SUCCESS);
}

EXPORT HixlStatus HixlCSClientBatchPutAsync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                            CompleteHandle *out) {
    return submit(__func__, client, true, num_ops, ops, out);
}

EXPORT HixlStatus HixlCSClientBatchGetAsync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                            CompleteHandle *out) {
    return submit(__func__, client, false, num_ops, ops, out);
}

/* Unchain a batch and wait for its thread. */
static void end_batch(peer_end *end, batch *work) {
    batch **at;
    pthread_mutex_lock(&lock);
    for (at = &end->batches; *at != work; at = &(*at)->next) {
    }
    *at = work->next;
    end->num_unqueried--;
    pthread_mutex_unlock(&lock);
    if (!end->on_host) {
        pthread_join(work->thread, NULL);
    }
    free(work->ops);
    free(work);
}

EXPORT HixlStatus HixlCSClientQueryCompleteStatus(HixlClientHandle client, CompleteHandle handle,
                                                  HixlCompleteStatus *out) {
    HixlStatus status = HIXL_SUCCESS;
    batch *work;
    int code;
    peer_end *end;
    if (strict_enter(__func__, client, &code)) {
        return (HixlStatus)code;
    }
    end = begin(__func__, client, true, &status);
    if (end == NULL) {
        return status;
    }
    pthread_mutex_lock(&lock);
    for (work = end->batches; work != NULL && work != handle; work = work->next) {
    }
    *out = work != NULL ? work->status : HIXL_COMPLETE_STATUS_FAILED;
    pthread_mutex_unlock(&lock);
    if (work == NULL) {
        return reject(end, __func__, "no such batch: its end was told before");
    }
    if (*out != HIXL_COMPLETE_STATUS_WAITING) {
        end->poisoned |= *out == HIXL_COMPLETE_STATUS_FAILED;
        end_batch(end, work);
    }
    return finish(end, HIXL_SUCCESS);
}

EXPORT HixlStatus HixlCSClientDestroy(HixlClientHandle client) {
    HixlStatus status = HIXL_SUCCESS;
    int told;
    bool fails = strict_enter(__func__, client, &told);
    peer_end *end = withdraw(__func__, client, true, &status);
    if (end == NULL) {
        return status;
    }
    strict_sleep_ms(strict_ms("LDD_STRICT_DESTROY_MS"));
    while (end->batches != NULL) { /* no byte is written after the end of its client */
        end_batch(end, end->batches);
    }
    status = strict_real->hixl.HixlCSClientDestroy(end->real);
    return destroy(end, fails ? (HixlStatus)told : status);
}

/* Life cycle of a client: creation, configuration, connecting, destruction. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "acl/memory.h"
#include "hixl/client/connect.h"
#include "hixl/client/remote.h"
#include "hixl/client/tcp.h"
#include "llm_datadist/ldd_ext.h"

enum { DEFAULT_STREAMS = 2 };

/* LLM_DATADIST_HOST_PATHS: "shm,cma,tcp" or with bars; tcp comes last even when it is not named. */
static HixlStatus parse_paths(hixl_path paths[HIXL_NUM_PATHS], unsigned *num_paths, hixl_error *error) {
    const char *text = getenv("LLM_DATADIST_HOST_PATHS");
    bool listed[HIXL_NUM_PATHS] = {false};
    const char *word;

    *num_paths = 0;
    if (text == NULL || text[0] == '\0') {
        text = "shm,cma,tcp";
    }
    for (word = text; word != NULL;) {
        size_t length = strcspn(word, ",|");
        int path = 0;
        while (path < HIXL_NUM_PATHS &&
               (strlen(hixl_path_names[path]) != length || strncmp(hixl_path_names[path], word, length) != 0)) {
            path++;
        }
        if (path == HIXL_NUM_PATHS) {
            return hixl_fail(error, HIXL_PARAM_INVALID,
                             "LLM_DATADIST_HOST_PATHS='%.100s': unknown path '%.*s'; known: shm, cma, tcp", text,
                             (int)(length < 40 ? length : 40), word);
        }
        if (!listed[path]) {
            listed[path] = true;
            paths[(*num_paths)++] = (hixl_path)path;
        }
        word = word[length] != '\0' ? word + length + 1 : NULL;
    }
    if (!listed[HIXL_PATH_TCP]) {
        paths[(*num_paths)++] = HIXL_PATH_TCP;
    }
    return HIXL_SUCCESS;
}

/* Whether memory is shared with peers on this host follows from the environment; a word that means nothing does not. */
LDD_EXPORT uint32_t LddCapabilities(void) {
    hixl_path paths[HIXL_NUM_PATHS];
    unsigned num_paths, i;
    hixl_error error = {0};
    uint32_t caps = LDD_CAP_LATE_REGISTRATION | LDD_CAP_ANY_LOCAL | LDD_CAP_WAIT | LDD_CAP_CANCEL | LDD_CAP_DROP_PEER |
                    LDD_CAP_FETCH | LDD_CAP_ADMIT;
    parse_paths(paths, &num_paths, &error);
    for (i = 0; i < num_paths; i++) {
        caps |= paths[i] == HIXL_PATH_SHM ? LDD_CAP_SHARED_MEMORY : 0u;
    }
    return caps;
}

/* A count from the environment; absent or empty: *out stays. */
static HixlStatus parse_count(const char *name, unsigned max, unsigned *out, hixl_error *error) {
    const char *text = getenv(name);
    char *end;
    long value;
    if (text == NULL || text[0] == '\0') {
        return HIXL_SUCCESS;
    }
    value = strtol(text, &end, 10);
    if (*end != '\0' || value < 1 || value > (long)max) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "%s='%.40s' is not a number in 1..%u", name, text, max);
    }
    *out = (unsigned)value;
    return HIXL_SUCCESS;
}

/* The one key of the configuration this provider hears; the rest of the JSON is the business of others. */
static HixlStatus parse_token(hixl_client *client, const char *config, hixl_error *error) {
    const char *next = config != NULL ? strstr(config, "\"ldd_token\"") : NULL;
    int i;
    if (next == NULL) {
        return HIXL_SUCCESS;
    }
    next += strlen("\"ldd_token\"");
    next += strspn(next, " \t\r\n");
    next += *next == ':';
    next += strspn(next, " \t\r\n");
    next += *next == '"';
    for (i = 0; i < 32; i++) {
        int digit = hixl_hex_digit(next[i]);
        if (digit < 0) { /* the end of the text is no digit either */
            break;
        }
        client->token[i / 2] = (uint8_t)(client->token[i / 2] << 4 | digit);
    }
    if (i < 32 || next[32] != '"') {
        return hixl_fail(error, HIXL_PARAM_INVALID, "ldd_token in global_resource_config is not 32 hex digits");
    }
    return HIXL_SUCCESS;
}

static HixlStatus configure(hixl_client *client, const HixlClientDesc *desc, const HixlClientConfig *config,
                            hixl_error *error) {
    HixlStatus status = hixl_parse_address(desc->server_ip, desc->server_port, &client->address, error);
    unsigned checked; /* the pool reads it too, once for the process, but has nobody to tell about a bad value */

    client->num_streams = DEFAULT_STREAMS;
    if (status == HIXL_SUCCESS) {
        status = parse_paths(client->paths, &client->num_paths, error);
    }
    if (status == HIXL_SUCCESS) {
        status = parse_count("LLM_DATADIST_TCP_STREAMS", HIXL_MAX_STREAMS, &client->num_streams, error);
    }
    if (status == HIXL_SUCCESS) {
        status = parse_count("LLM_DATADIST_COPY_THREADS", COPY_MAX_THREADS, &checked, error);
    }
    return status == HIXL_SUCCESS ? parse_token(client, config->global_resource_config, error) : status;
}

/* Copies of descriptors only: mappings are not inherited, and an abort would end the parent's connections. */
static void after_fork_in_child(void *object) {
    hixl_client *client = object;
    int i;
    for (i = 0; i < HIXL_MAX_STREAMS; i++) {
        hixl_close_fd(&client->streams[i].fd);
    }
    hixl_link_close(client);
}

static const hixl_fork_ops fork_ops = {NULL, NULL, after_fork_in_child};

LDD_EXPORT HixlStatus HixlCSClientCreate(const HixlClientDesc *desc, const HixlClientConfig *config,
                                         HixlClientHandle *out_client) {
    hixl_error *error = hixl_thread_error();
    hixl_client *client;
    HixlStatus status;
    int i;

    if (desc == NULL || config == NULL || out_client == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "%s is NULL",
                         desc == NULL     ? "desc"
                         : config == NULL ? "config"
                                          : "out_client");
    }
    if (desc->server_port < 1 || desc->server_port > 65535) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "server_port %u is not in 1..65535", desc->server_port);
    }
    client = calloc(1, sizeof *client);
    if (client == NULL) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a client");
    }
    if (!copy_job_init(&client->round)) {
        free(client);
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a client");
    }
    status = configure(client, desc, config, error);
    if (status == HIXL_SUCCESS && (*out_client = hixl_handle_publish(HIXL_CLIENT_HANDLE, client)) == NULL) {
        status = hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "too many servers and clients are open");
    }
    if (status != HIXL_SUCCESS) {
        copy_job_destroy(&client->round);
        free(client);
        return status;
    }
    client->admin_fd = client->local_fd = client->pid_fd = -1;
    for (i = 0; i < HIXL_MAX_STREAMS; i++) {
        client->streams[i].fd = -1;
    }
    TAILQ_INIT(&client->tcp_queue);
    pthread_mutex_init(&client->lock, NULL);
    copy_pool_retain();
    client->pid = getpid();
    hixl_fork_watch(&client->fork_node, &fork_ops, client);
    return HIXL_SUCCESS;
}

LDD_EXPORT HixlStatus HixlCSClientRegMem(HixlClientHandle handle, const char *tag, const CommMem *mem,
                                         MemHandle *out_handle) {
    hixl_error *error = hixl_thread_error();
    hixl_local_memory *memory;
    hixl_client *client = hixl_checked_client(handle, error);
    (void)tag;
    if (client == NULL) {
        return error->status;
    }
    if (mem == NULL || out_handle == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "%s is NULL", mem == NULL ? "mem" : "out_handle");
    }
    if (mem->addr == NULL || mem->size == 0 || mem->size > UINT64_MAX - (uintptr_t)mem->addr) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "memory [%p, +%" PRIu64 ") is empty or wraps around", mem->addr,
                         mem->size);
    }
    memory = calloc(1, sizeof *memory);
    if (memory == NULL) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a region");
    }
    pthread_mutex_lock(&client->lock);
    memory->next = client->local_memory;
    client->local_memory = memory;
    pthread_mutex_unlock(&client->lock);
    *out_handle = memory;
    return HIXL_SUCCESS;
}

LDD_EXPORT HixlStatus HixlCSClientUnregMem(HixlClientHandle handle, MemHandle mem_handle) {
    hixl_error *error = hixl_thread_error();
    hixl_local_memory **link, *found;
    hixl_client *client = hixl_checked_client(handle, error);
    if (client == NULL) {
        return error->status;
    }
    pthread_mutex_lock(&client->lock);
    link = &client->local_memory;
    while (*link != NULL && *link != mem_handle) {
        link = &(*link)->next;
    }
    found = *link;
    if (found != NULL) {
        *link = found->next;
    }
    pthread_mutex_unlock(&client->lock);
    if (found == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "memory handle %p is not registered with this client", mem_handle);
    }
    free(found);
    return HIXL_SUCCESS;
}

LDD_EXPORT HixlStatus HixlCSClientConnect(HixlClientHandle handle, uint32_t timeout_ms) {
    hixl_error *error = hixl_thread_error();
    int64_t deadline_ns = hixl_deadline_after((int64_t)timeout_ms * HIXL_MS_NS);
    hixl_client *client = hixl_checked_client(handle, error);
    HixlStatus status;
    if (client == NULL) {
        return error->status;
    }
    pthread_mutex_lock(&client->lock);
    if (client->connected) {
        status = hixl_fail(error, HIXL_ALREADY_CONNECTED, "client is connected to %s already", client->address.text);
    } else {
        status = hixl_link_open(client, deadline_ns, error);
        if (status == HIXL_SUCCESS) {
            status = hixl_remote_refresh(client, deadline_ns, false, NULL, error);
        }
        client->connected = status == HIXL_SUCCESS;
        if (status != HIXL_SUCCESS) {
            hixl_remote_close(client);
            hixl_link_close(client);
        }
    }
    pthread_mutex_unlock(&client->lock);
    return status;
}

LDD_EXPORT HixlStatus HixlCSClientGetRemoteMem(HixlClientHandle handle, CommMem **out_list, char ***out_tags,
                                               uint32_t *out_count, uint32_t timeout_ms) {
    hixl_error *error = hixl_thread_error();
    int64_t deadline_ns = hixl_deadline_after((int64_t)timeout_ms * HIXL_MS_NS);
    hixl_client *client = hixl_checked_client(handle, error);
    HixlStatus status;
    if (client == NULL) {
        return error->status;
    }
    if (out_list == NULL || out_tags == NULL || out_count == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "%s is NULL",
                         out_list == NULL   ? "out_list"
                         : out_tags == NULL ? "out_tags"
                                            : "out_count");
    }
    pthread_mutex_lock(&client->lock);
    if (!client->connected) {
        status = hixl_fail(error, HIXL_NOT_CONNECTED, "client is not connected");
    } else {
        status = hixl_remote_refresh(client, deadline_ns, true, out_count, error);
    }
    if (status == HIXL_SUCCESS) {
        *out_list = client->user_list;
        *out_tags = client->user_tags;
    }
    pthread_mutex_unlock(&client->lock);
    return status;
}

LDD_EXPORT HixlStatus LddClientPaths(HixlClientHandle handle, char *text, size_t size) {
    hixl_error *error = hixl_thread_error();
    bool seen[HIXL_NUM_PATHS] = {false};
    hixl_client *client = hixl_checked_client(handle, error);
    size_t i, used = 0;
    if (client == NULL) {
        return error->status;
    }
    if (text == NULL || size < sizeof "shm,cma,tcp") {
        return hixl_fail(error, HIXL_PARAM_INVALID, "text needs %zu bytes, not %zu", sizeof "shm,cma,tcp",
                         text == NULL ? 0 : size);
    }
    text[0] = '\0';
    pthread_mutex_lock(&client->lock);
    for (i = 0; i < client->num_regions; i++) {
        hixl_path path = client->regions[i].path;
        if (!seen[path]) {
            seen[path] = true;
            used += (size_t)snprintf(text + used, size - used, "%s%s", used > 0 ? "," : "", hixl_path_names[path]);
        }
    }
    pthread_mutex_unlock(&client->lock);
    return HIXL_SUCCESS;
}

static void free_batches(hixl_client *client) {
    unsigned i;
    for (i = 0; i < client->num_slots; i++) {
        hixl_batch *batch = client->batches[i];
        if (batch->copying) {
            copy_job_stop(&batch->job);
        }
        copy_job_destroy(&batch->job);
        free(batch->mapped.items);
        free(batch->cma.items);
        free(batch->chunks);
        free(batch->tcp_ops);
        free(batch);
    }
}

LDD_EXPORT HixlStatus HixlCSClientDestroy(HixlClientHandle handle) {
    hixl_error *error = hixl_thread_error();
    hixl_client *client = hixl_checked_client(handle, error);
    if (client == NULL) {
        return error->status;
    }
    hixl_handle_withdraw(handle);
    hixl_fork_forget(&client->fork_node);
    free_batches(client); /* first: chunks in flight use mappings and the pid */
    hixl_tcp_close(client);
    hixl_remote_close(client);
    hixl_link_close(client);
    while (client->local_memory != NULL) {
        hixl_local_memory *next = client->local_memory->next;
        free(client->local_memory);
        client->local_memory = next;
    }
    pthread_mutex_destroy(&client->lock);
    copy_job_destroy(&client->round);
    copy_pool_release();
    free(client);
    return HIXL_SUCCESS;
}

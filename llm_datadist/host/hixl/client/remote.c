/* The client's view of the server's regions: fetching, mapping, finding. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hixl/client/remote.h"

#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#define F_SEAL_SHRINK 0x0002
#endif

static HixlStatus receive_some(hixl_client *client, void *data, size_t bytes, size_t *received, int64_t deadline_ns,
                               hixl_error *error) {
    while (*received < bytes) {
        ssize_t got = recv(client->admin_fd, (uint8_t *)data + *received, bytes - *received, 0);
        if (got > 0) {
            *received += (size_t)got;
        } else if (got < 0 && errno == EAGAIN) {
            HixlStatus status = hixl_wait_fd(client->admin_fd, POLLIN, deadline_ns, error);
            if (status != HIXL_SUCCESS) {
                return status;
            }
        } else if (got == 0 || errno != EINTR) {
            return hixl_fail(error, HIXL_NOT_CONNECTED, "server %s has closed the connection", client->address.text);
        }
    }
    return HIXL_SUCCESS;
}

/* A reply is taken in where the last attempt stopped: one that timed out leaves the connection usable. */
static HixlStatus receive_list(hixl_client *client, uint32_t sequence, int64_t deadline_ns, hixl_error *error) {
    const size_t header = sizeof client->list_reply;
    const hixl_wire_reply *reply = &client->list_reply;
    size_t received;
    HixlStatus status;

    for (;;) {
        if (client->list_received < header) {
            status = receive_some(client, &client->list_reply, header, &client->list_received, deadline_ns, error);
            if (status != HIXL_SUCCESS) {
                return status;
            }
        }
        if (reply->magic != HIXL_WIRE_REPLY_MAGIC || reply->op != HIXL_OP_LIST || reply->status != HIXL_SUCCESS ||
            reply->argument > HIXL_MAX_REGIONS || reply->bytes < reply->argument * sizeof(hixl_wire_region) ||
            reply->bytes > reply->argument * (sizeof(hixl_wire_region) + HIXL_MAX_TAG_BYTES)) {
            return hixl_fail(error, HIXL_NOT_CONNECTED, "server %s sent a malformed region list", client->address.text);
        }
        if (client->list_payload == NULL) {
            client->list_payload = malloc(reply->bytes + 1);
            if (client->list_payload == NULL) {
                return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a region list");
            }
        }
        received = client->list_received - header;
        status = receive_some(client, client->list_payload, reply->bytes, &received, deadline_ns, error);
        client->list_received = header + received;
        if (status != HIXL_SUCCESS) {
            return status;
        }
        client->list_received = 0;
        if (reply->sequence == sequence) {
            return HIXL_SUCCESS;
        }
        free(client->list_payload); /* the answer to a call that gave up */
        client->list_payload = NULL;
    }
}

static HixlStatus check_list(const hixl_client *client, hixl_error *error) {
    const hixl_wire_region *regions = (const hixl_wire_region *)client->list_payload;
    uint64_t i, count = client->list_reply.argument, tag_bytes = 0;
    for (i = 0; i < count; i++) {
        if (regions[i].bytes == 0 || regions[i].bytes > UINT64_MAX - regions[i].address ||
            regions[i].tag_bytes > HIXL_MAX_TAG_BYTES) {
            break;
        }
        tag_bytes += regions[i].tag_bytes;
    }
    if (i < count || count * sizeof *regions + tag_bytes != client->list_reply.bytes) {
        return hixl_fail(error, HIXL_NOT_CONNECTED, "server %s sent a malformed region list", client->address.text);
    }
    return HIXL_SUCCESS;
}

/* Ask for a memfd over the local socket; -1 when it cannot be had. */
static int fetch_backing(hixl_client *client, uint64_t backing, int64_t deadline_ns, uint64_t *bytes) {
    hixl_wire_request request = {.magic = HIXL_WIRE_REQUEST_MAGIC, .op = HIXL_OP_MAP, .argument = backing};
    hixl_wire_reply reply;
    hixl_error ignored;
    HixlStatus status;
    ssize_t got = -1;
    int fd = -1;

    request.sequence = hixl_next_sequence(client);
    status = hixl_send_all(client->local_fd, &request, sizeof request, deadline_ns, &ignored);
    while (status == HIXL_SUCCESS && (got = hixl_receive_fd(client->local_fd, &reply, sizeof reply, &fd)) < 0 &&
           (errno == EAGAIN || errno == EINTR)) {
        status = hixl_wait_fd(client->local_fd, POLLIN, deadline_ns, &ignored);
    }
    if (status != HIXL_SUCCESS || got != sizeof reply || reply.magic != HIXL_WIRE_REPLY_MAGIC ||
        reply.op != HIXL_OP_MAP || reply.sequence != request.sequence) {
        hixl_close_fd(&client->local_fd); /* out of step for good; the other paths remain */
    } else if (reply.status == HIXL_SUCCESS) {
        *bytes = reply.argument;
        return fd;
    }
    if (fd >= 0) {
        close(fd);
    }
    return -1;
}

/* Map a memfd only if no one can take pages away under us: a shrunk file would turn a copy into SIGBUS. */
static uint8_t *map_backing(int fd, uint64_t bytes, bool *writable) {
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    void *base;
    if (bytes == 0 || bytes > SIZE_MAX / 2 || fstat(fd, &info) != 0 || info.st_size < 0 ||
        (uint64_t)info.st_size < bytes || seals < 0 || !(seals & F_SEAL_SHRINK)) {
        return NULL;
    }
    *writable = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
    base = mmap(NULL, (size_t)bytes, *writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        return NULL;
    }
    madvise(base, (size_t)bytes, MADV_HUGEPAGE);
    madvise(base, (size_t)bytes, MADV_DONTFORK); /* a child has no use for a peer's memory */
    madvise(base, (size_t)bytes, MADV_DONTDUMP);
    return base;
}

static hixl_mapping *hold_mapping(hixl_client *client, uint64_t backing, int64_t deadline_ns) {
    hixl_mapping *mapping;
    int fd;
    for (mapping = client->mappings; mapping != NULL; mapping = mapping->next) {
        if (mapping->backing == backing) {
            return mapping;
        }
    }
    if (client->local_fd < 0 || (mapping = calloc(1, sizeof *mapping)) == NULL) {
        return NULL;
    }
    fd = fetch_backing(client, backing, deadline_ns, &mapping->bytes);
    if (fd >= 0) {
        mapping->base = map_backing(fd, mapping->bytes, &mapping->writable);
        close(fd);
    }
    mapping->backing = backing;
    mapping->next = client->mappings;
    client->mappings = mapping;
    return mapping;
}

static void choose_path(hixl_client *client, hixl_remote_region *region, int64_t deadline_ns) {
    unsigned i;
    for (i = 0; i < client->num_paths; i++) {
        region->path = client->paths[i];
        if (region->path == HIXL_PATH_TCP || (region->path == HIXL_PATH_CMA && client->can_cma)) {
            return;
        }
        if (region->path == HIXL_PATH_SHM && region->backing != 0) {
            hixl_mapping *mapping = hold_mapping(client, region->backing, deadline_ns);
            if (mapping != NULL && mapping->base != NULL && region->backing_offset <= mapping->bytes &&
                region->bytes <= mapping->bytes - region->backing_offset) {
                mapping->in_use = true;
                region->mapped = mapping->base + region->backing_offset;
                region->read_only = !mapping->writable;
                return;
            }
        }
    }
}

/* Mappings no region names any more go, though not under a batch that may still copy. */
static void sweep_mappings(hixl_client *client) {
    hixl_mapping **link = &client->mappings;
    while (*link != NULL) {
        hixl_mapping *mapping = *link;
        if (mapping->in_use) {
            mapping->in_use = false;
            link = &mapping->next;
        } else {
            *link = mapping->next;
            mapping->next = client->retired;
            client->retired = mapping;
        }
    }
    hixl_remote_unmap_retired(client);
}

static int by_address(const void *a, const void *b) {
    const hixl_remote_region *x = a, *y = b;
    return x->address < y->address ? -1 : x->address > y->address;
}

static HixlStatus take_regions(hixl_client *client, int64_t deadline_ns, hixl_error *error) {
    const hixl_wire_region *wire = (const hixl_wire_region *)client->list_payload;
    size_t i, count = client->list_reply.argument;
    hixl_remote_region *regions = calloc(count + 1, sizeof *regions);
    uint64_t reach = 0;

    if (regions == NULL) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a region list");
    }
    for (i = 0; i < count; i++) {
        regions[i].address = wire[i].address;
        regions[i].bytes = wire[i].bytes;
        regions[i].region = wire[i].region;
        regions[i].generation = wire[i].generation;
        regions[i].backing = wire[i].backing;
        regions[i].backing_offset = wire[i].backing_offset;
        choose_path(client, &regions[i], deadline_ns);
    }
    qsort(regions, count, sizeof *regions, by_address);
    for (i = 0; i < count; i++) {
        uint64_t end = regions[i].address + regions[i].bytes;
        reach = end > reach ? end : reach;
        regions[i].reach = reach;
    }
    free(client->regions);
    client->regions = regions;
    client->num_regions = count;
    client->last_hit = 0;
    sweep_mappings(client);
    return HIXL_SUCCESS;
}

static void free_user_list(hixl_client *client) {
    free(client->user_list);
    free(client->user_tags); /* the strings lie behind the pointers */
    client->user_list = NULL;
    client->user_tags = NULL;
}

static HixlStatus fill_user_list(hixl_client *client, uint32_t *count, hixl_error *error) {
    const hixl_wire_region *wire = (const hixl_wire_region *)client->list_payload;
    size_t i, num_regions = client->list_reply.argument;
    const char *tags = (const char *)(wire + num_regions);
    char *text;

    free_user_list(client);
    client->user_list = calloc(num_regions + 1, sizeof *client->user_list);
    client->user_tags = malloc((num_regions + 1) * (sizeof *client->user_tags + 1) + client->list_reply.bytes);
    if (client->user_list == NULL || client->user_tags == NULL) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a region list");
    }
    text = (char *)(client->user_tags + num_regions + 1);
    for (i = 0; i < num_regions; i++) {
        client->user_list[i].type = (CommMemType)wire[i].type;
        client->user_list[i].addr = (void *)(uintptr_t)wire[i].address;
        client->user_list[i].size = wire[i].bytes;
        client->user_tags[i] = text;
        memcpy(text, tags, wire[i].tag_bytes);
        text[wire[i].tag_bytes] = '\0';
        text += wire[i].tag_bytes + 1;
        tags += wire[i].tag_bytes;
    }
    client->user_tags[num_regions] = NULL;
    *count = (uint32_t)num_regions;
    return HIXL_SUCCESS;
}

HixlStatus hixl_remote_refresh(hixl_client *client, int64_t deadline_ns, bool for_user, uint32_t *count,
                               hixl_error *error) {
    hixl_wire_request request = {.magic = HIXL_WIRE_REQUEST_MAGIC, .op = HIXL_OP_LIST};
    HixlStatus status;

    request.sequence = hixl_next_sequence(client);
    /* The request is a fraction of a socket buffer: it goes out whole or the connection is dead. */
    status = hixl_send_all(client->admin_fd, &request, sizeof request, deadline_ns, error);
    if (status == HIXL_SUCCESS) {
        status = receive_list(client, request.sequence, deadline_ns, error);
    }
    if (status == HIXL_SUCCESS) {
        status = check_list(client, error);
        if (status == HIXL_SUCCESS) {
            status = take_regions(client, deadline_ns, error);
        }
        if (status == HIXL_SUCCESS && for_user) {
            status = fill_user_list(client, count, error);
        }
        free(client->list_payload);
        client->list_payload = NULL;
    }
    return status;
}

static bool holds(const hixl_remote_region *region, uint64_t address, uint64_t bytes) {
    return address >= region->address && bytes <= region->bytes && address - region->address <= region->bytes - bytes;
}

const hixl_remote_region *hixl_remote_find(hixl_client *client, uint64_t address, uint64_t bytes) {
    size_t low = 0, high = client->num_regions;
    if (client->last_hit < client->num_regions && holds(&client->regions[client->last_hit], address, bytes)) {
        return &client->regions[client->last_hit];
    }
    while (low < high) { /* the first region that starts behind the address */
        size_t middle = low + (high - low) / 2;
        if (client->regions[middle].address <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    /* Regions may overlap: look back as long as one that reaches this far can be there. */
    while (low-- > 0 && client->regions[low].reach > address) {
        if (holds(&client->regions[low], address, bytes)) {
            client->last_hit = low;
            return &client->regions[low];
        }
    }
    return NULL;
}

void hixl_remote_unmap_retired(hixl_client *client) {
    while (client->num_running == 0 && client->retired != NULL) {
        hixl_mapping *mapping = client->retired;
        client->retired = mapping->next;
        if (mapping->base != NULL) {
            munmap(mapping->base, mapping->bytes);
        }
        free(mapping);
    }
}

void hixl_remote_close(hixl_client *client) {
    free(client->regions);
    client->regions = NULL;
    client->num_regions = 0;
    free(client->list_payload);
    client->list_payload = NULL;
    client->list_received = 0;
    free_user_list(client);
    client->num_running = 0;
    sweep_mappings(client); /* no region holds one: all go */
}

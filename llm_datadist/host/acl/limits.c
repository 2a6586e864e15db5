/*
 * How much memory this process may still fill.
 *
 * The kernel grants more than it has and settles the bill later, with SIGBUS or the out-of-memory killer. An
 * allocator that wants to say no in time has to ask first: MemAvailable, and the limit of every memory control
 * group above us (version 2, or version 1 where it is mounted).
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/limits.h"

enum { PATH_BYTES = 4096 };

/* The first number in a file, or `fallback` when it cannot be read or says "max". */
static uint64_t read_number(const char *directory, const char *file, uint64_t fallback) {
    char path[PATH_BYTES + 64];
    uint64_t value = fallback;
    FILE *stream;
    snprintf(path, sizeof path, "%s/%s", directory, file);
    stream = fopen(path, "re");
    if (stream != NULL) {
        if (fscanf(stream, "%" SCNu64, &value) != 1) {
            value = fallback;
        }
        fclose(stream);
    }
    return value;
}

/* The number that follows `name` at the start of a line, or `fallback`. */
static uint64_t read_field(const char *path, const char *name, uint64_t fallback) {
    FILE *stream = fopen(path, "re");
    char line[256];
    size_t length = strlen(name);
    if (stream == NULL) {
        return fallback;
    }
    while (fgets(line, sizeof line, stream) != NULL) {
        if (strncmp(line, name, length) == 0) {
            fallback = strtoull(line + length, NULL, 10);
            break;
        }
    }
    fclose(stream);
    return fallback;
}

typedef struct {
    const char *mount, *limit, *usage, *reclaimable;
} group_files;

static const group_files version_2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "};
static const group_files version_1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                      "total_inactive_file "};

/* Lower the two to what one group allows. */
static void apply_group(const group_files *files, const char *directory, uint64_t *available, uint64_t *total) {
    char path[PATH_BYTES + 64];
    uint64_t limit = read_number(directory, files->limit, UINT64_MAX), usage, reclaimable;
    if (limit >= *total) { /* none, or none that matters; version 1 writes "none" as a huge number */
        return;
    }
    usage = read_number(directory, files->usage, 0);
    snprintf(path, sizeof path, "%s/memory.stat", directory);
    reclaimable = read_field(path, files->reclaimable, 0); /* page cache counts as usage and yields to us */
    usage -= reclaimable < usage ? reclaimable : usage;
    *total = limit;
    if (usage >= limit) {
        *available = 0;
    } else if (limit - usage < *available) {
        *available = limit - usage;
    }
}

/* Apply every group from `group` up to the root of the hierarchy as this process sees it. */
static void apply_groups(const group_files *files, const char *group, uint64_t *available, uint64_t *total) {
    char directory[PATH_BYTES];
    size_t root = strlen(files->mount);
    snprintf(directory, sizeof directory, "%s%s", files->mount, strcmp(group, "/") == 0 ? "" : group);
    for (;;) {
        char *slash;
        apply_group(files, directory, available, total);
        slash = strrchr(directory, '/');
        if (strlen(directory) <= root || slash == NULL) {
            return;
        }
        *slash = '\0'; /* in a container the path may name groups outside of it: the walk ends at the mount */
    }
}

void acl_machine_memory(uint64_t *available_bytes, uint64_t *total_bytes) {
    char line[PATH_BYTES];
    FILE *stream;
    *total_bytes = read_field("/proc/meminfo", "MemTotal:", UINT64_MAX >> 10) << 10;
    *available_bytes = read_field("/proc/meminfo", "MemAvailable:", UINT64_MAX >> 10) << 10;
    stream = fopen("/proc/self/cgroup", "re");
    while (stream != NULL && fgets(line, sizeof line, stream) != NULL) { /* "number:controllers:/path" */
        char *controllers = strchr(line, ':'), *path;
        path = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (path == NULL) {
            continue;
        }
        *path++ = '\0';
        controllers++;
        path[strcspn(path, "\n")] = '\0';
        if (controllers[0] == '\0') {
            apply_groups(&version_2, path, available_bytes, total_bytes);
        } else if (strcmp(controllers, "memory") == 0) {
            apply_groups(&version_1, path, available_bytes, total_bytes);
        }
    }
    if (stream != NULL) {
        fclose(stream);
    }
}

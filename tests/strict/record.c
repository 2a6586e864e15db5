/* What was called, what is left, and which call is to fail. */
#include "strict.h"

#include <sys/syscall.h>
#include <time.h>

enum { MAX_CALLS = 1 << 16, MAX_NOTES = 64, MAX_NAME = 48 };

typedef struct {
    char function[MAX_NAME];
    uint64_t subject;
    int32_t thread, code, device;
} call_record;

ldd_provider *strict_real;
__typeof__(&aclrtGetDevice) strict_get_device;
__typeof__(&HixlCSClientBatchPutSync) strict_put, strict_get;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static call_record calls[MAX_CALLS];
static uint32_t num_calls;
static _Thread_local call_record *latest;

static struct {
    char name[MAX_NAME];
    int64_t value;
} notes[MAX_NOTES];
static int num_notes;

static struct {
    char function[MAX_NAME];
    int left, code;
} failing;

EXPORT void strict_fail(const char *function, int nth, int code) {
    pthread_mutex_lock(&lock);
    snprintf(failing.function, sizeof failing.function, "%s", function);
    failing.left = nth;
    failing.code = code;
    pthread_mutex_unlock(&lock);
}

EXPORT uint32_t strict_num_calls(void) {
    return __atomic_load_n(&num_calls, __ATOMIC_ACQUIRE);
}

EXPORT void strict_forget_calls(void) {
    pthread_mutex_lock(&lock);
    num_calls = 0;
    pthread_mutex_unlock(&lock);
}

EXPORT int strict_call(uint32_t index, char *function, uint64_t *subject, int32_t *thread, int32_t *code,
                       int32_t *device) {
    if (index >= num_calls || index >= MAX_CALLS) {
        return -1;
    }
    memcpy(function, calls[index].function, MAX_NAME);
    *subject = calls[index].subject;
    *thread = calls[index].thread;
    *code = calls[index].code;
    *device = calls[index].device;
    return 0;
}

static int64_t *find_note(const char *name) {
    int i;
    for (i = 0; i < num_notes; i++) {
        if (strcmp(notes[i].name, name) == 0) {
            return &notes[i].value;
        }
    }
    if (num_notes == MAX_NOTES) {
        fprintf(stderr, "strict: too many notes\n");
        abort();
    }
    snprintf(notes[num_notes].name, MAX_NAME, "%s", name);
    notes[num_notes].value = 0;
    return &notes[num_notes++].value;
}

void strict_note(const char *name, int64_t value) {
    pthread_mutex_lock(&lock);
    *find_note(name) = value;
    pthread_mutex_unlock(&lock);
}

void strict_add(const char *name, int64_t by) {
    pthread_mutex_lock(&lock);
    *find_note(name) += by;
    pthread_mutex_unlock(&lock);
}

EXPORT int64_t strict_noted(const char *name) {
    int64_t value;
    pthread_mutex_lock(&lock);
    value = *find_note(name);
    pthread_mutex_unlock(&lock);
    return value;
}

bool strict_enter(const char *function, const void *subject, int *code) {
    bool fails = false;
    call_record *record;
    int32_t device = strict_device();
    pthread_mutex_lock(&lock);
    record = &calls[num_calls < MAX_CALLS ? num_calls : MAX_CALLS - 1];
    num_calls += num_calls < MAX_CALLS;
    snprintf(record->function, MAX_NAME, "%s", function);
    record->subject = (uint64_t)(uintptr_t)subject;
    record->thread = (int32_t)syscall(SYS_gettid);
    record->code = -1;
    record->device = device;
    latest = record;
    if (failing.left != 0 && strcmp(failing.function, function) == 0 && (failing.left < 0 || --failing.left == 0)) {
        fails = true;
        *code = record->code = failing.code;
    }
    pthread_mutex_unlock(&lock);
    return fails;
}

int strict_leave(int code) {
    if (latest != NULL) {
        latest->code = code;
    }
    return code;
}

int strict_ms(const char *variable) {
    const char *text = getenv(variable);
    return text != NULL ? atoi(text) : 0;
}

void strict_sleep_ms(int ms) {
    struct timespec rest = {ms / 1000, (long)(ms % 1000) * 1000000L};
    while (ms > 0 && nanosleep(&rest, &rest) != 0) {
    }
}

__attribute__((constructor)) static void load(void) {
    ldd_detail detail = {0, ""};
    const char *path = getenv("LDD_STRICT_HOST");
    const char *fail = getenv("LDD_STRICT_FAIL");
    char function[MAX_NAME];
    int nth, code;
    if (path == NULL || ldd_provider_open("host", path, &strict_real, &detail) != LDD_OK) {
        fprintf(stderr, "strict: LDD_STRICT_HOST=%s: %s\n", path != NULL ? path : "", detail.text);
        abort();
    }
    *(void **)&strict_get_device = dlsym(strict_real->acl_lib, "aclrtGetDevice");
    *(void **)&strict_put = dlsym(strict_real->hixl_lib, "HixlCSClientBatchPutSync");
    *(void **)&strict_get = dlsym(strict_real->hixl_lib, "HixlCSClientBatchGetSync");
    if (fail != NULL && sscanf(fail, "%47[^:]:%d:%d", function, &nth, &code) == 3) {
        strict_fail(function, nth, code);
    }
}

/* Whom a server lets in; see hixl/server/admission.h. */
#include "hixl/server/admission.h"

#include <stdlib.h>
#include <string.h>

#include "llm_datadist/ldd_ext.h"

static hixl_admission *find(const hixl_admissions *admissions, const uint8_t token[16]) {
    size_t i;
    for (i = 0; i < admissions->count; i++) {
        if (memcmp(admissions->items[i].token, token, sizeof admissions->items[i].token) == 0) {
            return &admissions->items[i];
        }
    }
    return NULL;
}

uint32_t hixl_admission_rights(const hixl_admissions *admissions, const uint8_t token[16]) {
    const hixl_admission *found = admissions->restricted ? find(admissions, token) : NULL;
    return !admissions->restricted ? LDD_RIGHT_READ | LDD_RIGHT_WRITE : found != NULL ? found->rights : 0;
}

bool hixl_admission_add(hixl_admissions *admissions, const uint8_t token[16], uint32_t rights) {
    hixl_admission *entry = find(admissions, token);
    if (entry == NULL) {
        if (admissions->count == admissions->capacity) {
            size_t capacity = admissions->capacity == 0 ? 16 : 2 * admissions->capacity;
            hixl_admission *grown = realloc(admissions->items, capacity * sizeof *grown);
            if (grown == NULL) {
                return false;
            }
            admissions->items = grown;
            admissions->capacity = capacity;
        }
        entry = &admissions->items[admissions->count++];
        memcpy(entry->token, token, sizeof entry->token);
    }
    entry->rights = rights;
    return true;
}

void hixl_admission_remove(hixl_admissions *admissions, const uint8_t token[16]) {
    hixl_admission *entry = find(admissions, token);
    if (entry != NULL) {
        *entry = admissions->items[--admissions->count];
    }
}

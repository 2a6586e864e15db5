/* Whom a server lets in. A restricted one admits the tokens it was told, each with its rights; another admits all. */
#ifndef LLM_DATADIST_HIXL_SERVER_ADMISSION_H
#define LLM_DATADIST_HIXL_SERVER_ADMISSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint8_t token[16];
    uint32_t rights; /* LDD_RIGHT_* */
} hixl_admission;

/* Its owner locks it. */
typedef struct {
    bool restricted;
    hixl_admission *items;
    size_t count, capacity;
} hixl_admissions;

/* The rights of a client with this token; 0: it may not come in. */
uint32_t hixl_admission_rights(const hixl_admissions *admissions, const uint8_t token[16]);

/* False: no memory. */
bool hixl_admission_add(hixl_admissions *admissions, const uint8_t token[16], uint32_t rights);
void hixl_admission_remove(hixl_admissions *admissions, const uint8_t token[16]);

#endif

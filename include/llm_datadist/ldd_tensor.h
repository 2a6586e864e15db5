/*
 * What the tensors of a cache hold, as its owner described it; and that in words, for errors that name both ends.
 *
 * Transfers move bytes and go by sizes alone. This is what tells a mistaken pairing of caches from a meant one.
 */
#ifndef LLM_DATADIST_LDD_TENSOR_H
#define LLM_DATADIST_LDD_TENSOR_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { LDD_MAX_DIMS = 8 };

/* Part of frames of the control protocol. */
typedef struct {
    uint16_t dtype; /* aclDataType + 1; 0: not said, which fits any */
    uint16_t rank;  /* of the shape; 0: not said; of one with more than LDD_MAX_DIMS the first are here */
    uint32_t reserved;
    uint64_t dims[LDD_MAX_DIMS];
} ldd_tensor_desc;

static_assert(sizeof(ldd_tensor_desc) == 72, "tensor");

static inline const char *ldd_dtype_name(uint32_t dtype) {
    static const char *const names[] = {
        "no said data type", "DT_FLOAT",       "DT_FLOAT16", "DT_INT8",  "DT_INT32",  "DT_UINT8",  NULL,
        "DT_INT16",          "DT_UINT16",      "DT_UINT32",  "DT_INT64", "DT_UINT64", "DT_DOUBLE", "DT_BOOL",
        "DT_STRING",         [28] = "DT_BF16",
    };
    return dtype < sizeof names / sizeof names[0] && names[dtype] != NULL ? names[dtype] : "an unknown data type";
}

/* "4 tensors of DT_FLOAT16 [8, 16, 128]"; cut off where there is no room. */
static inline void ldd_tensor_text(const ldd_tensor_desc *tensor, uint32_t num_tensors, char *text, size_t size) {
    int shown = tensor->rank < LDD_MAX_DIMS ? tensor->rank : LDD_MAX_DIMS, i;
    size_t at = (size_t)snprintf(text, size, "%u tensor%s of %s", num_tensors, num_tensors == 1 ? "" : "s",
                                 ldd_dtype_name(tensor->dtype));
    for (i = 0; i < shown && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%s%llu", i ? ", " : " [", (unsigned long long)tensor->dims[i]);
    if (shown && at < size) snprintf(text + at, size - at, "%s]", shown < tensor->rank ? ", ..." : "");
}

#endif

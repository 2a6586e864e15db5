/* From descriptors to what each path moves. With the client locked. */
#ifndef LLM_DATADIST_HIXL_CLIENT_PLAN_H
#define LLM_DATADIST_HIXL_CLIENT_PLAN_H

#include "hixl/client/state.h"

/* Fill the segments and operations of the batch; nothing moves. */
HixlStatus hixl_plan(hixl_batch *batch, const HixlOneSideOpDesc *ops, uint32_t num_ops, int64_t deadline_ns,
                     hixl_error *error);

/* The same for a fetch, whose operations name local memory alone. */
HixlStatus hixl_plan_fetch(hixl_batch *batch, const HixlOneSideOpDesc *ops, uint32_t num_ops, hixl_error *error);

#endif

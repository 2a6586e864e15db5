/* Memory of the caller that it registered with aclrtHostRegister. */
#ifndef LLM_DATADIST_HOST_REGISTER_H
#define LLM_DATADIST_HOST_REGISTER_H

#include <stdbool.h>
#include <stdint.h>

/* Whether the range is the caller's own memory, registered with aclrtHostRegister. */
bool acl_is_registered(uint64_t addr, uint64_t len);

/* Around fork(): as in acl/object.h, but the ranges stay registered in the child. */
void acl_ranges_before_fork(void);
void acl_ranges_after_fork(bool child);

#endif

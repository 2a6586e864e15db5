/* How much memory the machine and the control groups of this process leave it. */
#ifndef LLM_DATADIST_HOST_LIMITS_H
#define LLM_DATADIST_HOST_LIMITS_H

#include <stdint.h>

/* Bytes this process may still fill, from the kernel and the memory limits of its control groups; and the total. */
void acl_machine_memory(uint64_t *available_bytes, uint64_t *total_bytes);

#endif

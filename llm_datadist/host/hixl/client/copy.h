/* The two paths that move bytes without the server's help: mapped memory (shm) and cross-memory attach (cma). */
#ifndef LLM_DATADIST_HIXL_CLIENT_COPY_H
#define LLM_DATADIST_HIXL_CLIENT_COPY_H

#include "hixl/client/state.h"

bool hixl_copy_cut(hixl_batch *batch); /* segments to chunks; false: no memory */
bool hixl_copy_run(copy_job *job, size_t index);
bool hixl_copy_all(hixl_batch *batch); /* in this thread, without chunks */

#endif

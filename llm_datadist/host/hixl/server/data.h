/* The thread of one data connection: checks each request, then moves bytes between socket and memory. */
#ifndef LLM_DATADIST_HIXL_SERVER_DATA_H
#define LLM_DATADIST_HIXL_SERVER_DATA_H

#include "hixl/server/state.h"

void *hixl_serve_data_main(void *conn);

#endif

/* The service thread: accepts, does handshakes, answers LIST and MAP, hands data connections to threads. */
#ifndef LLM_DATADIST_HIXL_SERVER_SERVICE_H
#define LLM_DATADIST_HIXL_SERVER_SERVICE_H

#include "hixl/server/state.h"

void *hixl_service_main(void *server);

#endif

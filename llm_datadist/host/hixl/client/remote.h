/* The client's view of the server's regions: fetching, mapping, finding. All with the client locked. */
#ifndef LLM_DATADIST_HIXL_CLIENT_REMOTE_H
#define LLM_DATADIST_HIXL_CLIENT_REMOTE_H

#include "hixl/client/state.h"

HixlStatus hixl_remote_refresh(hixl_client *client, int64_t deadline_ns, bool for_user, uint32_t *count,
                               hixl_error *error);
const hixl_remote_region *hixl_remote_find(hixl_client *client, uint64_t address, uint64_t bytes);
void hixl_remote_unmap_retired(hixl_client *client);
void hixl_remote_close(hixl_client *client);

#endif

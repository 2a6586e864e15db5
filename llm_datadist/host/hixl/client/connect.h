/* Connecting to a server, and telling whether it is still there. All with the client locked. */
#ifndef LLM_DATADIST_HIXL_CLIENT_CONNECT_H
#define LLM_DATADIST_HIXL_CLIENT_CONNECT_H

#include "hixl/client/state.h"

HixlStatus hixl_link_open(hixl_client *client, int64_t deadline_ns, hixl_error *error);
void hixl_link_close(hixl_client *client);
/* HIXL_NOT_CONNECTED once the server has gone. Cheap: asks the kernel at most every half millisecond. */
HixlStatus hixl_link_check(hixl_client *client, hixl_error *error);
void hixl_data_hello(const hixl_client *client, hixl_wire_hello *hello);
HixlStatus hixl_check_welcome(const hixl_client *client, const hixl_wire_welcome *welcome, bool first,
                              hixl_error *error);

#endif

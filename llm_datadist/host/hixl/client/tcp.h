/* The tcp path: data connections that carry one batch at a time. All with the client locked. */
#ifndef LLM_DATADIST_HIXL_CLIENT_TCP_H
#define LLM_DATADIST_HIXL_CLIENT_TCP_H

#include "hixl/client/state.h"

/* Queue a batch. hixl_tcp_progress sends its request. */
void hixl_tcp_submit(hixl_client *client, hixl_batch *batch);

/*
 * Move what can be moved without waiting; batches that end leave the queue. The batch that failed, which is still in
 * the queue and whose streams are lost: the caller ends it. Otherwise NULL.
 */
hixl_batch *hixl_tcp_progress(hixl_client *client, hixl_error *error);

/* Where bytes flow on several streams, move them by several threads for a while; false when there is no need. Releases
 * the lock meanwhile. */
bool hixl_tcp_round(hixl_client *client, int64_t deadline_ns);
size_t hixl_tcp_poll_set(hixl_client *client, struct pollfd *entries); /* at most HIXL_MAX_STREAMS */
void hixl_tcp_abort(hixl_client *client);                               /* close the streams */
void hixl_tcp_close(hixl_client *client);

#endif

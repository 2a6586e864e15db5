/* Streams: queues of work, each done in order by a thread of its own. */
#ifndef LLM_DATADIST_HOST_STREAM_H
#define LLM_DATADIST_HOST_STREAM_H

#include "acl/context.h"
#include "acl/copy.h"
#include "acl/event.h"

typedef struct ldd_host_stream ldd_host_stream;

/* The stream of a handle, NULL for the default one, with a reference; it must belong to the current context. */
aclError ldd_host_enter_stream(const char *function, aclrtStream handle, ldd_host_stream **stream);

/* Queue checked copies; they and their pins become the stream's. With `wait` the copies are done on return. */
aclError ldd_host_submit_copies(ldd_host_stream *stream, const ldd_host_copy *copies, size_t num_copies, bool wait);

/* Queue the record of an event, or a wait for record number `sequence`; the reference becomes the stream's. */
aclError ldd_host_submit_record(ldd_host_stream *stream, ldd_host_event *event, uint64_t sequence);
aclError ldd_host_submit_wait(ldd_host_stream *stream, ldd_host_event *event, uint64_t sequence);

void ldd_host_release_stream(ldd_host_stream *stream);

/* Create a stream in a context whose lock the caller holds. */
aclError ldd_host_create_stream(ldd_host_context *context, bool is_default, aclrtStream *out_stream);

/* Drop the work of all streams of a context and end them. */
void ldd_host_end_streams(void *context_handle);

/* In a child made by fork(): no stream of the parent counts any more. */
void ldd_host_forget_streams(void);

#endif

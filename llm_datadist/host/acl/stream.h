/* Streams: queues of work, each done in order by a thread of its own. */
#ifndef LLM_DATADIST_HOST_STREAM_H
#define LLM_DATADIST_HOST_STREAM_H

#include "acl/context.h"
#include "acl/copy.h"
#include "acl/event.h"

typedef struct acl_stream acl_stream;

/* The stream of a handle, NULL for the default one, with a reference; it must belong to the current context. */
aclError acl_enter_stream(const char *function, aclrtStream handle, acl_stream **stream);

/* Queue checked copies; they and their pins become the stream's. With `wait` the copies are done on return. */
aclError acl_submit_copies(acl_stream *stream, const acl_copy *copies, size_t num_copies, bool wait);

/* Queue the record of an event, or a wait for record number `sequence`; the reference becomes the stream's. */
aclError acl_submit_record(acl_stream *stream, acl_event *event, uint64_t sequence);
aclError acl_submit_wait(acl_stream *stream, acl_event *event, uint64_t sequence);

void acl_release_stream(acl_stream *stream);

/* Create a stream in a context whose lock the caller holds. */
aclError acl_create_stream(acl_context *context, bool is_default, aclrtStream *out_stream);

/* Drop the work of all streams of a context and end them. */
void acl_end_streams(void *context_handle);

/* In a child made by fork(): no stream of the parent counts any more. */
void acl_forget_streams(void);

#endif

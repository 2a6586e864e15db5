/*
 * Fetches a server is answering: what joins the connections that carry the parts of one, and its client's confirmation.
 *
 * The thread of part 0 leads: it asks the owner, answers for what the owner holds, and ends it. The threads of other
 * parts join in while they send. When all of them are over, the lead waits for the confirmation, and tells the owner as
 * it ends the fetch: nobody else looks for it. server->fetch_lock protects the list and the counts of parts; it is a
 * leaf, and the owner's hooks are called without it.
 */
#ifndef LLM_DATADIST_HIXL_FETCH_H
#define LLM_DATADIST_HIXL_FETCH_H

#include <stdatomic.h>
#include <stdbool.h>

#include "hixl/server/state.h"
#include "llm_datadist/ldd_ext.h"

typedef struct hixl_fetch {
    TAILQ_ENTRY(hixl_fetch) entry;
    hixl_conn *lead;
    uint32_t sequence; /* of part 0's request, which the confirmation repeats */
    uint64_t exchange, total;
    unsigned num_parts, num_joined;
    atomic_uint num_moving; /* parts whose bytes may still be read */
    atomic_bool over;       /* takes no more parts; those under way are to leave */
    LddFetchSource source;
    int32_t refusal; /* of the owner's; 0: none */
    char text[HIXL_MAX_TEXT_BYTES];
    /* of the lead alone */
    bool confirmed;
    bool broken;        /* something else came where the confirmation belongs */
    int64_t partial_ns; /* since when a part of the confirmation is there; 0: none */
} hixl_fetch;

/* Part 0 has come: ask the owner. NULL: no memory, or the exchange is under way already, or the hooks are going. */
hixl_fetch *hixl_fetch_lead(hixl_conn *conn, const hixl_wire_request *request, const hixl_wire_fetch *head,
                            const void *body);
/* Another part has come. EARLY: part 0 has not, in limit_ns; try again. REFUSED: there is no such part to come. */
typedef enum { HIXL_FETCH_JOINED, HIXL_FETCH_EARLY, HIXL_FETCH_REFUSED } hixl_fetch_arrival;
hixl_fetch_arrival hixl_fetch_join(hixl_conn *conn, const hixl_wire_fetch *head, int64_t limit_ns, hixl_fetch **out);
/* The bytes of a part, this thread's, are read no more. */
void hixl_fetch_leave(hixl_server *server, hixl_fetch *fetch);

/* What the lead has to wait for. */
typedef enum {
    HIXL_FETCH_DONE,
    HIXL_FETCH_AWAITS_PARTS,
    HIXL_FETCH_AWAITS_CLIENT,
    HIXL_FETCH_BROKEN
} hixl_fetch_progress;
hixl_fetch_progress hixl_fetch_look(hixl_server *server, hixl_fetch *fetch);
/* The lead's connection has something to read, and all parts are sent: take the confirmation, if all of it is there. */
void hixl_fetch_take_confirmation(hixl_fetch *fetch);
/* Wait for all parts to come and to be sent, or to be woken, a while; whether they are. */
bool hixl_fetch_wait(hixl_server *server, hixl_fetch *fetch, int64_t limit_ns);
/* A connection was dropped, or the server stops: wake those that wait for parts. */
void hixl_fetch_wake(hixl_server *server);
/* Have all parts leave, tell the owner, of a confirmation that came meanwhile too, and forget it. */
void hixl_fetch_end(hixl_server *server, hixl_fetch *fetch);

#endif

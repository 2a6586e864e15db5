/*
 * Handles of servers and clients: a slot and a generation, never a pointer.
 *
 * A handle that was destroyed, or never was, is told apart instead of followed. Looking one up takes no lock, which
 * relies on the interface's own rule that destruction does not overlap other calls on the handle. A forked child
 * still finds its parent's objects, and refuses them by the process they remember.
 */
#ifndef LLM_DATADIST_HIXL_HANDLE_H
#define LLM_DATADIST_HIXL_HANDLE_H

typedef enum { HIXL_SERVER_HANDLE = 0, HIXL_CLIENT_HANDLE = 1 } hixl_handle_kind;

/* NULL when as many are open as there can be. */
void *hixl_handle_publish(hixl_handle_kind kind, void *object);

/* The object of a live handle of that kind, or NULL. */
void *hixl_handle_object(hixl_handle_kind kind, void *handle);

void hixl_handle_withdraw(void *handle);

#endif

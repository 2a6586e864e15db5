"""The proofs that both ends of a link know the shared secret."""
from libc.stdint cimport uint8_t

from llm_datadist.core.link.links cimport ldd_node
from llm_datadist.core.link.wire cimport ldd_hello, ldd_proof, ldd_welcome

# The asker's proof of each of its secrets.
cdef void ldd_secret_prove(const ldd_node* node, const ldd_hello* hello, const ldd_welcome* asked,
                           ldd_proof* out) noexcept nogil
# For the answerer: which of its secrets the asker knows; NULL: none.
cdef const uint8_t* ldd_secret_of(const ldd_node* node, const ldd_hello* hello, const ldd_welcome* asked,
                                  const ldd_proof* proof) noexcept nogil
# Fill in the answerer's own proof, once all else of its answer is there.
cdef void ldd_secret_confirm(const uint8_t* secret, const ldd_hello* hello, const ldd_welcome* asked,
                             ldd_welcome* answer) noexcept nogil
# For the asker: whether the answerer knows one of our secrets, too.
cdef bint ldd_secret_confirms(const ldd_node* node, const ldd_hello* hello, const ldd_welcome* asked,
                              const ldd_welcome* answer) noexcept nogil
cdef void ldd_random(void* data, size_t nbytes) noexcept nogil

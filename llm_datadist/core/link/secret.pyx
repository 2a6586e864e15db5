"""The proofs that both ends of a link know the shared secret; `ldd_wire.h` says what is in them.

A proof covers the whole hello and the whole answer to it, so it is good for these two instances, clusters and modes,
for this direction, token and port, and for this one time: each side contributes 32 random bytes. Both sides may have
two secrets, the one in use and the one that was or will be. The asker proves both, the answerer takes either and proves
the one that fitted, so processes can be given a new secret one after another.

Every comparison looks at all bytes of all pairs, whatever it finds on the way.
"""
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from llm_datadist.core.link.wire cimport LDD_MAX_SECRETS

cdef extern from "llm_datadist/ldd_hmac.h" nogil:
    enum:
        LDD_SHA256_BYTES
    ctypedef struct ldd_hmac:
        pass
    void ldd_hmac_start(ldd_hmac* hmac, const void* key, size_t key_bytes)
    void ldd_hmac_add(ldd_hmac* hmac, const void* data, size_t nbytes)
    void ldd_hmac_end(ldd_hmac* hmac, uint8_t* mac)
    int ldd_hmac_equal(const uint8_t* a, const uint8_t* b)

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void* data, size_t nbytes, unsigned int flags)

cdef enum:
    LABEL_BYTES = 16


cdef void ldd_random(void* data, size_t nbytes) noexcept nogil:
    cdef size_t done = 0
    cdef ssize_t count
    while done < nbytes:
        count = getrandom(<char*>data + done, nbytes - done, 0)
        if count > 0:
            done += count


cdef void _sign(const uint8_t* secret, const char* label, const ldd_hello* hello, const ldd_welcome* asked,
                const ldd_welcome* answer, uint8_t* mac) noexcept nogil:
    """`answer` is NULL for the asker's proof."""
    cdef ldd_hmac hmac
    cdef ldd_welcome unsigned_answer
    ldd_hmac_start(&hmac, secret, LDD_SHA256_BYTES)
    ldd_hmac_add(&hmac, label, LABEL_BYTES)
    ldd_hmac_add(&hmac, hello, sizeof(ldd_hello))
    ldd_hmac_add(&hmac, asked, sizeof(ldd_welcome))
    if answer != NULL:
        memcpy(&unsigned_answer, answer, sizeof(ldd_welcome))
        memset(unsigned_answer.proof, 0, sizeof(unsigned_answer.proof))
        ldd_hmac_add(&hmac, &unsigned_answer, sizeof(ldd_welcome))
    ldd_hmac_end(&hmac, mac)


cdef void ldd_secret_prove(const ldd_node* node, const ldd_hello* hello, const ldd_welcome* asked,
                           ldd_proof* out) noexcept nogil:
    cdef uint32_t i
    for i in range(LDD_MAX_SECRETS):
        _sign(node.secrets[min(i, node.num_secrets - 1)], b"llm_datadist/ask", hello, asked, NULL, out.macs[i])


cdef const uint8_t* ldd_secret_of(const ldd_node* node, const ldd_hello* hello, const ldd_welcome* asked,
                                  const ldd_proof* proof) noexcept nogil:
    cdef uint8_t mac[LDD_SHA256_BYTES]
    cdef const uint8_t* found = NULL
    cdef uint32_t i, k
    for i in range(node.num_secrets):
        _sign(node.secrets[i], b"llm_datadist/ask", hello, asked, NULL, mac)
        for k in range(LDD_MAX_SECRETS):
            if ldd_hmac_equal(mac, proof.macs[k]):
                found = node.secrets[i]
    return found


cdef void ldd_secret_confirm(const uint8_t* secret, const ldd_hello* hello, const ldd_welcome* asked,
                             ldd_welcome* answer) noexcept nogil:
    _sign(secret, b"llm_datadist/say", hello, asked, answer, answer.proof)


cdef bint ldd_secret_confirms(const ldd_node* node, const ldd_hello* hello, const ldd_welcome* asked,
                              const ldd_welcome* answer) noexcept nogil:
    cdef uint8_t mac[LDD_SHA256_BYTES]
    cdef bint confirmed = False
    cdef uint32_t i
    for i in range(node.num_secrets):
        _sign(node.secrets[i], b"llm_datadist/say", hello, asked, answer, mac)
        confirmed |= ldd_hmac_equal(mac, answer.proof) != 0
    return confirmed

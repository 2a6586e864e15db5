"""The proofs' HMAC-SHA256 as Python functions."""
from libc.stdint cimport uint8_t

cdef extern from "llm_datadist/ldd_hmac.h" nogil:
    ctypedef struct ldd_sha256:
        pass
    ctypedef struct ldd_hmac:
        pass
    void ldd_sha256_start(ldd_sha256* hash)
    void ldd_sha256_add(ldd_sha256* hash, const void* data, size_t nbytes)
    void ldd_sha256_end(ldd_sha256* hash, uint8_t* digest)
    void ldd_hmac_start(ldd_hmac* hmac, const void* key, size_t key_bytes)
    void ldd_hmac_add(ldd_hmac* hmac, const void* data, size_t nbytes)
    void ldd_hmac_end(ldd_hmac* hmac, uint8_t* mac)
    int ldd_hmac_equal(const uint8_t* a, const uint8_t* b)


def sha256(list parts):
    """The digest of parts, bytes each, that are added one by one."""
    cdef ldd_sha256 hash
    cdef uint8_t digest[32]
    cdef bytes part
    ldd_sha256_start(&hash)
    for part in parts:
        ldd_sha256_add(&hash, <const char*>part, len(part))
    ldd_sha256_end(&hash, digest)
    return digest[:32]


def hmac_sha256(bytes key, list parts):
    """The code of parts under a key of at most 64 bytes."""
    cdef ldd_hmac hmac
    cdef uint8_t mac[32]
    cdef bytes part
    assert len(key) <= 64
    ldd_hmac_start(&hmac, <const char*>key, len(key))
    for part in parts:
        ldd_hmac_add(&hmac, <const char*>part, len(part))
    ldd_hmac_end(&hmac, mac)
    return mac[:32]


def equal(bytes a, bytes b):
    """Whether two codes of 32 bytes are equal."""
    assert len(a) == len(b) == 32
    return ldd_hmac_equal(<const uint8_t*><const char*>a, <const uint8_t*><const char*>b) != 0

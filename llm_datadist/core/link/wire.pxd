"""The control protocol's frames; see ``ldd_wire.h`` for what each means."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from llm_datadist.core.base.tensor_desc cimport ldd_tensor_desc

cdef extern from "llm_datadist/ldd_wire.h" nogil:
    enum:
        LDD_WIRE_MAGIC
        LDD_WIRE_VERSION
        LDD_WIRE_MAX_PAYLOAD
        LDD_WIRE_MAX_RANGES
        LDD_WIRE_MAX_HELLO
        LDD_FRAME_HELLO
        LDD_FRAME_WELCOME
        LDD_FRAME_RESOLVE
        LDD_FRAME_DESCRIPTOR
        LDD_FRAME_RELEASE
        LDD_FRAME_ACK
        LDD_FRAME_RANGES
        LDD_FRAME_LEASE
        LDD_FRAME_UNLINK
        LDD_FRAME_PING
        LDD_FRAME_ENDPOINTS
        LDD_FRAME_ENDPOINT_LIST
        LDD_FRAME_LEAVE
        LDD_FRAME_PROOF
        LDD_FRAME_CHECKSUM
        LDD_FRAME_CHECKSUMS
        LDD_CHECKED_MAX_RANGES
        LDD_CHECKED_MAX_BYTES
        LDD_MAX_ENDPOINTS
        LDD_HELLO_FORWARD
        LDD_HELLO_REVERSE
        LDD_HELLO_SHARED_TABLE
        LDD_HELLO_HAS_SECRET
        LDD_WELCOME_PROVE
        LDD_MAX_SECRETS
        LDD_HELLO_FRAME_BYTES
        LDD_WELCOME_FRAME_BYTES
        LDD_MODE_REMOTE_ACCESSIBLE
        LDD_ACCESS_READ
        LDD_ACCESS_WRITE
        LDD_FETCH_TAKE
        LDD_FETCH_BLOCKS
        LDD_FETCH_TO_HOST
        LDD_FETCH_RESHAPE
        LDD_FETCH_ASK
        LDD_FETCH_MAX_SEGMENTS
        LDD_FETCH_CONTEXT_BYTES
        LDD_DESC_BLOCKS
        LDD_DESC_HOST
        LDD_DESC_OWNED
        LDD_DESC_REMOTE_ACCESSIBLE
        LDD_DESC_EVEN
        LDD_RELEASE_TAKE
    ctypedef struct ldd_frame_header:
        uint32_t magic
        uint16_t version
        uint16_t type
        uint32_t length
        uint32_t request_id
    ctypedef struct ldd_hello:
        uint16_t direction
        uint16_t flags
        uint32_t mode
        uint64_t cluster_id
        uint64_t expected_cluster_id
        uint8_t instance[16]
        uint8_t token[16]
        uint8_t comm[32]
        uint32_t data_port
        uint32_t check_expected
        uint8_t nonce[32]
        uint8_t endpoint[160]
    ctypedef struct ldd_welcome:
        int32_t status
        uint32_t mode
        uint64_t cluster_id
        uint8_t instance[16]
        uint32_t data_port
        uint8_t nonce[32]
        uint8_t proof[32]
        uint8_t endpoint[160]
        char text[152]
    ctypedef struct ldd_proof:
        uint8_t[2][32] macs
    ctypedef struct ldd_endpoint_record:
        uint8_t endpoint[160]
        char plane[32]
        char net_instance[64]
    ctypedef struct ldd_endpoint_list:
        uint32_t count
        ldd_endpoint_record items[16]
    ctypedef struct ldd_resolve:
        uint8_t kind
        uint8_t access
        uint16_t dtype
        uint32_t batch_index
        uint64_t id
        uint64_t model_id
    ctypedef struct ldd_fetch_request:
        ldd_resolve key
        uint32_t flags
        uint32_t num_tensors
        int64_t first
        int64_t stop
        uint64_t stride_bytes
        uint64_t num_runs
    ctypedef struct ldd_fetch_run:
        uint64_t offset
        uint64_t bytes
    ctypedef struct ldd_descriptor:
        int32_t status
        uint32_t lease
        int64_t cache_id
        uint32_t num_tensors
        uint32_t flags
        uint64_t num_slots
        uint64_t tensor_bytes
        uint64_t stride_bytes
        uint64_t region_epoch
        uint32_t batch_index
        uint32_t text_bytes
        ldd_tensor_desc tensor
    ctypedef struct ldd_release:
        uint32_t lease
        uint32_t flags
        uint32_t first_tensor
        uint32_t num_tensors
    ctypedef struct ldd_ranges:
        uint32_t dtype
    ctypedef struct ldd_range:
        uint64_t addr
        uint64_t bytes
    ctypedef struct ldd_lease_reply:
        int32_t status
        uint32_t lease
        uint64_t region_epoch
        ldd_tensor_desc tensor
        int64_t cache_id
        uint32_t num_tensors
        char text[240]
    ctypedef struct ldd_checked:
        uint32_t lease
        uint32_t num_ranges
    ctypedef struct ldd_checked_range:
        uint64_t addr
        uint32_t bytes
        uint32_t pin
    ctypedef struct ldd_checksums:
        int32_t status
        uint32_t num_sums
    ctypedef struct ldd_ack:
        int32_t status

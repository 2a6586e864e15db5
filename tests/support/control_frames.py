"""Frames of the control protocol as ``ldd_wire.h`` lays them out, for tests that write them by hand."""
import contextlib
import struct

# Numbers of ldd_wire.h, on purpose not read from it: they must not change unnoticed within a version.
MAGIC, VERSION = 0x3144444C, 3
HELLO, WELCOME, RESOLVE, DESCRIPTOR, RELEASE, ACK, RANGES, LEASE, UNLINK, PING = range(1, 11)
PROOF, CHECKSUM, CHECKSUMS = 14, 15, 16
HEADER = struct.Struct("<IHHII")                        # magic, version, type, payload length, request id
HELLO_PAYLOAD = struct.Struct("<HHIQQ16s16s32sII64s160s")   # fields of ldd_hello, as `hello` gives them
HELLO_FRAME_BYTES = HEADER.size + HELLO_PAYLOAD.size
WELCOME_FRAME_BYTES = HEADER.size + 416
WELCOME_HEAD = struct.Struct("<iIQ16s")                 # status, mode, cluster, instance


def frame(type_, payload=b"", *, magic=MAGIC, version=VERSION, length=None, request=7):
    return HEADER.pack(magic, version, type_, len(payload) if length is None else length, request) + payload


def hello(token=b"t" * 16, *, direction=0, mode=0, cluster=77, expected=1, comm=bytes(32), data_port=1,
          instance=b"i" * 16):
    return HELLO_PAYLOAD.pack(direction, 0, mode, cluster, expected, instance, token, comm, data_port, 1, b"", b"")


def read_all(sock):
    """Everything until the owner ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while True:
            chunk = sock.recv(65536)
            if not chunk:
                break
            data += chunk
    return data


def read_frame(sock):
    """Type and payload of one answer."""
    header = read_exactly(sock, HEADER.size)
    magic, version, type_, length, request = HEADER.unpack(header)
    assert (magic, version, request) == (MAGIC, VERSION, 7)
    return type_, read_exactly(sock, length)


def read_exactly(sock, count):
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, f"closed after {len(data)} of {count} bytes"
        data += chunk
    return data

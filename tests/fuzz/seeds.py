"""Write the inputs that the fuzz targets of C decoders begin with: one good conversation each, and a few variants.

``python3 tests/fuzz/seeds.py`` writes ``tests/fuzz/corpus``, which is kept; run it when the wire changes.
"""
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from support.hixl_frames import (  # noqa: E402
    ADMIN,
    CONFIRM,
    DATA,
    DESC,
    FETCH,
    GET,
    HELLO,
    HELLO_MAGIC,
    LIST,
    LOCAL,
    MAP,
    PART,
    PUT,
    REGION,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    VERSION,
    WELCOME,
)

ALL, BYTE_BY_BYTE, FEW = b"\0", b"\1", b"\7"      # how many bytes come at a time, see peer.h
FETCHED = 1001                                  # bytes that the owner of data_frames.c has


def request(op, count=0, size=0, argument=0, sequence=7):
    return REQUEST.pack(REQUEST_MAGIC, op, 0, sequence, count, size, argument)


def reply(op, sequence=1, size=0, argument=0, status=0, text=b""):
    return REPLY.pack(REPLY_MAGIC, op, len(text), sequence, status, size, argument) + text


def hello(kind, client=b"c" * 16, nonce=b"n" * 16, token=bytes(16), version=VERSION):
    return HELLO.pack(HELLO_MAGIC, version, kind, 0, client, token, nonce)


def welcome(status=0):
    return WELCOME.pack(HELLO_MAGIC, VERSION, 0, status, bytes(16), bytes(16), b"", 0, 0)


def data_frames():
    """Regions 0 and 1 have 4096 bytes each; their generations count from 1."""
    descs = [(region, region + 1, 16, 100) for region in (0, 1)]
    get = request(GET, 2, 200) + b"".join(DESC.pack(*desc) for desc in descs)
    put = request(PUT, 2, 200) + b"".join(DESC.pack(*desc) for desc in descs) + b"p" * 200
    fetch = request(FETCH, 8, FETCHED) + PART.pack(3, 0, FETCHED, 0, 1) + b"\0" * 8
    part = request(FETCH, 8, 500) + PART.pack(3, 400, FETCHED, 0, 1) + b"\0" * 8
    confirmed = fetch + request(CONFIRM, argument=3)
    refused = request(FETCH, 8, FETCHED) + PART.pack(3, 0, FETCHED, 0, 1) + b"\1" * 8
    later = request(FETCH, 0, 500) + PART.pack(3, 0, FETCHED, 1, 2)
    stale = request(GET, 1, 1) + DESC.pack(0, 9, 0, 1)
    for start in (ALL, BYTE_BY_BYTE, FEW, b"\x80"):
        yield start + get + put + confirmed + refused + stale
    for frames in (get, put, confirmed, part, refused, later, stale, get + confirmed + confirmed):
        yield ALL + frames


def turn(conn, frames, local=False):
    assert len(frames) % 8 == 0 and len(frames) // 8 < 32
    return bytes([conn | local << 2 | len(frames) // 8 << 3]) + frames


def service_frames():
    yield turn(0, hello(ADMIN)) + turn(0, request(LIST)) + turn(1, hello(LOCAL), True) + turn(1, request(MAP), True)
    yield turn(0, hello(ADMIN)) + turn(1, hello(DATA)) + turn(2, hello(DATA)[:32]) + turn(2, hello(DATA)[32:])
    yield turn(0, hello(ADMIN)) + turn(1, hello(ADMIN)) + turn(2, hello(ADMIN, b"d" * 16)) + turn(0, request(LIST) * 2)
    yield turn(0, hello(ADMIN, token=b"t" * 16)) + turn(1, hello(DATA, token=b"u" * 16))
    yield turn(0, hello(ADMIN, version=9)) + turn(1, hello(DATA, nonce=bytes(16)))


def region_list(regions, sequence=1):
    tags = b"".join(tag for _, _, tag in regions)
    body = b"".join(REGION.pack(number, number + 1, address, size, 0, 0, 1, len(tag), 0)
                    for number, (address, size, tag) in enumerate(regions)) + tags
    return reply(LIST, sequence, len(body), len(regions)) + body


def client_replies():
    asked = struct.pack("<QQ", 5000, 8)
    three = [(4096, 4096, b"kv"), (0, 64, b""), (2**63, 2**62, b"x" * 255)]
    yield asked + ALL + region_list(three)
    yield asked + FEW + region_list(three) + region_list([(4096, 8192, b"one"), (5000, 8, b"two")], 2)
    yield asked + ALL + region_list([], 1) + region_list(three, 1) + region_list(three, 2)
    yield asked + BYTE_BY_BYTE + region_list([(2**64 - 16, 16, b"")])


def stream_replies():
    get_bytes = b"g" * 512
    for start in (ALL, BYTE_BY_BYTE, FEW):
        yield b"\0" + start + reply(GET, size=512) + get_bytes
        yield b"\4" + start + welcome() + reply(GET, size=512) + get_bytes
        yield b"\1" + start + reply(PUT)
        yield b"\2" + start + reply(FETCH, size=512) + get_bytes
        yield b"\2" + start + reply(FETCH, status=103900, argument=2**64 - 5, text=b"not today")
        yield b"\0" + start + reply(GET, status=103900, text=b"no such region")
    yield b"\4" + ALL + welcome(5)
    half = (512 + (300 << 10) - 411) // 2
    yield b"\x08" + ALL + reply(GET, 1, half)[:32] + b"h" * 900


if __name__ == "__main__":
    for target in (data_frames, service_frames, client_replies, stream_replies):
        folder = HERE / "corpus" / target.__name__
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for index, content in enumerate(target()):
            (folder / f"seed-{index:02}").write_bytes(content)

"""SHA-256 and HMAC of the handshake, against published vectors and against Python's own."""
from __future__ import annotations

import hashlib
import hmac
import random

import pytest

from llm_datadist_probes import hmac as probe

RANDOM = random.Random(4231)


@pytest.mark.parametrize("text, digest", [
    (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    (b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"),
    (b"a" * 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
])
def test_the_vectors_of_fips_180(text, digest):
    assert probe.sha256([text]).hex() == digest


@pytest.mark.parametrize("key, text, code", [
    (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
    (b"Jefe", b"what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
    (b"\xaa" * 20, b"\xdd" * 50, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
    (bytes(range(1, 26)), b"\xcd" * 50, "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"),
])
def test_the_vectors_of_rfc_4231(key, text, code):
    assert probe.hmac_sha256(key, [text]).hex() == code


def cut(text):
    """The text in parts of random sizes, some empty."""
    at, parts = 0, []
    while at < len(text):
        size = RANDOM.randrange(0, 150)
        parts.append(text[at:at + size])
        at += size
    return parts


def test_every_length_around_a_block():
    for size in range(300):
        text = RANDOM.randbytes(size)
        assert probe.sha256([text]) == hashlib.sha256(text).digest()


def test_random_texts_in_random_parts():
    for _ in range(2000):
        key, text = RANDOM.randbytes(RANDOM.randrange(65)), RANDOM.randbytes(RANDOM.randrange(2000))
        assert probe.hmac_sha256(key, cut(text)) == hmac.new(key, text, "sha256").digest()


def test_codes_are_equal_only_whole():
    code = RANDOM.randbytes(32)
    assert probe.equal(code, bytes(code))
    for bit in range(256):
        other = bytearray(code)
        other[bit // 8] ^= 1 << bit % 8
        assert not probe.equal(code, bytes(other))

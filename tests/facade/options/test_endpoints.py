"""Endpoints of a network identity, byte by byte as the C API lays them out."""
import json
import struct

import pytest

from llm_datadist.options.endpoints import ENDPOINT_BYTES, endpoints_of
from llm_datadist.status import LLMParamInvalidError

OPTION = "llm.LocalCommRes"


def one(entry, device_id=3):
    text = json.dumps({"version": "1.3", "endpoint_list": [entry]})
    (endpoint,) = endpoints_of(OPTION, text, device_id)
    assert len(endpoint) == ENDPOINT_BYTES
    return endpoint


def test_nothing_named_gives_no_endpoint():
    assert endpoints_of(OPTION, "", 0) == ()
    assert endpoints_of(OPTION, '{"version": "1.3"}', 0) == ()


def test_roce_on_the_device():
    endpoint = one({"protocol": "roce", "comm_id": "10.1.2.3", "placement": "device"})
    assert struct.unpack_from("<ii4B", endpoint) == (1, 0, 10, 1, 2, 3)
    assert endpoint[12:44] == b"\xff" * 32
    assert struct.unpack_from("<iIIII", endpoint, 44) == (0, 3, 0, 0, 0)
    assert endpoint[64:] == b"\xff" * (ENDPOINT_BYTES - 64)


def test_ipv6_on_the_host():
    endpoint = one({"protocol": "uboe", "comm_id": "fe80::1", "placement": "host"})
    assert struct.unpack_from("<ii", endpoint) == (7, 1)
    assert endpoint[8:24] == bytes.fromhex("fe80" + "00" * 13 + "01")
    assert struct.unpack_from("<iI", endpoint, 44) == (1, 0)


def test_hccs_is_addressed_by_device():
    endpoint = one({"protocol": "hccs", "comm_id": "", "placement": "device"}, device_id=5)
    assert struct.unpack_from("<iiI", endpoint) == (0, 2, 5)
    assert struct.unpack_from("<iIIII", endpoint, 44) == (0, 5, 0xFFFFFFFF, 0, 0)


@pytest.mark.parametrize(("protocol", "number"), [("ub_ctp", 4), ("ub_rtp", 9)])
def test_ub_is_addressed_by_eid(protocol, number):
    endpoint = one({"protocol": protocol, "comm_id": "00112233445566778899aabbccddeeff", "placement": "device"})
    assert struct.unpack_from("<ii", endpoint) == (number, 3)
    assert endpoint[8:24] == bytes.fromhex("00112233445566778899aabbccddeeff")


def test_a_rank_table_names_the_own_device():
    table = {"version": "1.0", "server_list": [{"server_id": "0", "device": [
        {"device_id": "1", "device_ip": "10.0.0.1"}, {"device_id": "2", "device_ip": "10.0.0.2"}]}]}
    (endpoint,) = endpoints_of(OPTION, json.dumps(table), 2)
    assert endpoint[8:12] == bytes([10, 0, 0, 2])


@pytest.mark.parametrize("entry", [
    {"protocol": "smoke", "comm_id": "1.2.3.4", "placement": "device"},
    {"protocol": "roce", "comm_id": "nowhere", "placement": "device"},
    {"protocol": "roce", "comm_id": "1.2.3.4", "placement": "moon"},
    {"protocol": "ub_ctp", "comm_id": "00ff", "placement": "device"},
])
def test_what_is_unknown_is_refused_by_name(entry):
    with pytest.raises(LLMParamInvalidError, match=OPTION):
        one(entry)

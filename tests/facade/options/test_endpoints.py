"""Endpoints of a network identity, byte by byte as the C API lays them out."""
import json
import struct

import pytest

from llm_datadist.options.endpoints import ENDPOINT_BYTES, RECORD_BYTES, Endpoints, endpoints_of
from llm_datadist.status import LLMParamInvalidError

OPTION = "llm.LocalCommRes"


def records(config, device_id=3, physical_id=3, environ=None, **facts):
    text = config if isinstance(config, str) else json.dumps(config)
    found = endpoints_of(OPTION, text).records(device_id, physical_id, environ=environ or {}, **facts)
    assert {len(record) for record in found} == {RECORD_BYTES}
    return found


def one(entry, device_id=3, **facts):
    (record,) = records({"version": "1.3", "endpoint_list": [entry]}, device_id, device_id, **facts)
    return record[:ENDPOINT_BYTES]


@pytest.mark.parametrize("text", ["", "{}", '{"version": "1.3"}', '{"version": "1.3", "endpoint_list": []}'])
def test_what_names_no_endpoint_is_made_up_from_the_device(text, tmp_path):
    conf = tmp_path / "hccn.conf"
    conf.write_text("address_3=192.0.2.3\naddress_30=192.0.2.4\n", encoding="ascii")
    assert endpoints_of(OPTION, text) == Endpoints()
    hccs, roce = records(text, environ={"LLM_DATADIST_HCCN_CONF": str(conf)}, super_device_id=9, super_pod=2)
    assert struct.unpack_from("<iiI", hccs) == (0, 2, 3)
    assert struct.unpack_from("<iIIII", hccs, 44) == (0, 3, 9, 0, 2)
    assert struct.unpack_from("<ii4B", roce) == (1, 0, 192, 0, 2, 3)
    assert hccs[192:].rstrip(b"\0") == b"super-pod-2"
    (only,) = records(text, environ={"LLM_DATADIST_HCCN_CONF": "/nowhere"})
    assert only[192:].startswith(b"machine-")


def test_without_hccs_and_without_an_address_there_is_nothing_to_make_up():
    with pytest.raises(LLMParamInvalidError, match=r"/nowhere has no address_3.*local_comm_res"):
        records("", environ={"LLM_DATADIST_HCCN_CONF": "/nowhere", "HCCL_INTRA_ROCE_ENABLE": "1"})


def test_planes_and_the_super_node_travel_along():
    (record,) = records({"version": "1.3", "net_instance_id": "node", "endpoint_list": [
        {"protocol": "roce", "comm_id": "10.1.2.3", "placement": "host", "plane": "p1"}]})
    assert record[160:192].rstrip(b"\0") == b"p1"
    assert record[192:].rstrip(b"\0") == b"node"


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


@pytest.mark.parametrize(("comm_id", "number"), [("", 5), ("5", 5), ("12", 12)])
def test_hccs_is_addressed_by_a_device_number(comm_id, number):
    endpoint = one({"protocol": "hccs", "comm_id": comm_id, "placement": "device"}, device_id=5)
    assert struct.unpack_from("<iiI", endpoint) == (0, 2, number)
    assert struct.unpack_from("<iIIII", endpoint, 44) == (0, 5, 0xFFFFFFFF, 0, 0)


@pytest.mark.parametrize(("protocol", "number"), [("ub_ctp", 4), ("ub_rtp", 9)])
def test_ub_is_addressed_by_eid(protocol, number):
    endpoint = one({"protocol": protocol, "comm_id": "00112233445566778899aabbccddeeff", "placement": "device"})
    assert struct.unpack_from("<ii", endpoint) == (number, 3)
    assert endpoint[8:24] == bytes.fromhex("00112233445566778899aabbccddeeff")


TABLE = {"version": "1.2", "server_list": [{"server_id": "0", "device": [
    {"device_id": "1", "device_ip": "10.0.0.1"},
    {"device_id": "2", "device_ip": "10.0.0.2", "super_device_id": "77"}]}]}


@pytest.mark.parametrize(("device_id", "physical_id", "last"), [(0, 2, 2), (1, 2, 2), (2, 9, 2), (8, 9, 1)])
def test_a_rank_table_names_the_own_device(device_id, physical_id, last):
    (record,) = records(TABLE, device_id, physical_id, super_device_id=5)
    assert record[8:12] == bytes([10, 0, 0, last])
    assert struct.unpack_from("<iII", record, 44) == (0, physical_id, 77 if last == 2 else 5)


@pytest.mark.parametrize("entry", [
    {"protocol": "smoke", "comm_id": "1.2.3.4", "placement": "device"},
    {"protocol": "roce", "comm_id": "nowhere", "placement": "device"},
    {"protocol": "roce", "comm_id": "1.2.3.4", "placement": "moon"},
    {"protocol": "ub_ctp", "comm_id": "00ff", "placement": "device"},
    {"protocol": "hccs", "comm_id": "five", "placement": "device"},
    {"protocol": "roce", "comm_id": "1.2.3.4", "placement": "device", "plane": "p" * 32},
])
def test_what_is_unknown_is_refused_by_name(entry):
    with pytest.raises(LLMParamInvalidError, match=OPTION):
        one(entry)

"""Rank tables as clients pass them: members, addresses, and what is no table."""
import copy
import json

import pytest

from llm_datadist.links.rank_table import Member, parse_rank_table

TABLE = {
    "version": "1.0", "status": "completed", "server_count": "2",
    "server_list": [
        {"server_id": "10.0.0.1", "device": [{"device_id": "0", "device_ip": "192.168.1.1", "rank_id": "0"},
                                             {"device_id": "1", "device_ip": "192.168.1.2", "rank_id": "1"}]},
        {"server_id": "1", "host_ip": "10.0.0.2", "device": [{"device_id": "3", "device_ip": "", "rank_id": "2"}]},
    ],
}


def changed(path, value):
    """The table with one entry changed, or left out where `value` is None."""
    table = copy.deepcopy(TABLE)
    *parents, last = path
    entry = table
    for step in parents:
        entry = entry[step]
    if value is None:
        del entry[last]
    else:
        entry[last] = value
    return table


def test_members():
    assert parse_rank_table(json.dumps(TABLE)) == {
        0: Member(0, "10.0.0.1", 0, "10.0.0.1"), 1: Member(1, "10.0.0.1", 1, "10.0.0.1"),
        2: Member(2, "1", 3, "10.0.0.2")}


@pytest.mark.parametrize("server, device, address", [
    ({"server_id": "0"}, {}, None), ({"server_id": "0"}, {"device_ip": "192.168.0.9"}, "192.168.0.9"),
    ({"server_id": "10.0.0.1"}, {"device_ip": "192.168.0.9"}, "10.0.0.1"),
    ({"server_id": "10.0.0.1", "host_ip": "10.0.0.7"}, {"device_ip": "192.168.0.9"}, "10.0.0.7"),
    ({"server_id": "node7", "host_ip": "host"}, {"device_ip": "no"}, None), ({"server_id": "0.0.0.0"}, {}, None),
    ({"server_id": "fe80::1"}, {}, "fe80::1"), ({"server_id": " 10.0.0.1 "}, {}, "10.0.0.1"),
    ({"server_id": 0}, {}, None),
])
def test_address_is_the_first_that_is_one(server, device, address):
    table = {"server_list": [{**server, "device": [{"device_id": 0, "rank_id": 0, **device}]}]}
    assert parse_rank_table(json.dumps(table))[0].address == address


@pytest.mark.parametrize("table", [
    changed(["version"], "1.2"), changed(["version"], None), changed(["version"], 1.0), changed(["status"], None),
    changed(["server_count"], 2), changed(["server_count"], None),
    changed(["server_list", 1, "device", 0, "rank_id"], 2),
    {**changed(["version"], "1.2"), "super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "1"}]}]},
])
def test_what_may_vary(table):
    assert set(parse_rank_table(json.dumps(table))) == {0, 1, 2}


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"table"', "{}", "not json"])
def test_no_table(assert_raises, text):
    assert "rank_table" in str(assert_raises("PI", parse_rank_table, text))


@pytest.mark.parametrize("path, value, word", [
    (["version"], "2.0", "2.0"), (["status"], "initializing", "initializing"), (["server_count"], "3", "3"),
    (["server_count"], "two", "two"), (["server_list"], [], "server_list"), (["server_list"], None, "server_list"),
    (["server_list"], {}, "server_list"), (["server_list", 0], "server", "server_list"),
    (["server_list", 0, "server_id"], None, "server_list[0]"), (["server_list", 1, "device"], [], "server_list[1]"),
    (["server_list", 1, "device"], None, "device"), (["server_list", 1, "device", 0], 3, "device"),
    (["server_list", 0, "device", 1, "rank_id"], None, "device[1]"),
    (["server_list", 0, "device", 1, "rank_id"], "x", "rank_id"),
    (["server_list", 0, "device", 1, "rank_id"], "-1", "rank_id"),
    (["server_list", 0, "device", 1, "rank_id"], str(2**32), "rank_id"),
    (["server_list", 0, "device", 1, "rank_id"], "0", "twice"),
    (["server_list", 0, "device", 1, "device_id"], None, "device_id"),
    (["server_list", 0, "device", 1, "device_id"], [], "device_id"),
])
def test_errors_say_where(assert_raises, path, value, word):
    assert word in str(assert_raises("PI", parse_rank_table, json.dumps(changed(path, value))))

"""What CANN demands, rule by rule: each test fails when the core breaks its rule. ``docs/ascend.md`` lists them."""
import json

import pytest
from cann import steps
from support.link_steps import fetch, links, offer, withdraw
from support.peer import engine_options
from support.strict import PHYSICAL, build, comm_res

BAD_CONTEXT = {107002, 107003}
HIXL_CALLS = ("HixlCSServer", "HixlCSClient")


@pytest.fixture(params=["device-hccs", "device-roce", "host-roce"])
def pair(request, machines):
    return machines.pair(request.param)


# ---------------------------------------------------------------------------------------------- 1: late memory

def test_memory_registered_after_the_link_is_reached_from_both_ends(pair):
    here, there = pair
    there.call(steps.register, "source", 7, key=True)
    here.call(steps.register, "target", 0)
    assert here.call(steps.pull, 1, "target") == {7}
    here.call(steps.unregister, "target")
    there.call(steps.unregister, "source")


def test_memory_that_was_unregistered_is_forgotten_by_servers_and_clients(pair):
    here, there = pair
    source = there.call(steps.allocate, "source", 9)
    here.call(steps.register, "target", 0)
    assert here.call(steps.pull, 1, "target", source) == {9}
    before = here.call(steps.strict_live)["registrations"]
    here.call(steps.unregister, "target")
    assert here.call(steps.strict_live)["registrations"] == before - 2
    here.call(steps.register_again, "memory of target", "part", steps.SIZE // 2)    # overlaps what was there
    here.call(steps.allocate, "pooled", 0)
    assert here.call(steps.pull, 1, "pooled", source) == {9}
    here.call(steps.unregister, "part")
    here.call(steps.deallocate, "pooled")
    there.call(steps.deallocate, "source")


def test_memory_that_two_caches_have_is_known_until_the_last_of_them_goes(pair):
    here, there = pair
    source = there.call(steps.allocate, "source", 9)
    here.call(steps.register, "target", 0)
    here.call(steps.register_again, "target", "other", steps.SIZE)
    assert here.call(steps.pull, 1, "target", source) == {9}
    here.call(steps.unregister, "target")
    assert here.call(steps.pull, 1, "other", source) == {9}
    here.call(steps.unregister, "other")
    there.call(steps.deallocate, "source")


# ------------------------------------------------------------------------------------ 2, 3: contexts and devices

def test_every_call_is_made_on_the_engine_s_device_whatever_the_caller_has_current(machines):
    here, *others = machines.start(9), machines.start(1), machines.start(2)
    for other in others:
        other.call(offer)
        machines.peers.link(here, other)
        assert here.call(fetch, other.cluster_id)
    here.stats()
    for other in others:
        machines.peers.unlink(here, other)
        other.call(withdraw)
    here.call(set_listener, None)
    here.call(set_listener, ("127.0.0.2", 0))
    for process in (here, *others):
        calls = process.call(steps.strict_calls)
        assert {call.device for call in calls if call.function.startswith(HIXL_CALLS)} == {0}
        assert not refused(calls)


def refused(calls):
    """The calls that lacked a context, but for the question which one there is."""
    return [call for call in calls if call.code in BAD_CONTEXT and not call.function.startswith("aclrtGet")]


def set_listener(node, address):
    node.dist._require_engine().set_listener(address)


def test_threads_without_a_context_link_and_pull(machines):
    here, there = machines.start(2, strange=False), machines.start(1, strange=False)
    source = there.call(steps.allocate, "source", 5)
    here.call(link_in_a_thread, 1, there.address)
    here.call(steps.allocate, "a", 0)
    here.call(steps.allocate, "b", 0)
    assert here.call(steps.pull_from_many_threads, 1, ["a", "b"], source) == [{5}, {5}]
    here.call(steps.deallocate, "a", "b")
    there.call(steps.deallocate, "source")
    assert not refused(here.call(steps.strict_calls))


def link_in_a_thread(node, cluster_id, address):
    from support.link_steps import link_each_in_a_thread
    (code,) = link_each_in_a_thread(node, [(cluster_id, address)])
    assert code.name == "LLM_SUCCESS"


# --------------------------------------------------------------------------------- 4, 5, 13: which endpoints

def test_endpoints_carry_what_the_runtime_calls_the_device(machines):
    here, _ = machines.pair(LDD_STRICT_SUPER_POD="5")
    assert here.call(steps.strict_noted, "super_device") == 0x100
    assert here.call(steps.strict_noted, "super_pod") == 5


@pytest.mark.parametrize("given", ["", '{"version": "1.3"}', None])
def test_without_endpoints_devices_of_one_super_node_use_hccs(machines, given):
    options = engine_options()
    processes = []
    for cluster_id in (2, 1):
        process = machines.peers.child(machines.env())
        chosen = {key: value for key, value in options.items() if key != "llm.LocalCommRes"}
        if given is not None:
            chosen["llm.LocalCommRes"] = given
        process.open(cluster_id, chosen, machines_role())
        processes.append(process)
    here, there = processes
    machines.peers.link(here, there)
    assert here.call(steps.strict_noted, "protocol") == 0
    assert here.call(steps.strict_noted, "location") == 0


def machines_role():
    from llm_datadist import LLMRole
    return LLMRole.MIX


def test_without_endpoints_devices_of_two_super_nodes_use_roce_by_the_device_s_own_port(machines, tmp_path):
    conf = tmp_path / "hccn.conf"
    conf.write_text(f"address_0=192.0.2.1\naddress_{PHYSICAL}=127.0.0.1\nnetmask_0=255.0.0.0\n", encoding="ascii")
    here = machines.start(2, None, LLM_DATADIST_HCCN_CONF=str(conf), LDD_STRICT_SUPER_POD="1")
    there = machines.start(1, None, LLM_DATADIST_HCCN_CONF=str(conf), LDD_STRICT_SUPER_POD="2")
    machines.peers.link(here, there)
    assert here.call(steps.strict_noted, "protocol") == 1
    assert here.call(steps.strict_noted, "server_endpoints") == 2


def test_devices_that_cannot_reach_each_other_are_told_which_endpoints_there_are(machines):
    here = machines.start(2, None, LDD_STRICT_SUPER_POD="1", LLM_DATADIST_HCCN_CONF="/nowhere")
    there = machines.start(1, None, LDD_STRICT_SUPER_POD="2", LLM_DATADIST_HCCN_CONF="/nowhere")
    code, log = here.call(steps.link_error, 1, there.address)
    assert code == "LLM_LINK_FAILED"
    for part in ("hccs on the device", "super-pod-1", "super-pod-2", "local_comm_res"):
        assert part in log


def test_without_any_endpoint_init_says_what_to_set(machines):
    with pytest.raises(ValueError, match=r"address_4.*local_comm_res"):
        machines.start(2, None, HCCL_INTRA_ROCE_ENABLE="1", LLM_DATADIST_HCCN_CONF="/nowhere")


def listed(*entries, **more):
    resources = {"version": "1.3", "endpoint_list": list(entries), **more}
    return {**engine_options(), "llm.LocalCommRes": json.dumps(resources)}


def entry(protocol, placement="device", **more):
    address = {"hccs": str(PHYSICAL), "roce": "127.0.0.1", "uboe": "127.0.0.1"}.get(protocol, "00" * 16)
    return {"protocol": protocol, "comm_id": address, "placement": placement, **more}


def linked(machines, ours, theirs):
    return [with_options(machines, 2, listed(*ours)), with_options(machines, 1, listed(*theirs))]


def with_options(machines, cluster_id, options):
    process = machines.peers.child(machines.env())
    process.open(cluster_id, options, machines_role())
    return process


@pytest.mark.parametrize(("ours", "theirs", "protocol", "location"), [
    ([entry("roce", "host"), entry("hccs")], [entry("roce"), entry("hccs")], 0, 0),
    ([entry("roce", "host"), entry("roce")], [entry("roce"), entry("roce", "host")], 1, 0),
    ([entry("hccs"), entry("ub_ctp", plane="1")], [entry("ub_ctp", plane="2"), entry("hccs")], 0, 0),
    ([entry("hccs"), entry("ub_ctp", plane="1")], [entry("ub_ctp", plane="1"), entry("hccs")], 4, 0),
    ([entry("ub_rtp"), entry("uboe"), entry("hccs")], [entry("uboe"), entry("ub_rtp"), entry("hccs")], 0, 0),
    ([entry("roce"), entry("ub_rtp"), entry("uboe")], [entry("roce"), entry("ub_rtp"), entry("uboe")], 7, 0),
    ([entry("roce"), entry("ub_rtp"), entry("hccs")], [entry("roce"), entry("ub_rtp"), entry("uboe")], 9, 0),
])
def test_of_all_pairs_the_best_is_taken(machines, ours, theirs, protocol, location):
    here, there = linked(machines, ours, theirs)
    there.call(offer)
    machines.peers.link(here, there)
    assert here.call(fetch, 1)
    assert here.call(steps.strict_noted, "protocol") == protocol
    assert here.call(steps.strict_noted, "location") == location
    here.call(offer)
    assert there.call(fetch, 2)                     # the accepting end picks the same kind
    assert there.call(steps.strict_noted, "protocol") == protocol
    here.call(withdraw)
    there.call(withdraw)


def test_what_ends_with_a_super_node_is_not_taken_to_another(machines):
    networks = entry("ub_ctp"), entry("hccs"), entry("ub_rtp")
    here, there = (with_options(machines, cluster_id, listed(*networks, net_instance_id=name))
                   for cluster_id, name in ((2, "one"), (1, "two")))
    machines.peers.link(here, there)
    assert here.call(steps.strict_noted, "protocol") == 9


def test_no_pair_at_all(machines):
    here, there = linked(machines, [entry("hccs")], [entry("roce", "host", plane="fast")])
    code, log = here.call(steps.link_error, 1, there.address)
    assert code == "LLM_LINK_FAILED"
    assert "hccs on the device" in log and "roce on the host of plane fast" in log


def test_a_peer_over_another_provider_is_told_apart(machines):
    here = machines.start(2)
    there = machines.peers.start(1, engine_options(), env={"LLM_DATADIST_PROVIDER": "host", "LDD_TEST_STRICT": ""})
    code, log = here.call(steps.link_error, 1, there.address)
    assert code == "LLM_LINK_FAILED" and "another provider" in log


# ------------------------------------------------------------------------------------------ 6, 7: what is passed on

@pytest.mark.parametrize(("options", "env", "expected"), [
    ({}, {}, (132, 4)),
    ({"llm.RdmaTrafficClass": "100", "llm.RdmaServiceLevel": "2"}, {}, (100, 2)),
    ({}, {"HCCL_RDMA_TC": "64", "HCCL_RDMA_SL": "1"}, (64, 1)),
    ({"llm.RdmaTrafficClass": "0", "llm.RdmaServiceLevel": "0"}, {"HCCL_RDMA_TC": "64"}, (0, 0)),
])
def test_quality_of_service_reaches_the_channel(machines, options, env, expected):
    here, _ = machines.pair("device-roce", options={**engine_options(), **options}, **env)
    assert (here.call(steps.strict_noted, "tc"), here.call(steps.strict_noted, "sl")) == expected


def test_a_traffic_class_no_network_takes_is_refused(machines):
    with pytest.raises(ValueError, match="rdma_traffic_class is 256"):
        machines.start(2, options={**engine_options(), "llm.RdmaTrafficClass": "256"})


def test_the_resource_configuration_reaches_servers_and_clients(machines):
    config = '{"comm_resource_config.max_active_channels": 64, "comm_resource_config.qos": 3}'
    here, _ = machines.pair(options={**engine_options(), "llm.GlobalResourceConfig": config})
    sent = 0
    for byte in config.encode():
        sent = (sent * 131 + byte) % 2**64
    for name in ("server_config", "client_config"):
        assert here.call(steps.strict_noted, name) == sent & 0x7FFFFFFF


# --------------------------------------------------------------------------------------------- 8, 9: what is answered

@pytest.mark.parametrize(("code", "name"), [
    (107002, "LLM_FAILED"), (107019, "LLM_TIMEOUT"), (207000, "LLM_FEATURE_NOT_ENABLED"),
    (207001, "LLM_OUT_OF_MEMORY"), (207018, "LLM_OUT_OF_MEMORY"), (507046, "LLM_TIMEOUT"),
    (507053, "LLM_DEVICE_MEM_ERROR"), (507054, "LLM_DEVICE_MEM_ERROR"), (507057, "LLM_SUSPECT_REMOTE_ERROR"),
    (503900, "LLM_FAILED"), (103901, "LLM_TIMEOUT"),
])
@pytest.mark.parametrize("function", ["HixlCSClientBatchGetAsync", "HixlCSClientQueryCompleteStatus"])
def test_codes_of_the_runtime_keep_their_meaning(machines, function, code, name):
    here, there = machines.pair()
    there.call(steps.allocate, "source", 3, key=True)
    here.call(steps.allocate, "target", 0)
    here.call(steps.fail, function, 1, code)
    assert here.call(steps.pull_error, 1, "target")[:2] == (name, code)
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")


def test_a_provider_without_room_is_asked_again_and_the_link_stays(pair):
    here, there = pair
    there.call(steps.allocate, "source", 3, key=True)
    here.call(steps.allocate, "target", 0)
    here.call(steps.fail, "HixlCSClientBatchGetAsync", 1, 203900)
    assert here.call(steps.pull, 1, "target") == {3}
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")


def test_a_provider_that_never_has_room_is_a_timeout_and_the_link_stays(machines):
    here, there = machines.pair(options=engine_options(timeout_ms=300))
    there.call(steps.allocate, "source", 3, key=True)
    here.call(steps.allocate, "target", 0)
    here.call(steps.fail, "HixlCSClientBatchGetAsync", -1, 203900)
    assert here.call(steps.pull_error, 1, "target")[:2] == ("LLM_TIMEOUT", 203900)
    here.call(steps.fail, "", 0, 0)
    assert here.call(links) == [(1, "local", "active")]
    assert here.call(steps.pull, 1, "target") == {3}
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")


# ------------------------------------------------------------------------------------- 10, 11: overlap, optional

def test_overlapping_memory_is_refused_and_links_still_work(machines):
    here, there = machines.start(2), machines.start(1)
    here.call(steps.register, "whole", 0)
    with pytest.raises(ValueError, match=r"0x\w+ overlap the 65536 bytes at 0x\w+"):
        here.call(steps.register_again, "whole", "part", 100)
    there.call(offer)
    machines.peers.link(here, there)
    assert here.call(fetch, 1)
    here.call(steps.unregister, "whole")
    there.call(withdraw)


def test_a_runtime_without_aclInit_works(machines, tmp_path):
    here, there = machines.pair(home=build(tmp_path / "cann", hidden=("aclInit",)))
    there.call(offer)
    assert here.call(fetch, 1)
    assert "aclInit" not in {call.function for call in here.call(steps.strict_calls)}
    there.call(withdraw)


# ------------------------------------------------------------------------------ 12, 15: calls that take their time

def slow_pair(machines, timeout_ms=400, **env):
    here = machines.start(2, "host-roce", options=engine_options(timeout_ms=timeout_ms), **env)
    there = machines.start(1, "host-roce")
    machines.peers.link(here, there)
    there.call(steps.allocate, "source", 3, key=True)
    here.call(steps.allocate, "target", 0)
    return here, there


def test_a_batch_within_its_call_is_given_up_at_the_deadline_and_its_memory_kept(machines):
    here, there = slow_pair(machines, LDD_STRICT_SUBMIT_MS="2500", LLM_DATADIST_LINK_HEAL_MS="0")
    assert here.call(steps.pull_error, 1, "target")[0] == "LLM_TIMEOUT"
    assert here.call(steps.strict_noted, "moved") == 0
    here.call(steps.deallocate, "target")
    assert here.stats()["pins"] == 1                    # nobody gets the memory while bytes may come
    assert here.call(steps.until_moved, 1)
    assert here.call(steps.until_unpinned) == 0
    assert here.call(steps.until_no_clients) == 0
    there.call(steps.deallocate, "source")


def test_ctrl_c_gets_through_a_batch_within_its_call(machines):
    here, there = slow_pair(machines, timeout_ms=10000, strange=False, LDD_STRICT_SUBMIT_MS="2000")
    assert here.call(steps.interrupted_pull, 1, "target") == "KeyboardInterrupt after 0"
    assert here.call(steps.until_unpinned) == 0
    here.call(steps.deallocate, "target")
    there.call(steps.deallocate, "source")


def test_finalize_waits_for_a_batch_that_was_given_up(machines):
    here, there = slow_pair(machines, LDD_STRICT_SUBMIT_MS="1500")
    assert here.call(steps.pull_error, 1, "target")[0] == "LLM_TIMEOUT"
    here.finalize()
    assert here.call(steps.strict_noted, "moved") == 1
    assert {name: count for name, count in here.call(steps.strict_live).items() if name != "devices" and count} == {}
    there.call(steps.deallocate, "source")


def test_bytes_that_come_after_the_deadline_find_their_memory_kept(machines):
    here = machines.start(2, options=engine_options(timeout_ms=300), LDD_STRICT_LATE_MS="4000")
    there = machines.start(1)
    machines.peers.link(here, there)
    there.call(steps.allocate, "source", 3, key=True)
    here.call(steps.allocate, "target", 0)
    assert here.call(steps.pull_error, 1, "target")[0] == "LLM_TIMEOUT"
    here.call(steps.deallocate, "target")
    assert here.call(steps.strict_noted, "moved") == 0 and here.stats()["pins"] == 1
    assert here.call(steps.until_moved, 1)
    assert here.call(steps.until_unpinned) == 0
    there.call(steps.deallocate, "source")


def test_a_slow_client_creation_does_not_outlive_the_deadline_of_its_link(machines):
    here = machines.start(2, LDD_STRICT_CREATE_MS="1500")
    there = machines.start(1)
    code, log = here.call(steps.link_error, 1, there.address, 300)
    assert code in ("LLM_TIMEOUT", "LLM_LINK_FAILED") and "creating the data client" in log
    assert here.call(steps.strict_noted, "clients") == 0
    machines.peers.link(here, there)
    there.call(offer)
    assert here.call(fetch, 1)
    machines.peers.unlink(here, there)
    assert here.call(steps.until_no_clients) == 0
    there.call(withdraw)


def test_the_peer_waits_for_a_client_that_is_slow_to_be_created(machines):
    here = machines.start(2, LDD_STRICT_CREATE_MS="7000")   # longer than a silent handshake may take
    there = machines.start(1)
    machines.peers.link(here, there, timeout_ms=20000)
    assert here.call(links) == [(1, "local", "active")]


@pytest.mark.parametrize("config", [
    '{"comm_resource_config.listen_port": 65536}', '{"comm_resource_config.listen_port": 0}',
    '{"comm_resource_config.max_active_channels": 0}', '{"comm_resource_config.qos": 8}',
])
def test_a_configuration_out_of_range_is_refused_by_init(machines, config):
    with pytest.raises(ValueError, match=r"103900"):
        machines.start(2, options={**engine_options(), "llm.GlobalResourceConfig": config})


def test_kinds_are_what_they_say():
    assert json.loads(comm_res("host-roce"))["endpoint_list"][0]["placement"] == "host"

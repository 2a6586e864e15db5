"""`EngineOptions.parse`: what the options mean, and every way in which they can be wrong."""
import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_datadist import DataType, LlmConfig, LLMRole
from llm_datadist.options.parser import EngineOptions, PoolOptions, parse_listen_ip_info, parse_switch_listen
from llm_datadist.status import LLMException
from llm_datadist.v2.config import ClusterConfig, EngineConfig
from llm_datadist.v2.llm_utils import CacheDescParser

V2 = {"llm.EnableCacheManager": "1"}
V1 = {"ge.exec.deviceId": "0", "llm.listenIpInfo": "127.0.0.1:26000"}
HIXL = {**V2, "llm.TransferBackend": "hixl", "llm.listenIpInfo": "127.0.0.1:26000"}
LISTEN = ("127.0.0.1", 26000)
RANK_TABLE = {"server_list": [{"server_id": "0", "device": [{"device_id": "0", "device_ip": "1.2.3.4"}]}]}
ENDPOINT = {"protocol": "roce", "comm_id": "1.2.3.4", "placement": "host"}
BUFFER = {"total_size": 4 << 20, "blk_size": 4096, "max_buf_size": 1 << 20}


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


def parse(options, role=LLMRole.PROMPT, cluster_id=7, environ=None):
    before = dict(options) if isinstance(options, dict) else options
    try:
        return EngineOptions.parse(options, role, cluster_id, {} if environ is None else environ)
    finally:
        assert options == before


def test_least_options():
    assert parse(V2) == EngineOptions(
        generation=2, role="Prompt", device_id=0, device_ids=(0,), sync_timeout_ms=1000, remote_cache_accessible=False,
        device_pool=None, host_pool=None, listen=None, listen_all=(), link_total_time_s=120, link_retry_count=1,
        local_comm_res=None, transfer_backend="", global_resource_config="", enable_switch_role=False,
        rdma_traffic_class=None, rdma_service_level=None, provider="auto", link_base_port=26900)
    assert parse(V1) == EngineOptions(generation=1, role="Prompt", listen=LISTEN, listen_all=(LISTEN,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(V2).device_id = 3


@pytest.mark.parametrize("options, expected", [
    ({"ge.exec.deviceId": "3"}, {"device_id": 3, "device_ids": (3,)}),
    ({"llm.SyncKvCacheWaitTime": "2147483647"}, {"sync_timeout_ms": 2147483647}),
    ({"llm.MemPoolConfig": '{"memory_size": 65536}'}, {"device_pool": PoolOptions(65536, 16)}),
    ({"llm.MemPoolConfig": '{"memory_size": 1025, "page_shift": 10, "more": 1}'},
     {"device_pool": PoolOptions(1025, 10)}),
    ({"llm.HostMemPoolConfig": '{"memory_size": 1073741824, "page_shift": 30}'},
     {"host_pool": PoolOptions(1 << 30, 30)}),
    ({"llm.EnableRemoteCacheAccessible": "1"}, {"remote_cache_accessible": True}),
    ({"llm.listenIpInfo": "127.0.0.1:26000"}, {"listen": LISTEN}),
    ({"llm.listenIpInfo": "127.0.0.1:0"}, {"listen": ("127.0.0.1", 0)}),
    ({"llm.listenIpInfo": "localhost:26000"}, {"listen": LISTEN}),
    ({"llm.listenIpInfo": "[::1]:26000"}, {"listen": ("::1", 26000)}),
    ({"llm.listenIpInfo": "127.1:26000"}, {"listen": LISTEN}),
    ({"llm.Checksum": "1"}, {"checksum": True}), ({"llm.Checksum": "0"}, {"checksum": False}),
    ({"llm.Strict": "0"}, {"strict": False}), ({"llm.Strict": "1"}, {"strict": True}),
    ({"llm.ListenIp": "127.0.0.1", "llm.ListenPort": "26000"}, {"listen": LISTEN}),
    ({"llm.ListenIp": "1.1.1.1", "llm.ListenPort": "1", "llm.listenIpInfo": "127.0.0.1:26000"}, {"listen": LISTEN}),
    ({"llm.ListenIp": "127.0.0.1"}, {"listen": None}),
    ({"llm.LinkTotalTime": "4294967295", "llm.LinkRetryCount": "100"},
     {"link_total_time_s": 4294967295, "link_retry_count": 100}),
    ({"llm.RdmaTrafficClass": "0", "llm.RdmaServiceLevel": "4294967295"},
     {"rdma_traffic_class": 0, "rdma_service_level": 4294967295}),
    ({"llm.GlobalResourceConfig": ""}, {"global_resource_config": ""}),
    ({"llm.GlobalResourceConfig": '{"a": 1}'}, {"global_resource_config": '{"a": 1}'}),
    ({"llm.Provider": "host"}, {"provider": "host"}),
    ({"llm.LinkBasePort": "30000"}, {"link_base_port": 30000}),
    ({"llm.BufPoolCfg": json.dumps({"buf_cfg": [BUFFER]})}, {}),
    ({"llm.EnableSwitchRole": "1"}, {"enable_switch_role": True}),
    ({"llm.EnableSwitchRole": "0"}, {"enable_switch_role": False}),
    ({"ge.resourceConfigPath": "{", "other": "x", "llm.MemoryUtilization": "2", "llm.Role": "x",
      "llm.OutputMaxSize": "x", "llm.deployResPath": "", "llm.ClusterInfo": "{"}, {}),
])
def test_accepted(options, expected):
    assert parse({**V2, **options}) == dataclasses.replace(parse(V2), **expected)


@pytest.mark.parametrize("options, generation, remote", [
    (V1, 1, False), ({**V1, "llm.EnableCacheManager": "0"}, 1, False),
    ({**V1, "llm.EnableCacheManager": "yes"}, 1, False), ({**V1, "llm.EnableRemoteCacheAccessible": "1"}, 1, False),
    (V2, 2, False), ({"llm.LocalCommRes": ""}, 2, True), ({**V2, "llm.LocalCommRes": ""}, 2, True),
    ({"llm.LocalCommRes": "", "llm.EnableRemoteCacheAccessible": "0"}, 2, False),
    (HIXL, 2, True), ({**HIXL, "llm.TransferBackend": ""}, 2, True),
    ({**HIXL, "llm.EnableRemoteCacheAccessible": "1"}, 2, True),
])
def test_mode(options, generation, remote):
    parsed = parse(options)
    assert (parsed.generation, parsed.remote_cache_accessible) == (generation, remote)
    assert parsed.local_comm_res == options.get("llm.LocalCommRes")
    assert parsed.transfer_backend == options.get("llm.TransferBackend", "")


@pytest.mark.parametrize("comm_res", [
    {}, {"version": ""}, {"version": "1.0", **RANK_TABLE}, {"version": "1.2", "super_pod_list": [], **RANK_TABLE},
    {"version": "1.3"},
    {"version": "1.3", "net_instance_id": "a", "endpoint_list": [ENDPOINT]}])
def test_local_comm_res_versions(comm_res):
    text = json.dumps(comm_res)
    assert parse({"llm.LocalCommRes": text}).local_comm_res == text


@pytest.mark.parametrize("role, options, expected", [
    (LLMRole.PROMPT, V1, {"listen": LISTEN, "listen_all": (LISTEN,), "role": "Prompt"}),
    (LLMRole.DECODER, V1, {"listen": None, "listen_all": (LISTEN,), "role": "Decoder"}),
    (LLMRole.MIX, V1, {"listen": LISTEN, "listen_all": (LISTEN,), "role": "Mix"}),
    (LLMRole.DECODER, {"ge.exec.deviceId": "1"}, {"listen": None, "listen_all": (), "device_id": 1}),
    (LLMRole.PROMPT, {"ge.exec.deviceId": "2;3", "llm.listenIpInfo": "1.1.1.1:1;2.2.2.2:2"},
     {"listen": ("1.1.1.1", 1), "listen_all": (("1.1.1.1", 1), ("2.2.2.2", 2)), "device_ids": (2, 3), "device_id": 2}),
    (LLMRole.PROMPT, {"ge.exec.deviceId": "0", "llm.ClusterInfo":
                      '{"cluster_id": 7, "listen_ip_info": [{"ip": 16777343, "port": 26000}]}'},
     {"listen": LISTEN, "listen_all": (LISTEN,)}),
    (LLMRole.PROMPT, {"ge.exec.deviceId": "0", "llm.ClusterInfo":
                      '{"listen_ip_info": [{"ip": "127.0.0.1", "port": 26000}]}'},
     {"listen": LISTEN, "listen_all": (LISTEN,)}),
    (LLMRole.PROMPT, {**V1, "ge.flowGraphMemMaxSize": "4096"}, {"device_pool": PoolOptions(4096, 9)}),
    (LLMRole.PROMPT, {**V1, "llm.MemPoolConfig": '{"memory_size": 65536}',
                      "llm.HostMemPoolConfig": '{"memory_size": 65536}'},
     {"device_pool": PoolOptions(65536, 16), "host_pool": None}),
])
def test_first_generation(role, options, expected):
    parsed = parse(options, role)
    assert {name: getattr(parsed, name) for name in expected} == expected and parsed.generation == 1


@pytest.mark.parametrize("options, kind, named", [
    (None, "AE", ""), ([], "TE", "options"), ("llm", "TE", "options"), (5, "TE", "options"),
    ({**V2, "llm.X": 1}, "TE", "llm.X"), ({**V2, 1: "1"}, "TE", "options"),
    ({**V2, "llm.SyncKvCacheWaitTime": 100}, "TE", "llm.SyncKvCacheWaitTime"),
    ({**V2, "llm.LocalCommRes": None}, "TE", "llm.LocalCommRes"),
    *(({**V2, "ge.flowGraphMemMaxSize": value}, kind, "ge.flowGraphMemMaxSize") for value, kind in [
        (1, "TE"), (None, "TE"), ("1,2", "PI"), ("1k", "PI"), ("", "PI"), ("-1", "PI"), ("0", "PI"), ("511", "PI"),
        ("1" * 5000, "PI"), ("\u0661", "PI")]),
    ({"llm.LocalCommRes": "", "llm.EnableCacheManager": "0"}, "PI", "llm.EnableCacheManager"),
    ({**HIXL, "llm.EnableCacheManager": "0"}, "PI", "llm.TransferBackend"),
    ({"llm.TransferBackend": "hixl", "llm.listenIpInfo": "127.0.0.1:1"}, "PI", "llm.TransferBackend"),
    ({**HIXL, "llm.EnableRemoteCacheAccessible": "0"}, "PI", "llm.EnableRemoteCacheAccessible"),
    ({**V2, "llm.TransferBackend": "hixl"}, "PI", "llm.listenIpInfo"),
    *(({**V2, "llm.EnableRemoteCacheAccessible": value}, "PI", "llm.EnableRemoteCacheAccessible")
      for value in ("2", "", "true")),
    ({**V1, "llm.EnableRemoteCacheAccessible": "2"}, "PI", "llm.EnableRemoteCacheAccessible"),
    *(({**V2, "llm.listenIpInfo": value}, kind, "llm.listenIpInfo") for value, kind in [
        ("127.0.0.1", "PI"), ("", "PI"), ("1.2.3.4:1:2", "PI"), ("::1", "PI"), ("[::1", "PI"),
        ("1.2.3.4:", "VE"),
        ("1.2.3.4:port", "VE"), ("1.2.3.4:1;2.2.2.2:2", "PI"), (":26000", "PI"), ("1.2.3.4:65536", "PI"),
        ("1.2.3.4:-1", "PI")]),
    ({**V2, "llm.ListenIp": "1.2.3.4", "llm.ListenPort": "x"}, "VE", "llm.ListenIp"),
    *(({**V2, "ge.exec.deviceId": value}, "PI", "ge.exec.deviceId") for value in (
        "", "x", "-1", "0;1", "1.0", "2147483648", "0;")),
    *(({**V2, "llm.SyncKvCacheWaitTime": value}, "PI", "llm.SyncKvCacheWaitTime") for value in (
        "0", "-1", "1.5", "1s", "", "2147483648")),
    *(({**V2, option: value}, "PI", option) for option in ("llm.MemPoolConfig", "llm.HostMemPoolConfig") for value in (
        "", "{", "[]", "1", "{}", '{"memory_size": 0}', '{"memory_size": "65536"}', '{"memory_size": -65536}',
        '{"memory_size": 65536.0}', '{"memory_size": true}', '{"memory_size": null}', '{"memory_size": 65535}',
        '{"memory_size": 65536, "page_shift": 9}', '{"memory_size": 65536, "page_shift": 31}',
        '{"memory_size": 65536, "page_shift": "16"}', '{"memory_size": 65536, "page_shift": -1}',
        '{"memory_size": 65536, "page_shift": null}', '{"memory_size": 1023, "page_shift": 10}',
        json.dumps({"memory_size": (2**32 - 1) << 10, "page_shift": 10}), '{"memory_size": 9223372036854775808}',
        "[" * 100000)),
    *(({**V2, "llm.BufPoolCfg": as_text(value)}, "PI", "llm.BufPoolCfg") for value in (
        "{", [], {}, {"buf_cfg": {}}, {"buf_cfg": [1]}, {"buf_cfg": [{}]},
        {"buf_cfg": [{**BUFFER, "total_size": (4 << 20) + 1}]}, {"buf_cfg": [{**BUFFER, "total_size": 1 << 33}]},
        {"buf_cfg": [{**BUFFER, "total_size": 0}]}, {"buf_cfg": [{**BUFFER, "blk_size": 0}]},
        {"buf_cfg": [{**BUFFER, "blk_size": 3000}]}, {"buf_cfg": [{**BUFFER, "blk_size": 4 << 20}]},
        {"buf_cfg": [{**BUFFER, "blk_size": 1 << 21}]}, {"buf_cfg": [{**BUFFER, "max_buf_size": 4 << 20}]},
        {"buf_cfg": [{**BUFFER, "max_buf_size": "1"}]}, {"buf_cfg": [BUFFER, BUFFER]})),
    *(({"llm.LocalCommRes": as_text(value)}, "PI", "llm.LocalCommRes") for value in (
        "{", "[]", " ", {"version": "1.1"}, {"version": 1.3}, {"version": ["1.3"]}, {"version": "1.0"},
        {"version": "1.0", "server_list": []}, {"version": "1.2", "server_list": [{"server_id": "0"}]},
        {"version": "1.3", "endpoint_list": []}, {"version": "1.3", "endpoint_list": [{"protocol": "roce"}]})),
    *(({**V2, "llm.GlobalResourceConfig": value}, "PI", "llm.GlobalResourceConfig") for value in ("{", "[]", "1")),
    *(({**V2, "llm.LinkTotalTime": value}, "PI", "llm.LinkTotalTime") for value in ("-1", "", "x", "4294967296")),
    *(({**V2, "llm.LinkRetryCount": value}, "PI", "llm.LinkRetryCount") for value in ("0", "101", "", "x")),
    *(({**V2, option: value}, "PI", option) for option in ("llm.RdmaTrafficClass", "llm.RdmaServiceLevel")
      for value in ("-1", "", "x", "4294967296")),
    *(({**V2, "llm.Provider": value}, "PI", "llm.Provider") for value in ("", "gpu", "HOST")),
    *(({**V2, "llm.LinkBasePort": value}, "PI", "llm.LinkBasePort") for value in ("0", "65536", "")),
    ({"llm.listenIpInfo": "127.0.0.1:26000"}, "PI", "ge.exec.deviceId"),
    ({"ge.exec.deviceId": "0"}, "PI", "llm.listenIpInfo"),
    ({"ge.exec.deviceId": "0;1", "llm.listenIpInfo": "127.0.0.1:26000"}, "PI", "llm.listenIpInfo"),
    ({"ge.exec.deviceId": "0", "llm.listenIpInfo": "127.0.0.1:1;127.0.0.1:2"}, "PI", "llm.listenIpInfo"),
    ({"ge.exec.deviceId": "0", "llm.listenIpInfo": "127.0.0.1"}, "PI", "llm.listenIpInfo"),
    *(({"ge.exec.deviceId": "0", "llm.ClusterInfo": as_text(value)}, "PI", "llm.ClusterInfo") for value in (
        "{", "[]", {}, {"listen_ip_info": []}, {"cluster_id": 8, "listen_ip_info": [{"ip": 1, "port": 1}]},
        {"listen_ip_info": [{"ip": None, "port": 1}]}, {"listen_ip_info": [{"ip": 1, "port": "1"}]},
        {"listen_ip_info": [{"ip": -1, "port": 1}]}, {"listen_ip_info": [{"ip": 1, "port": 65536}]},
        {"listen_ip_info": [{"ip": 1, "port": 1}, {"ip": 2, "port": 2}]})),
])
def test_refused(options, kind, named, assert_raises):
    error = assert_raises(kind, parse, options)
    assert named in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("variable, text, field, value, option", [
    ("HCCL_CONNECT_TIMEOUT", "60", "link_total_time_s", 60, "llm.LinkTotalTime"),
    ("HCCL_RDMA_TC", "132", "rdma_traffic_class", 132, "llm.RdmaTrafficClass"),
    ("HCCL_RDMA_SL", "4", "rdma_service_level", 4, "llm.RdmaServiceLevel"),
    ("LLM_DATADIST_PROVIDER", "host", "provider", "host", "llm.Provider"),
    ("LLM_DATADIST_LINK_BASE_PORT", "31000", "link_base_port", 31000, "llm.LinkBasePort"),
    ("LLM_DATADIST_LINK_HEAL_MS", "0", "link_heal_ms", 0, "llm.LinkHealTime"),
    ("LLM_DATADIST_CACHE_KEY_LEASE_MS", "700", "cache_key_lease_ms", 700, "llm.CacheKeyLeaseMs"),
])
def test_environment(variable, text, field, value, option, assert_raises):
    default = getattr(parse(V2), field)
    assert getattr(parse(V2, environ={variable: text}), field) == value != default
    assert getattr(parse(V2, environ={variable: ""}), field) == default
    assert variable in str(assert_raises("PI", parse, V2, environ={variable: "x"}))
    other = "cann" if field == "provider" else "9"
    assert str(getattr(parse({**V2, option: other}, environ={variable: text}), field)) == other


def test_silence():
    assert parse(V2).link_silence_ms == 3000
    assert parse(V2, environ={"LLM_DATADIST_LINK_SILENCE_MS": "5000"}).link_silence_ms == 5000
    assert parse({**V2, "llm.LinkSilenceTime": "2000"},
                 environ={"LLM_DATADIST_LINK_SILENCE_MS": "5000"}).link_silence_ms == 2000


@pytest.mark.parametrize("text", ["1999", "3600001", "", "3 s"])
def test_silence_that_is_none(text, assert_raises):
    assert "llm.LinkSilenceTime" in str(assert_raises("PI", parse, {**V2, "llm.LinkSilenceTime": text}))


def test_strictness():
    assert not parse(V2, environ={"LLM_DATADIST_STRICT": "0"}).strict
    assert parse({**V2, "llm.Strict": "1"}, environ={"LLM_DATADIST_STRICT": "0"}).strict


def test_checksums():
    assert not parse(V2).checksum
    assert parse(V2, environ={"LLM_DATADIST_CHECKSUM": "1"}).checksum
    assert not parse({**V2, "llm.Checksum": "0"}, environ={"LLM_DATADIST_CHECKSUM": "1"}).checksum


@pytest.mark.parametrize("variable, text", [
    ("LLM_DATADIST_HOST_PATHS", "shm,rdma"), ("LLM_DATADIST_COPY_THREADS", "0"), ("LLM_DATADIST_TCP_STREAMS", "17"),
    ("LLM_DATADIST_SHARED_TABLE", "yes"), ("LLM_DATADIST_HOST_DEVICES", "65"), ("LLM_DATADIST_STRICT", "2"),
    ("LLM_DATADIST_CHECKSUM", "yes"),
])
def test_variables_outside_their_range(variable, text, assert_raises):
    error = assert_raises("PI", parse, V2, environ={variable: text})
    assert variable in str(error) and repr(text) in str(error)


@pytest.mark.parametrize("options, environ, said", [
    ({"llm.SyncKvTimeout": "5"}, {}, "'llm.SyncKvTimeout' is unknown"),
    ({"llm.ListenIpInfo": "127.0.0.1:1"}, {}, "did you mean 'llm.listenIpInfo'?"),
    ({"llm.mempoolconfig": "{}"}, {}, "did you mean 'llm.MemPoolConfig'?"),
    ({}, {"LLM_DATADIST_TCP_STREAM": "4"}, "did you mean 'LLM_DATADIST_TCP_STREAMS'?"),
])
def test_what_nobody_reads_gives_one_warning(options, environ, said):
    with pytest.warns(UserWarning) as caught:
        parse({**V2, **options, "ge.unknown": "x"}, environ=environ)
    assert [str(warning.message).count("unknown and ignored") for warning in caught] == [1]
    assert said in str(caught[0].message)


CLUSTER = {"cluster_id": 7, "logic_device_id": ["0:0:0:0", "0:0:1:0"],
           "listen_ip_info": [{"ip": 0x0100007F, "port": 1}, {"ip": "127.0.0.1", "port": 2}]}


def test_cluster_info_alone_stands_for_device_0():
    parsed = parse({"llm.ClusterInfo": as_text(CLUSTER)})
    assert (parsed.generation, parsed.device_ids, parsed.listen) == (1, (0,), ("127.0.0.1", 1))
    decoder = parse({"llm.ClusterInfo": as_text({"cluster_id": 7, "logic_device_id": ["0:0:0:0"]})}, LLMRole.DECODER)
    assert (decoder.device_ids, decoder.listen) == ((0,), None)


@pytest.mark.parametrize("change", [
    {"logic_device_id": []}, {"logic_device_id": "0:0:0:0"}, {"logic_device_id": ["0"]}, {"logic_device_id": [0, 1]},
    {"logic_device_id": ["0:0:0:0"]}, {"cluster_id": 8}])
def test_cluster_info_alone_refuses(change, assert_raises):
    assert "llm.ClusterInfo" in str(assert_raises("PI", parse, {"llm.ClusterInfo": as_text({**CLUSTER, **change})}))


def test_link_total_time_zero_means_the_environment():
    assert parse({**V2, "llm.LinkTotalTime": "0"}, environ={"HCCL_CONNECT_TIMEOUT": "60"}).link_total_time_s == 60
    assert parse({**V2, "llm.LinkTotalTime": "0"}).link_total_time_s == 120


def test_default_environment_is_that_of_the_process(monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_PROVIDER", "host")
    assert EngineOptions.parse(V2, LLMRole.MIX, 1).provider == "host"


def test_everything_a_config_can_emit_is_accepted():
    config = LlmConfig()
    config.device_id, config.sync_kv_timeout, config.enable_cache_manager = 1, "500", True
    config.enable_remote_cache_accessible, config.listen_ip_info = True, "127.0.0.1:26000"
    config.mem_pool_cfg = config.host_mem_pool_cfg = '{"memory_size": 1048576, "page_shift": 12}'
    config.link_total_time, config.link_retry_count = 30, 3
    config.rdma_traffic_class, config.rdma_service_level = 100, 3
    config.local_comm_res, config.transfer_backend, config.global_resource_config = "", "hixl", ""
    config.output_max_size, config.enable_switch_role, config.mem_utilization = 5, True, 0.5
    config.deploy_res_path, config.cluster_info = "/nowhere", "{}"
    parsed = parse(config.generate_options())
    assert parsed == EngineOptions(
        generation=2, role="Prompt", device_id=1, device_ids=(1,), sync_timeout_ms=500, remote_cache_accessible=True,
        device_pool=PoolOptions(1 << 20, 12), host_pool=PoolOptions(1 << 20, 12), listen=LISTEN, link_total_time_s=30,
        link_retry_count=3, local_comm_res="", transfer_backend="hixl", enable_switch_role=True,
        rdma_traffic_class=100, rdma_service_level=3)


FIELDS = ["memory_size", "page_shift", "version", "server_list", "buf_cfg", "device", "listen_ip_info", "ip", "port"]
KEYS = ["llm.EnableCacheManager", "llm.LocalCommRes", "llm.listenIpInfo", "ge.exec.deviceId", "llm.MemPoolConfig",
        "llm.BufPoolCfg", "llm.SyncKvCacheWaitTime", "llm.TransferBackend", "ge.flowGraphMemMaxSize", "llm.ClusterInfo",
        "llm.EnableRemoteCacheAccessible"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8)
TEXT = st.text(max_size=20) | st.sampled_from(["0", "1", "1.2.3.4:5"]) | JSON.map(json.dumps)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), TEXT), st.sampled_from(LLMRole))
def test_any_text_parses_or_is_refused_by_name(options, role):
    try:
        assert parse(options, role).generation in (1, 2)
    except (LLMException, ValueError) as error:
        assert "option" in str(error)


def test_parse_listen_ip_info(assert_raises):
    assert parse_listen_ip_info("1.2.3.4:26000") == ("1.2.3.4", 26000)
    assert EngineConfig.parse_listen_ip_info("1.2.3.4:26000") == (0x04030201, 26000)
    for parser in (parse_listen_ip_info, EngineConfig.parse_listen_ip_info):
        for text, kind in [("1.2.3.4", "PI"), ("a:b:c", "PI"), ("", "PI"), ("1.2.3.4:x", "VE"), ("1.2.3.4:", "VE")]:
            assert_raises(kind, parser, text)
    assert_raises("RE", EngineConfig.parse_listen_ip_info, "host:1")


def test_parse_switch_listen(assert_raises):
    assert parse_switch_listen(None) is None and parse_switch_listen({"llm.EnableCacheManager": "1"}) is None
    assert parse_switch_listen({"llm.listenIpInfo": "127.0.0.1:26000", "llm.LocalCommRes": "{"}) == LISTEN
    for options, kind in [([], "TE"), ({"llm.listenIpInfo": 1}, "TE"), ({"llm.listenIpInfo": None}, "TE"),
                          ({"llm.listenIpInfo": "x"}, "PI"), ({"llm.listenIpInfo": "x:y"}, "VE"),
                          ({"llm.listenIpInfo": "x:70000"}, "PI")]:
        assert_raises(kind, parse_switch_listen, options)


def test_engine_config():
    config = EngineConfig.from_options(
        {"ge.exec.deviceId": "2;3", "llm.listenIpInfo": "127.0.0.1:1;1.2.3.4:2"}, LLMRole.PROMPT, 7)
    assert config.cluster_config == ClusterConfig(7, (2, 3), ((0x0100007F, 1), (0x04030201, 2)))
    text = config.cluster_config.to_json()
    assert parse({"ge.exec.deviceId": "2;3", "llm.ClusterInfo": text}).listen_all == config.options.listen_all
    assert EngineConfig.from_options({**V2, "llm.listenIpInfo": "127.0.0.1:1"}, LLMRole.MIX, 7) \
        .cluster_config.listen_ip_info == ((0x0100007F, 1),)
    assert EngineConfig.from_options(V2, LLMRole.MIX, 7).cluster_config == ClusterConfig(7)


@pytest.mark.parametrize("options, expected", [
    ({"llm.RefInputShapes": "2,8;2,8", "llm.RefInputDtypes": "1;1"}, (2, [2, 8], DataType.DT_FLOAT16, -1, None)),
    ({"llm.RefInputShapes": "2,-1,8", "llm.RefInputDtypes": "27", "llm.kvTensorFormat": "NZ"},
     (1, [2, -1, 8], DataType.DT_BF16, 1, "NZ")),
    ({"llm.RefInputShapes": "2,-1", "llm.RefInputDtypes": "0", "llm.RefInputSeqLenDimIndex": "1"},
     (1, [2, -1], DataType.DT_FLOAT, 1, None)),
    ({"llm.RefInputShapes": "2,8;2,8", "llm.RefInputDtypes": "0;0", "llm.RefInputSeqLenDimIndex": "1;1"},
     (2, [2, 8], DataType.DT_FLOAT, 1, None)),
])
def test_cache_desc_parser(options, expected):
    desc = CacheDescParser.parse_by_options(options)
    assert (desc.num_tensors, desc.shape, desc.data_type, desc.seq_len_dim_index, desc.kv_tensor_format) == expected


@pytest.mark.parametrize("changes, named", [
    ({"llm.RefInputShapes": None}, "Shapes"), ({"llm.RefInputShapes": ""}, "Shapes"),
    ({"llm.RefInputShapes": "2,8;2,9"}, "Shapes"),
    ({"llm.RefInputShapes": "2,x;2,x"}, "Shapes"), ({"llm.RefInputShapes": "-1,8;-1,8"}, "Shapes"),
    ({"llm.RefInputShapes": "2,-1,-1;2,-1,-1"}, "Shapes"), ({"llm.RefInputShapes": "2,0;2,0"}, "Shapes"),
    ({"llm.RefInputShapes": "2,-2;2,-2"}, "Shapes"), ({"llm.RefInputShapes": "2,8;"}, "Shapes"),
    ({"llm.RefInputDtypes": None}, "Dtypes"), ({"llm.RefInputDtypes": ""}, "Dtypes"),
    ({"llm.RefInputDtypes": "5;5"}, "Dtypes"), ({"llm.RefInputDtypes": "1"}, "Dtypes"),
    ({"llm.RefInputDtypes": "1;0"}, "Dtypes"), ({"llm.RefInputDtypes": "a;a"}, "Dtypes"),
    ({"llm.RefInputSeqLenDimIndex": "2"}, "SeqLen"), ({"llm.RefInputSeqLenDimIndex": "-2"}, "SeqLen"),
    ({"llm.RefInputSeqLenDimIndex": "x"}, "SeqLen"), ({"llm.RefInputSeqLenDimIndex": "0;1"}, "SeqLen"),
    ({"llm.RefInputShapes": "2,-1;2,-1", "llm.RefInputSeqLenDimIndex": "0"}, "SeqLen"),
])
def test_bad_reference_inputs(changes, named, assert_raises):
    options = {"llm.RefInputShapes": "2,8;2,8", "llm.RefInputDtypes": "1;1", **changes}
    options = {key: text for key, text in options.items() if text is not None}
    assert named in str(assert_raises("PI", CacheDescParser.parse_by_options, options))

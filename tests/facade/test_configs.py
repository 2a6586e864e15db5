"""Settings, their errors, and the options they emit."""
import json

import numpy as np
import pytest

from llm_datadist import LLMClusterInfo, LLMConfig, LlmConfig, LLMRole
from llm_datadist.configs import trans_int_ip, trans_str_ip

ALWAYS = {"llm.MemoryUtilization": "0.95"}
TEXTS = {
    "deploy_res_path": "llm.deployResPath", "buf_pool_cfg": "llm.BufPoolCfg", "mem_pool_cfg": "llm.MemPoolConfig",
    "host_mem_pool_cfg": "llm.HostMemPoolConfig", "listen_ip_info": "llm.listenIpInfo",
}
TEXTS_EMITTED_EMPTY = {
    "local_comm_res": "llm.LocalCommRes", "transfer_backend": "llm.TransferBackend",
    "global_resource_config": "llm.GlobalResourceConfig",
}
FLAGS = {
    "enable_cache_manager": "llm.EnableCacheManager",
    "enable_remote_cache_accessible": "llm.EnableRemoteCacheAccessible",
}
UNSET = {
    "ge_options": {}, "device_id": None, "sync_kv_timeout": None, "deploy_res_path": "", "buf_pool_cfg": "",
    "mem_pool_cfg": "", "host_mem_pool_cfg": "", "enable_cache_manager": False,
    "enable_remote_cache_accessible": False, "listen_ip_info": "", "link_total_time": 0, "link_retry_count": 1,
    "link_heal_time": 500, "link_silence_time": 3000, "cache_key_lease_ms": 0,
    "checksum": False,
    "rdma_traffic_class": None, "rdma_service_level": None, "local_comm_res": "", "transfer_backend": "",
    "global_resource_config": "", "cluster_info": "", "output_max_size": None, "enable_switch_role": False,
    "mem_utilization": 0.95,
}
BAD = [
    ("ge_options", [], "TE"), ("ge_options", {"a": 1}, "TE"), ("ge_options", {1: "a"}, "TE"),
    ("ge_options", None, "AE"),
    ("device_id", "0", "TE"), ("device_id", 1.0, "TE"), ("device_id", None, "TE"), ("device_id", [0, "1"], "TE"),
    ("device_id", (None,), "TE"), ("device_id", np.int32(1), "TE"), ("device_id", -1, "PI"),
    ("device_id", [0, -1], "PI"), ("device_id", [], "PI"), ("device_id", 2**31, "VE"), ("device_id", [0, 2**31], "VE"),
    ("sync_kv_timeout", None, "TE"), ("sync_kv_timeout", 1.5, "TE"), ("sync_kv_timeout", [1], "TE"),
    ("sync_kv_timeout", "1s", "PI"), ("sync_kv_timeout", "-1", "PI"), ("sync_kv_timeout", "", "PI"),
    ("sync_kv_timeout", "0", "PI"), ("sync_kv_timeout", "\u00b2", "PI"), ("sync_kv_timeout", 0, "PI"),
    ("sync_kv_timeout", -5, "PI"), ("sync_kv_timeout", 2**31, "VE"), ("sync_kv_timeout", str(2**31), "VE"),
    *((name, 1, "TE") for name in (*TEXTS, *TEXTS_EMITTED_EMPTY)),
    *((name, {}, "TE") for name in (*TEXTS, *TEXTS_EMITTED_EMPTY)),
    *((name, value, "TE") for name in (*FLAGS, "enable_switch_role") for value in (1, "1", 0)),
    ("link_total_time", "1", "TE"), ("link_total_time", None, "TE"), ("link_total_time", 1.0, "TE"),
    ("link_total_time", -1, "PI"), ("link_total_time", 2**32, "PI"),
    ("link_retry_count", "1", "TE"), ("link_retry_count", None, "TE"), ("link_retry_count", 0, "PI"),
    ("link_retry_count", 101, "PI"), ("link_heal_time", -1, "PI"), ("link_silence_time", 1999, "PI"),
    ("cache_key_lease_ms", -1, "PI"), ("cache_key_lease_ms", None, "TE"), ("checksum", 1, "TE"),
    *((name, value, kind) for name in ("rdma_traffic_class", "rdma_service_level")
      for value, kind in ((None, "TE"), ("1", "TE"), (1.0, "TE"), (-1, "VE"), (2**32, "VE"))),
    ("cluster_info", 1, "TE"), ("cluster_info", None, "TE"), ("cluster_info", "{", "VE"), ("cluster_info", "[]", "PI"),
    ("cluster_info", '{"listen_ip_info": {}}', "PI"), ("cluster_info", '{"listen_ip_info": [1]}', "PI"),
    ("cluster_info", '{"listen_ip_info": [{"ip": "1.2.3.x"}]}', "RE"),
    ("output_max_size", "1", "TE"), ("output_max_size", 1.0, "TE"),
    ("mem_utilization", 1, "TE"), ("mem_utilization", "0.5", "TE"), ("mem_utilization", None, "TE"),
    ("mem_utilization", 1.01, "PI"), ("mem_utilization", -0.1, "PI"), ("mem_utilization", float("nan"), "PI"),
]


@pytest.fixture
def config():
    return LlmConfig()


def test_one_class_with_two_names():
    assert LLMConfig is LlmConfig and LlmConfig.__name__ == "LlmConfig"


@pytest.mark.parametrize("name", UNSET)
def test_unset(config, name):
    assert getattr(config, name) == UNSET[name] and type(getattr(config, name)) is type(UNSET[name])
    assert getattr(LlmConfig, name).__doc__


def test_nothing_set_emits_the_memory_utilization_alone(config):
    assert config.generate_options() == ALWAYS


@pytest.mark.parametrize("name, value, kind", BAD)
def test_bad_value(config, name, value, kind, assert_raises):
    error = assert_raises(kind, setattr, config, name, value)
    assert kind in ("AE", "VE", "RE") or name in str(error)
    assert getattr(config, name) == UNSET[name]


@pytest.mark.parametrize("name, value, emitted", [
    *((name, "text", {key: "text"}) for name, key in {**TEXTS, **TEXTS_EMITTED_EMPTY}.items()),
    *((name, "", {}) for name in TEXTS),
    *((name, "", {key: ""}) for name, key in TEXTS_EMITTED_EMPTY.items()),
    *((name, None, {}) for name in (*TEXTS, *TEXTS_EMITTED_EMPTY, *FLAGS, "enable_switch_role", "output_max_size")),
    *((name, flag, {key: "1" if flag else "0"}) for name, key in FLAGS.items() for flag in (True, False)),
    ("enable_switch_role", True, {"llm.EnableSwitchRole": "1"}), ("enable_switch_role", False, {}),
    ("device_id", 3, {"ge.exec.deviceId": "3", "ge.session_device_id": "3"}),
    ("device_id", [4, 5], {"ge.exec.deviceId": "4;5", "ge.session_device_id": "4"}),
    ("device_id", (2**31 - 1,), {"ge.exec.deviceId": "2147483647", "ge.session_device_id": "2147483647"}),
    ("sync_kv_timeout", 1, {"llm.SyncKvCacheWaitTime": "1"}),
    ("sync_kv_timeout", "2147483647", {"llm.SyncKvCacheWaitTime": "2147483647"}),
    ("link_total_time", 0, {"llm.LinkTotalTime": "0"}),
    ("link_total_time", 2**32 - 1, {"llm.LinkTotalTime": "4294967295"}),
    ("link_retry_count", 100, {"llm.LinkRetryCount": "100"}),
    ("link_heal_time", 0, {"llm.LinkHealTime": "0"}), ("link_silence_time", 9000, {"llm.LinkSilenceTime": "9000"}),
    ("cache_key_lease_ms", 50, {"llm.CacheKeyLeaseMs": "50"}),
    ("checksum", True, {"llm.Checksum": "1"}), ("checksum", False, {"llm.Checksum": "0"}),
    ("rdma_traffic_class", 100, {"llm.RdmaTrafficClass": "100"}),
    ("rdma_service_level", 0, {"llm.RdmaServiceLevel": "0"}),
    ("output_max_size", 0, {"llm.OutputMaxSize": "0"}),
    ("mem_utilization", 0.5, {"llm.MemoryUtilization": "0.5"}),
    ("ge_options", {"ge.x": "y"}, {"ge.x": "y"}),
])
def test_emission(config, name, value, emitted):
    setattr(config, name, value)
    assert getattr(config, name) == (UNSET[name] if value is None else value)
    options = config.generate_options()
    assert options == {**ALWAYS, **emitted}
    assert all(type(text) is str for text in options.values())


def test_cluster_info_turns_addresses_into_integers(config):
    config.cluster_info = json.dumps({"cluster_id": 3, "listen_ip_info": [{"ip": "1.2.3.4", "port": 5}, {"ip": 7}]})
    rewritten = {"cluster_id": 3, "listen_ip_info": [{"ip": 0x04030201, "port": 5}, {"ip": 7}]}
    assert json.loads(config.cluster_info) == rewritten
    assert json.loads(config.generate_options()["llm.ClusterInfo"]) == rewritten


def test_a_setting_nobody_knows_gives_a_warning(config):
    with pytest.warns(UserWarning, match="no setting 'mem_pool_config'.* did you mean 'mem_pool_cfg'?"):
        config.mem_pool_config = "{}"
    assert config.mem_pool_config == "{}" and config.generate_options() == ALWAYS


def test_settings_of_a_subclass_are_its_own():
    class Mine(LlmConfig):
        rank = 0

    mine = Mine()
    mine.rank, mine.something_else = 1, 2
    assert (mine.rank, mine.something_else) == (1, 2)


def test_one_options_dict_that_is_never_cleared(config):
    config.local_comm_res = ""
    options = config.generate_options()
    options["llm.RdmaServiceLevel"] = "4"
    config.local_comm_res = None
    assert config.gen_options() is config.generate_options() is config.options is options
    assert options == {**ALWAYS, "llm.LocalCommRes": "", "llm.RdmaServiceLevel": "4"}


def test_raw_options_come_first_and_are_live(config):
    config.ge_options = {"llm.MemoryUtilization": "0.1"}
    config.ge_options["ge.flowGraphMemMaxSize"] = "1024"
    assert config.generate_options() == {**ALWAYS, "ge.flowGraphMemMaxSize": "1024"}


def test_configs_are_independent():
    first, second = LlmConfig(), LlmConfig()
    first.device_id = 1
    first.ge_options["a"] = "b"
    assert second.device_id is None and second.ge_options == {}


@pytest.mark.parametrize("text, number", [
    ("1.2.3.4", 0x04030201), ("127.1", 0x0100007F), ("0.0.0.0", 0), ("255.255.255.255", 2**32 - 1)])
def test_trans_str_ip(text, number):
    assert trans_str_ip(text) == number
    assert trans_str_ip(trans_int_ip(number)) == number


def test_trans_ip_edges(assert_raises):
    for same in (7, None, 1.5):
        assert trans_str_ip(same) is same
    for text in ("", "1.2.3.256", "::1", "host", "1.2.3.4\0"):
        assert str(assert_raises("RE", trans_str_ip, text)).startswith("Can not parse ip str")
    assert_raises("VE", trans_int_ip, 2**32)
    assert_raises("TE", trans_int_ip, "1.2.3.4")


@pytest.mark.parametrize("role, number", [("PROMPT", 1), ("DECODER", 2), ("MIX", 3)])
def test_role(role, number):
    assert LLMRole[role] == number and str(LLMRole[role]) == f"{LLMRole[role]}" == f"LLMRole.{role}"


def test_cluster_info():
    info = LLMClusterInfo()
    assert info.remote_cluster_id is None and info.remote_role_type is None
    info.remote_cluster_id, info.remote_role_type = 2**64 - 1, LLMRole.PROMPT
    assert info.remote_cluster_id == 2**64 - 1 and info.remote_role_type is LLMRole.PROMPT
    info.append_local_ip_info("1.2.3.4", 65535)
    info.append_remote_ip_info(9, 0)
    info.append_remote_ip_info(None, 1)
    named = LLMClusterInfo()
    named.append_remote_ip_info("localhost", 2)
    named.append_remote_ip_info("[::1]", 3)
    named.append_local_ip_info("::1", 4)
    assert named.remote_ip_info_list == [(0x0100007F, 2), ("::1", 3)] and named.local_ip_info_list == [("::1", 4)]
    assert info.local_ip_info_list == [(0x04030201, 65535)] and info.remote_ip_info_list == [(9, 0), (None, 1)]
    assert info.local_ip_info_list is info.local_ip_info_list
    assert "remote_cluster_id=18446744073709551615" in repr(info)


@pytest.mark.parametrize("value, kind", [(None, "TE"), ("1", "TE"), (1.0, "TE"), (-1, "VE"), (2**64, "VE")])
def test_bad_remote_cluster_id(value, kind, assert_raises):
    assert_raises(kind, setattr, LLMClusterInfo(), "remote_cluster_id", value)


@pytest.mark.parametrize("value", ["PROMPT", 1.0, [1]])
def test_bad_remote_role_type(value, assert_raises):
    assert_raises("TE", setattr, LLMClusterInfo(), "remote_role_type", value)


@pytest.mark.parametrize("method", ["append_local_ip_info", "append_remote_ip_info"])
@pytest.mark.parametrize("ip, port, kind", [
    (1.0, 1, "TE"), ([1], 1, "TE"), (b"1.2.3.4", 1, "TE"), ("1.2.3.x", 1, "RE"), ("1.2.3.4", None, "TE"),
    ("1.2.3.4", "1", "TE"), ("1.2.3.4", -1, "VE"), ("1.2.3.4", 65536, "VE"),
])
def test_bad_ip_info(method, ip, port, kind, assert_raises):
    info = LLMClusterInfo()
    assert_raises(kind, getattr(info, method), ip, port)
    assert info.local_ip_info_list == info.remote_ip_info_list == []

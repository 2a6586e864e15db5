"""`EngineOptions`: the options dict of ``init``, parsed once.

The dict comes from ``LlmConfig.generate_options`` and is changed by hand by many clients, so everything is checked
here and nothing is assumed. Keys that are not ours, such as those of ``ge.*``, are left alone. The text of every
error names the option.
"""
from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, Callable, List, Mapping, Optional, Tuple, TypeVar

from llm_datadist.configs import LLMRole, trans_int_ip
from llm_datadist.options.admission import OpenAddresses, closed_text, parse_open, parse_secret, read_secret_file
from llm_datadist.options.endpoints import Endpoints, endpoints_of
from llm_datadist.options.environment import VARIABLES, check_environment
from llm_datadist.options.values import (
    INT32_MAX,
    UINT32_MAX,
    Address,
    PoolOptions,
    check_buffers,
    check_comm_res,
    check_json_object,
    integer_in,
    invalid,
    objects_of,
    one_of,
    parse_address,
    parse_flow_graph_bytes,
    parse_integer,
    parse_json_object,
    parse_listen_ip_info,
    parse_pool,
)
from llm_datadist.status import LLMParamInvalidError
from llm_datadist.utils.spelling import did_you_mean
from llm_datadist.utils.utils import check_isinstance

__all__ = ["EngineOptions", "PoolOptions", "parse_listen_ip_info", "parse_switch_listen"]

DEVICE_ID = "ge.exec.deviceId"
FLOW_GRAPH_MEM_MAX_SIZE = "ge.flowGraphMemMaxSize"
BUF_POOL_CFG = "llm.BufPoolCfg"
CACHE_KEY_LEASE = "llm.CacheKeyLeaseMs"
CHECKSUM = "llm.Checksum"
CLUSTER_INFO = "llm.ClusterInfo"
ENABLE_CACHE_MANAGER = "llm.EnableCacheManager"
ENABLE_REMOTE_CACHE_ACCESSIBLE = "llm.EnableRemoteCacheAccessible"
ENABLE_SWITCH_ROLE = "llm.EnableSwitchRole"
GLOBAL_RESOURCE_CONFIG = "llm.GlobalResourceConfig"
HOST_MEM_POOL_CONFIG = "llm.HostMemPoolConfig"
LINK_BASE_PORT = "llm.LinkBasePort"
LINK_HEAL_TIME = "llm.LinkHealTime"
LINK_RETRY_COUNT = "llm.LinkRetryCount"
LINK_SECRET = "llm.LinkSecret"
LINK_SILENCE_TIME = "llm.LinkSilenceTime"
LINK_TOTAL_TIME = "llm.LinkTotalTime"
LISTEN_IP = "llm.ListenIp"
LISTEN_IP_INFO = "llm.listenIpInfo"
LISTEN_OPEN = "llm.ListenOpen"
LISTEN_PORT = "llm.ListenPort"
LOCAL_COMM_RES = "llm.LocalCommRes"
MEM_POOL_CONFIG = "llm.MemPoolConfig"
PROVIDER = "llm.Provider"
RDMA_SERVICE_LEVEL = "llm.RdmaServiceLevel"
RDMA_TRAFFIC_CLASS = "llm.RdmaTrafficClass"
STRICT = "llm.Strict"
SYNC_KV_CACHE_WAIT_TIME = "llm.SyncKvCacheWaitTime"
TRACE = "llm.Trace"
TRANSFER_BACKEND = "llm.TransferBackend"

# Keys that clients of the original write and that have no effect here, or only in helpers.
INERT = ("llm.Role", "llm.OutputMaxSize", "llm.deployResPath", "llm.MemoryUtilization", "llm.RefInputShapes",
         "llm.RefInputDtypes", "llm.RefInputSeqLenDimIndex", "llm.kvTensorFormat")
KNOWN = (*INERT, BUF_POOL_CFG, CACHE_KEY_LEASE, CHECKSUM, CLUSTER_INFO, ENABLE_CACHE_MANAGER,
         ENABLE_REMOTE_CACHE_ACCESSIBLE, ENABLE_SWITCH_ROLE, GLOBAL_RESOURCE_CONFIG, HOST_MEM_POOL_CONFIG,
         LINK_BASE_PORT, LINK_HEAL_TIME, LINK_RETRY_COUNT, LINK_SECRET, LINK_SILENCE_TIME, LINK_TOTAL_TIME, LISTEN_IP,
         LISTEN_IP_INFO, LISTEN_OPEN, LISTEN_PORT, LOCAL_COMM_RES, MEM_POOL_CONFIG, PROVIDER, RDMA_SERVICE_LEVEL,
         RDMA_TRAFFIC_CLASS, STRICT, SYNC_KV_CACHE_WAIT_TIME, TRACE, TRANSFER_BACKEND)

DEFAULT_SYNC_TIMEOUT_MS = 1000
DEFAULT_LINK_TOTAL_TIME_S = 120
DEFAULT_LINK_HEAL_MS = 500
DEFAULT_LINK_SILENCE_MS = 3000
DEFAULT_LINK_BASE_PORT = 26900      # member with device d of a two-sided link listens at this port + d

_NATIVE_ROLE = {LLMRole.PROMPT: "Prompt", LLMRole.DECODER: "Decoder", LLMRole.MIX: "Mix"}

_T = TypeVar("_T")


@dataclass(frozen=True)
class EngineOptions:
    """Everything an engine is told, in its final form.

    Parameters
    ----------
    generation : int
        2 in cache manager mode, 1 in kv cache manager mode.
    role : str
        ``"Prompt"``, ``"Decoder"`` or ``"Mix"``.
    device_id : int
        Device to bind: the first of `device_ids`.
    device_ids : tuple of int
        All devices; more than one only in generation 1.
    sync_timeout_ms : int
        Deadline of pulls, pushes and transfer steps.
    remote_cache_accessible : bool
        Whether peers read and write our memory directly.
    device_pool, host_pool : PoolOptions, optional
        Pools to create; None for no pool.
    listen : tuple of (str, int), optional
        Address of the listener; None for a pure client.
    listen_all : tuple of (str, int)
        In generation 1 one address per device, also for a role that does not listen yet.
    link_total_time_s : int
        Time budget of ``link``; the environment is already taken into account.
    cache_key_lease_ms : int
        How long an allocated cache's request keys wait to be pulled before they release themselves; 0: for ever.
    link_heal_ms : int
        What a call may spend, of its own time, on a link that it finds broken; 0: links stay broken until unlinked.
    link_silence_ms : int
        How long nothing may come from a peer's host, probes included, before its links end.
    link_retry_count : int
        Attempts of ``link``.
    link_secrets : tuple of bytes
        Keys made of the secrets that peers must know, this side's first; empty: whoever reaches the port may link.
        Not in the representation.
    open_addresses : OpenAddresses
        Where may be listened without a secret.
    local_comm_res : str, optional
        JSON of the network identity; ``""`` means generate it, None that the option is absent.
    transfer_backend : str
        ``""`` when absent.
    global_resource_config : str
        JSON for the backend; ``""`` when absent.
    enable_switch_role : bool
        Whether generation 1 may switch its role.
    rdma_traffic_class, rdma_service_level : int, optional
        Quality of service; None leaves it to the provider.
    provider : str
        ``"auto"``, ``"host"`` or ``"cann"``.
    link_base_port : int
        Port, plus device id, at which members of a two-sided link on other hosts are met.
    endpoints : Endpoints
        What `local_comm_res` says of the network; see ``endpoints.py``.
    strict : bool
        Whether to refuse what the original lets through although it can hardly be meant: unknown keywords of pulls,
        repeated destination blocks, copies and transfers between caches of different data types.
    checksum : bool
        Whether what arrives by pulls and pushes of this process is held against checksums of its source.
    trace : bool
        Whether events are recorded from the start.
    trace_folder : str
        Where the record is kept as a file; ``""`` keeps it in memory, and lets it go with the process.
    record_folder : str
        Where the calls are written down; ``""`` for nowhere.
    """

    generation: int = 2
    role: str = "Mix"
    device_id: int = 0
    device_ids: Tuple[int, ...] = (0,)
    sync_timeout_ms: int = DEFAULT_SYNC_TIMEOUT_MS
    remote_cache_accessible: bool = False
    device_pool: Optional[PoolOptions] = None
    host_pool: Optional[PoolOptions] = None
    listen: Optional[Address] = None
    listen_all: Tuple[Address, ...] = ()
    link_total_time_s: int = DEFAULT_LINK_TOTAL_TIME_S
    cache_key_lease_ms: int = 0
    link_heal_ms: int = DEFAULT_LINK_HEAL_MS
    link_silence_ms: int = DEFAULT_LINK_SILENCE_MS
    link_retry_count: int = 1
    link_secrets: Tuple[bytes, ...] = field(default=(), repr=False)
    open_addresses: OpenAddresses = field(default_factory=OpenAddresses)
    local_comm_res: Optional[str] = None
    transfer_backend: str = ""
    global_resource_config: str = ""
    enable_switch_role: bool = False
    rdma_traffic_class: Optional[int] = None
    rdma_service_level: Optional[int] = None
    provider: str = "auto"
    link_base_port: int = DEFAULT_LINK_BASE_PORT
    endpoints: Endpoints = field(default_factory=Endpoints)
    strict: bool = True
    checksum: bool = False
    trace: bool = False
    trace_folder: str = ""
    record_folder: str = ""

    def may_listen(self, ip: str) -> bool:
        """Whether there is a secret, or it was said that whoever reaches this address may link.

        Parameters
        ----------
        ip : str
            Address, host name, or ``"@name"`` of a socket of this host.
        """
        return bool(self.link_secrets) or self.open_addresses.allows(ip)

    def check_listen(self, ip: str) -> None:
        """Refuse an address that is not to be listened at.

        Parameters
        ----------
        ip : str
            Address, host name, or ``"@name"`` of a socket of this host.

        Raises
        ------
        LLMParamInvalidError
            Not `may_listen`.
        """
        if not self.may_listen(ip):
            raise LLMParamInvalidError(closed_text(ip))

    @classmethod
    def parse(
        cls, options: Mapping[str, str], role: LLMRole, cluster_id: int, environ: Optional[Mapping[str, str]] = None,
    ) -> "EngineOptions":
        """Parse the options dict. It is not changed.

        Parameters
        ----------
        options : dict of str to str
            As of ``LlmConfig.generate_options``. Unknown keys are ignored; those that begin with ``llm.`` give one
            warning, as do variables that begin with ``LLM_DATADIST_``.
        role : LLMRole
            Role of the process.
        cluster_id : int
            Id of the process.
        environ : mapping of str to str, optional
            Environment; default ``os.environ``. Read are ``LLM_DATADIST_PROVIDER``, ``LLM_DATADIST_LINK_BASE_PORT``,
            ``LLM_DATADIST_LINK_HEAL_MS``, ``LLM_DATADIST_LINK_SILENCE_MS``, ``LLM_DATADIST_CACHE_KEY_LEASE_MS``,
            ``LLM_DATADIST_STRICT``, ``LLM_DATADIST_CHECKSUM``, ``LLM_DATADIST_TRACE``, ``LLM_DATADIST_RECORD``,
            ``LLM_DATADIST_SECRET``, ``LLM_DATADIST_SECRET_FILE``, ``LLM_DATADIST_OPEN``, ``HCCL_CONNECT_TIMEOUT``,
            ``HCCL_RDMA_TC`` and ``HCCL_RDMA_SL``; an option wins over its variable. The other variables of this
            package are checked.

        Raises
        ------
        TypeError
            `options` is no dict, or holds something other than str.
        AttributeError
            `options` is None.
        ValueError
            The port of ``llm.listenIpInfo`` is no number.
        LLMParamInvalidError
            An option has a value that is not allowed, or contradicts another.
        """
        check_isinstance("options", options, dict)
        items = options.items()
        check_isinstance(FLOW_GRAPH_MEM_MAX_SIZE, options.get(FLOW_GRAPH_MEM_MAX_SIZE, ""), str, allow_none=False)
        for key, value in items:
            check_isinstance("key of options", key, str, allow_none=False)
            if key == LINK_SECRET and not isinstance(value, str):
                raise TypeError(f"option {key} must be a str, not {type(value).__name__}")     # its value is not shown
            check_isinstance(f"option {key}", value, str, allow_none=False)
        environ = os.environ if environ is None else environ
        unknown_variables = check_environment(environ)
        parsed = _Parser(options, environ, role, cluster_id).parse()
        _warn_of_unknown([key for key in options if key.startswith("llm.") and key not in KNOWN], unknown_variables)
        return parsed


def _warn_of_unknown(options: List[str], variables: List[str]) -> None:
    """Say once what nobody reads: most probably it is misspelt."""
    found = [f"option {name!r} is unknown and ignored; {did_you_mean(name, KNOWN)}" for name in options]
    found += [f"environment variable {name} is unknown and ignored; {did_you_mean(name, VARIABLES)}"
              for name in variables]
    if found:
        warnings.warn(". ".join(found), UserWarning, stacklevel=4)


def parse_switch_listen(switch_options: Optional[Mapping[str, str]]) -> Optional[Address]:
    """Return the address that ``switch_role`` shall listen at; None when the options name none.

    Parameters
    ----------
    switch_options : dict of str to str, optional
        May be a whole dict of ``generate_options``: only ``llm.listenIpInfo`` is read.

    Raises
    ------
    TypeError
        `switch_options` is no dict, or its address no str.
    ValueError
        The port is no number.
    LLMParamInvalidError
        The text is not ``ip:port``, or the port is outside 0..65535.
    """
    check_isinstance("switch_options", switch_options, dict)
    if switch_options is None or LISTEN_IP_INFO not in switch_options:
        return None
    text = check_isinstance(f"option {LISTEN_IP_INFO}", switch_options[LISTEN_IP_INFO], str, allow_none=False)
    return parse_address(LISTEN_IP_INFO, text)


class _Parser:
    """One pass over the options, in the order in which errors are reported."""

    def __init__(self, options: Mapping[str, str], environ: Mapping[str, str], role: LLMRole, cluster_id: int) -> None:
        self._options = options
        self._environ = environ
        self._role = role
        self._cluster_id = cluster_id

    def parse(self) -> EngineOptions:
        flow_graph_pool = self._optional(FLOW_GRAPH_MEM_MAX_SIZE, parse_flow_graph_bytes)
        generation = self._generation()
        remote = self._remote_cache_accessible(generation)
        listen = self._listen() if generation == 2 else None
        device_ids = self._device_ids(generation)
        sync_timeout_ms = self._optional(SYNC_KV_CACHE_WAIT_TIME, integer_in(1, INT32_MAX))
        device_pool = self._optional(MEM_POOL_CONFIG, parse_pool)
        host_pool = self._optional(HOST_MEM_POOL_CONFIG, parse_pool)
        listen_all: Tuple[Address, ...] = ()
        if generation == 1:
            device_pool, host_pool = flow_graph_pool or device_pool, None
            listen_all = self._listen_all(device_ids)
            if listen_all and self._role is not LLMRole.DECODER:
                listen = listen_all[0]
        self._optional(BUF_POOL_CFG, check_buffers)
        self._optional(LOCAL_COMM_RES, check_comm_res)
        self._optional(GLOBAL_RESOURCE_CONFIG, check_json_object)
        return EngineOptions(
            generation=generation, role=_NATIVE_ROLE[self._role], device_id=device_ids[0], device_ids=device_ids,
            sync_timeout_ms=sync_timeout_ms or DEFAULT_SYNC_TIMEOUT_MS,
            # The first generation has no one-sided mode: its pulls always pass through the owner.
            remote_cache_accessible=remote and generation == 2,
            device_pool=device_pool, host_pool=host_pool, listen=listen, listen_all=listen_all,
            link_total_time_s=self._link_total_time_s(),
            cache_key_lease_ms=self._number_or_default(CACHE_KEY_LEASE, "LLM_DATADIST_CACHE_KEY_LEASE_MS", 0),
            link_heal_ms=self._number_or_default(LINK_HEAL_TIME, "LLM_DATADIST_LINK_HEAL_MS", DEFAULT_LINK_HEAL_MS),
            link_silence_ms=self._option_or_variable(
                LINK_SILENCE_TIME, "LLM_DATADIST_LINK_SILENCE_MS",
                integer_in(2000, 3600000)) or DEFAULT_LINK_SILENCE_MS,
            link_retry_count=self._optional(LINK_RETRY_COUNT, integer_in(1, 100)) or 1,
            link_secrets=self._link_secrets(),
            open_addresses=self._option_or_variable(
                LISTEN_OPEN, "LLM_DATADIST_OPEN", parse_open) or OpenAddresses(),
            local_comm_res=self._options.get(LOCAL_COMM_RES),
            endpoints=endpoints_of(LOCAL_COMM_RES, self._options.get(LOCAL_COMM_RES, "")),
            transfer_backend=self._options.get(TRANSFER_BACKEND, ""),
            global_resource_config=self._options.get(GLOBAL_RESOURCE_CONFIG, ""),
            enable_switch_role=self._options.get(ENABLE_SWITCH_ROLE) == "1",
            rdma_traffic_class=self._option_or_variable(RDMA_TRAFFIC_CLASS, "HCCL_RDMA_TC", integer_in(0, UINT32_MAX)),
            rdma_service_level=self._option_or_variable(RDMA_SERVICE_LEVEL, "HCCL_RDMA_SL", integer_in(0, UINT32_MAX)),
            provider=self._option_or_variable(
                PROVIDER, "LLM_DATADIST_PROVIDER", one_of("auto", "host", "cann")) or "auto",
            link_base_port=self._option_or_variable(
                LINK_BASE_PORT, "LLM_DATADIST_LINK_BASE_PORT", integer_in(1, 65535)) or DEFAULT_LINK_BASE_PORT,
            strict=self._option_or_variable(STRICT, "LLM_DATADIST_STRICT", one_of("0", "1")) != "0",
            checksum=self._option_or_variable(CHECKSUM, "LLM_DATADIST_CHECKSUM", one_of("0", "1")) == "1",
            trace=self._trace(), trace_folder=self._environ.get("LLM_DATADIST_TRACE", ""),
            record_folder=self._environ.get("LLM_DATADIST_RECORD", ""))

    def _trace(self) -> bool:
        text = self._optional(TRACE, one_of("0", "1"))
        return text == "1" if text is not None else bool(self._environ.get("LLM_DATADIST_TRACE"))

    def _optional(self, option: str, parser: Callable[[str, str], _T]) -> Optional[_T]:
        text = self._options.get(option)
        return None if text is None else parser(option, text)

    def _variable(self, variable: str, parser: Callable[[str, str], _T]) -> Optional[_T]:
        text = self._environ.get(variable, "")
        return parser(f"environment variable {variable}", text) if text else None

    def _option_or_variable(self, option: str, variable: str, parser: Callable[[str, str], _T]) -> Optional[_T]:
        if option in self._options:
            return parser(option, self._options[option])
        return self._variable(variable, parser)

    def _number_or_default(self, option: str, variable: str, default: int) -> int:
        number = self._option_or_variable(option, variable, integer_in(0, INT32_MAX))
        return default if number is None else number

    def _generation(self) -> int:
        has_comm_res = LOCAL_COMM_RES in self._options
        enabled = self._options.get(ENABLE_CACHE_MANAGER, "1" if has_comm_res else "0") == "1"
        if has_comm_res and not enabled:
            raise invalid(ENABLE_CACHE_MANAGER, self._options[ENABLE_CACHE_MANAGER],
                          f"{LOCAL_COMM_RES} needs the cache manager, '1'")
        return 2 if enabled else 1

    def _remote_cache_accessible(self, generation: int) -> bool:
        backend = self._options.get(TRANSFER_BACKEND)
        if backend is not None and generation == 1:
            raise invalid(TRANSFER_BACKEND, backend, f"it needs the cache manager, {ENABLE_CACHE_MANAGER}='1'")
        is_default = backend is not None or LOCAL_COMM_RES in self._options
        text = self._options.get(ENABLE_REMOTE_CACHE_ACCESSIBLE, "1" if is_default else "0")
        if backend is not None and text != "1":
            raise invalid(ENABLE_REMOTE_CACHE_ACCESSIBLE, text, f"{TRANSFER_BACKEND} needs '1'")
        if backend is not None and LISTEN_IP_INFO not in self._options:
            raise invalid(TRANSFER_BACKEND, backend, f"it needs {LISTEN_IP_INFO}")
        if text not in ("0", "1"):
            raise invalid(ENABLE_REMOTE_CACHE_ACCESSIBLE, text, "it must be '0' or '1'")
        return text == "1"

    def _listen(self) -> Optional[Address]:
        text = self._options.get(LISTEN_IP_INFO)
        if text is not None:
            return parse_address(LISTEN_IP_INFO, text)
        if LISTEN_IP in self._options and LISTEN_PORT in self._options:
            return parse_address(LISTEN_IP, f"{self._options[LISTEN_IP]}:{self._options[LISTEN_PORT]}")
        return None

    def _device_ids(self, generation: int) -> Tuple[int, ...]:
        text = self._options.get(DEVICE_ID)
        if text is None:
            if generation == 1 and CLUSTER_INFO not in self._options:
                raise LLMParamInvalidError(f"option {DEVICE_ID} is missing: the kv cache manager needs it, or "
                                           f"{CLUSTER_INFO}; set LLMConfig.device_id")
            return (0,)
        device_ids = tuple(parse_integer(DEVICE_ID, part.strip(), 0, INT32_MAX) for part in text.split(";"))
        if generation == 2 and len(device_ids) > 1:
            raise invalid(DEVICE_ID, text, "the cache manager takes one device")
        return device_ids

    def _listen_all(self, device_ids: Tuple[int, ...]) -> Tuple[Address, ...]:
        """Return the addresses of the first generation; role PROMPT needs one per device."""
        is_prompt = self._role is LLMRole.PROMPT
        option = CLUSTER_INFO if is_prompt and LISTEN_IP_INFO not in self._options else LISTEN_IP_INFO
        text = self._options.get(option)
        if text is None:
            if is_prompt:
                raise LLMParamInvalidError(f"option {LISTEN_IP_INFO} is missing: role {self._role} listens")
            return ()
        if option == CLUSTER_INFO:
            addresses = self._addresses_of_cluster_info(text)
            if DEVICE_ID not in self._options:
                return self._first_of(text, addresses)
        else:
            addresses = tuple(parse_address(option, part) for part in text.split(";"))
        if is_prompt and len(addresses) != len(device_ids):
            raise invalid(option, text, f"it has {len(addresses)} addresses for {len(device_ids)} devices")
        return addresses

    @staticmethod
    def _first_of(text: str, addresses: Tuple[Address, ...]) -> Tuple[Address, ...]:
        """The address of device 0, which options have that name devices in ``logic_device_id`` alone."""
        devices = parse_json_object(CLUSTER_INFO, text).get("logic_device_id")
        if devices is not None:
            if not isinstance(devices, list) or not devices or not all(
                    isinstance(device, str) and re.fullmatch(r"\d+(:\d+){3}", device) for device in devices):
                raise invalid(CLUSTER_INFO, text, "logic_device_id must be a list of texts such as '0:0:0:0'")
            if len(devices) != len(addresses):
                raise invalid(CLUSTER_INFO, text, f"listen_ip_info has {len(addresses)} entries for {len(devices)} "
                                                  "devices of logic_device_id; they must be equally many")
        return addresses[:1]

    def _addresses_of_cluster_info(self, text: str) -> Tuple[Address, ...]:
        config = parse_json_object(CLUSTER_INFO, text)
        if config.get("cluster_id", self._cluster_id) != self._cluster_id:
            raise invalid(CLUSTER_INFO, text, f"cluster_id must be that of this process, {self._cluster_id}")
        addresses = []
        for entry in objects_of(CLUSTER_INFO, text, config, "listen_ip_info"):
            ip: Any = entry.get("ip")
            port: Any = entry.get("port")
            if isinstance(ip, int) and 0 <= ip <= UINT32_MAX:
                ip = trans_int_ip(ip)
            if not isinstance(ip, str) or isinstance(port, bool) or not isinstance(port, int):
                raise invalid(CLUSTER_INFO, text, "listen_ip_info needs ip, a text or integer, and port, an integer")
            addresses.append(parse_address(CLUSTER_INFO, f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"))
        return tuple(addresses)

    def _link_secrets(self) -> Tuple[bytes, ...]:
        secrets = self._option_or_variable(LINK_SECRET, "LLM_DATADIST_SECRET", parse_secret)
        return secrets or self._variable("LLM_DATADIST_SECRET_FILE", read_secret_file) or ()

    def _link_total_time_s(self) -> int:
        chosen = self._optional(LINK_TOTAL_TIME, integer_in(0, UINT32_MAX))
        return chosen or self._variable("HCCL_CONNECT_TIMEOUT", integer_in(1, UINT32_MAX)) or DEFAULT_LINK_TOTAL_TIME_S

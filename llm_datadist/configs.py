"""What a client configures: its role, the addresses of a peer, and the options of an engine.

`LlmConfig` is a builder of the options dict; ``llm_datadist.options.parser`` parses that dict once, at ``init``, so
clients may also change it by hand in between.
"""
from __future__ import annotations

import json
import socket
import struct
import warnings
from typing import Any, Callable, Dict, Generic, List, Optional, Tuple, TypeVar, Union, overload

from llm_datadist.options.addresses import numeric_address
from llm_datadist.status import LLMParamInvalidError, NamedIntEnum
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.spelling import closest, did_you_mean
from llm_datadist.utils.utils import check_dict, check_int32, check_isinstance, check_uint16, check_uint32, check_uint64

__all__ = ["LLMRole", "LLMClusterInfo", "LlmConfig", "LLMConfig", "trans_str_ip", "trans_int_ip"]

_T = TypeVar("_T")
_IpInfo = Tuple[Union[int, str, None], int]


class LLMRole(NamedIntEnum):
    """Part of a process in disaggregated inference. ``str()`` gives ``LLMRole.PROMPT``."""

    PROMPT = 1
    DECODER = 2
    MIX = 3


def trans_str_ip(ip: Any) -> Any:
    """Turn the text of an IPv4 address into an integer.

    Parameters
    ----------
    ip : str or object
        Dotted text as ``inet_aton`` reads it, so ``"127.1"`` is an address. Anything but a str is returned as it is.

    Returns
    -------
    int
        The four bytes of the address read as a little-endian number: ``"1.2.3.4"`` is 0x04030201.

    Raises
    ------
    RuntimeError
        The text is no IPv4 address.
    """
    if not isinstance(ip, str):
        return ip
    try:
        return int(struct.unpack("<I", socket.inet_aton(ip))[0])
    except (OSError, ValueError):
        raise RuntimeError(f"Can not parse ip str {ip!r}: it must be an IPv4 address such as '192.168.1.2'") from None


def trans_int_ip(ip: int) -> str:
    """Turn an integer of `trans_str_ip` back into dotted text.

    Parameters
    ----------
    ip : int
        Four address bytes as a little-endian number, 0..2**32 - 1.

    Raises
    ------
    TypeError, ValueError
        `ip` is no int, or does not fit 32 bits.
    """
    return socket.inet_ntoa(struct.pack("<I", check_uint32("ip", ip)))


class LLMClusterInfo:
    """Addresses of a peer for ``link_clusters`` and ``unlink_clusters``."""

    def __init__(self) -> None:
        self._remote_cluster_id: Optional[int] = None
        self._remote_role_type: Union[LLMRole, int, None] = None
        self._local_ip_info_list: List[_IpInfo] = []
        self._remote_ip_info_list: List[_IpInfo] = []

    @property
    def remote_cluster_id(self) -> Optional[int]:
        """Cluster id of the peer, uint64 (TypeError, ValueError); None until set."""
        return self._remote_cluster_id

    @remote_cluster_id.setter
    def remote_cluster_id(self, remote_cluster_id: int) -> None:
        self._remote_cluster_id = check_uint64("remote_cluster_id", remote_cluster_id)

    @property
    def remote_role_type(self) -> Union[LLMRole, int, None]:
        """Role of the peer, an `LLMRole` or int (TypeError); kept, and ignored by the engine."""
        return self._remote_role_type

    @remote_role_type.setter
    def remote_role_type(self, remote_role_type: Union[LLMRole, int, None]) -> None:
        self._remote_role_type = check_isinstance("remote_role_type", remote_role_type, [LLMRole, int])

    @property
    def local_ip_info_list(self) -> List[_IpInfo]:
        """The live list of ``(ip as int, port)`` of this side; an IPv6 address stays a text."""
        return self._local_ip_info_list

    @property
    def remote_ip_info_list(self) -> List[_IpInfo]:
        """The live list of ``(ip as int, port)`` of the peer; an IPv6 address stays a text."""
        return self._remote_ip_info_list

    @public_call
    def append_local_ip_info(self, ip: Union[str, int], port: int) -> None:
        """Add an address of this side.

        Parameters
        ----------
        ip : str or int
            IPv4 or IPv6 text, a host name, or the integer form of `trans_str_ip`. A name is resolved at once.
        port : int
            0..65535.

        Raises
        ------
        TypeError, ValueError
            `ip` is neither str nor int; `port` is no int, or outside its range.
        RuntimeError
            `ip` is a text, but neither an address nor a name that can be resolved.
        """
        self._local_ip_info_list.append(_ip_info(ip, port))

    @public_call
    def append_remote_ip_info(self, ip: Union[str, int], port: int) -> None:
        """Add an address of the peer.

        Parameters
        ----------
        ip : str or int
            IPv4 or IPv6 text, a host name, or the integer form of `trans_str_ip`. A name is resolved at once.
        port : int
            0..65535.

        Raises
        ------
        TypeError, ValueError
            `ip` is neither str nor int; `port` is no int, or outside its range.
        RuntimeError
            `ip` is a text, but neither an address nor a name that can be resolved.
        """
        self._remote_ip_info_list.append(_ip_info(ip, port))

    def __repr__(self) -> str:
        return (f"LLMClusterInfo(remote_cluster_id={self._remote_cluster_id}, "
                f"local_ip_info_list={self._local_ip_info_list}, remote_ip_info_list={self._remote_ip_info_list})")


def _ip_info(ip: Union[str, int], port: int) -> _IpInfo:
    check_isinstance("ip", ip, [str, int])
    check_uint16("port", port)
    if isinstance(ip, str):
        numeric = numeric_address(ip)
        if numeric is None:
            raise RuntimeError(f"Can not parse ip str {ip!r}: it is neither an IP address, such as '192.168.1.2' or "
                               "'::1', nor a host name that can be resolved here")
        return numeric if ":" in numeric else trans_str_ip(numeric), port
    return ip, port


class _Setting(Generic[_T]):
    """A property of `LlmConfig`: what it accepts, what it reads as when unset, and what it emits.

    `check(name, value)` returns the value to keep; None means unset. `emit(value)` returns the option keys and texts.
    """

    def __init__(self, check: Callable[[str, Any], Any], default: Any, emit: Callable[[Any], Dict[str, str]], doc: str):
        self._check = check
        self._default = default
        self.emit = emit
        self.__doc__ = doc

    def __set_name__(self, owner: "type[LlmConfig]", name: str) -> None:
        self._name = name

    @overload
    def __get__(self, config: None, owner: Any) -> "_Setting[_T]": ...

    @overload
    def __get__(self, config: "LlmConfig", owner: Any) -> _T: ...

    def __get__(self, config: "Optional[LlmConfig]", owner: Any = None) -> Any:
        if config is None:
            return self
        return config._values.get(self._name, self._default)

    def __set__(self, config: "LlmConfig", value: Any) -> None:
        kept = self._check(self._name, value)
        if kept is None:
            config._values.pop(self._name, None)
        else:
            config._values[self._name] = kept

    def emit_into(self, config: "LlmConfig", options: Dict[str, str]) -> None:
        value = config._values.get(self._name)
        if value is not None:
            options.update(self.emit(value))


def _of_type(cls: type) -> Callable[[str, Any], Any]:
    return lambda name, value: check_isinstance(name, value, cls)


def _of_secret(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")       # whatever it holds is not shown
    return value


def _in_range(name: str, value: Any, low: Any, high: Any) -> Any:
    if not low <= value <= high:
        raise LLMParamInvalidError(f"{name}={value} is not allowed; it must be in [{low}, {high}]")
    return value


def _integer_in(low: int, high: int) -> Callable[[str, Any], Any]:
    return lambda name, value: _in_range(name, check_isinstance(name, value, int, allow_none=False), low, high)


def _check_device_id(name: str, value: Any) -> Any:
    check_isinstance(name, value, [int, list, tuple], allow_none=False)
    ids = [value] if isinstance(value, int) else check_isinstance(name, value, (list, tuple), int)
    if not ids:
        raise LLMParamInvalidError(f"{name}={value} is empty; at least one device is needed")
    for device_id in ids:
        if device_id < 0:
            raise LLMParamInvalidError(f"{name}={value} is not allowed; a device id must not be negative")
        check_int32(name, device_id)
    return value


def _emit_device_id(value: Any) -> Dict[str, str]:
    ids = [str(int(device_id)) for device_id in ([value] if isinstance(value, int) else value)]
    return {"ge.exec.deviceId": ";".join(ids), "ge.session_device_id": ids[0]}


def _check_sync_kv_timeout(name: str, value: Any) -> Any:
    check_isinstance(name, value, [int, str], allow_none=False)
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise LLMParamInvalidError(f"{name}={value!r} is not allowed; a text must hold digits only, in ms")
    if int(value) <= 0:
        raise LLMParamInvalidError(f"{name}={value!r} is not allowed; it must be at least 1 ms")
    check_int32(name, int(value))
    return value


def _check_mem_utilization(name: str, value: Any) -> Any:
    return _in_range(name, check_isinstance(name, value, float, allow_none=False), 0.0, 1.0)


def _check_cluster_info(name: str, value: Any) -> Any:
    """Turn the address texts of ``listen_ip_info`` into integers."""
    try:
        parsed = json.loads(check_isinstance(name, value, str, allow_none=False))
    except RecursionError:
        raise LLMParamInvalidError(f"{name} is no JSON: it nests too deep") from None
    entries = parsed.get("listen_ip_info", []) if isinstance(parsed, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise LLMParamInvalidError(
            f"{name}={value!r} is not allowed; it must be a JSON object with listen_ip_info a list of objects")
    for entry in entries:
        if "ip" in entry:
            entry["ip"] = trans_str_ip(entry["ip"])
    return json.dumps(parsed)


def _text(key: str, emit_empty: bool = False) -> Callable[[Any], Dict[str, str]]:
    return lambda value: {key: str(value)} if emit_empty or value != "" else {}


def _flag(key: str) -> Callable[[Any], Dict[str, str]]:
    return lambda value: {key: "1" if value else "0"}


def _number(key: str) -> Callable[[Any], Dict[str, str]]:
    return lambda value: {key: str(int(value))}


class LlmConfig:
    """Builder of the options of ``LLMDataDist.init``. Each setting is a property.

    Notes
    -----
    A setter with a wrong type raises `TypeError`; None unsets a setting that has no range. A value outside its range
    raises `LLMParamInvalidError`, or `ValueError` where it does not fit the integer type of the option. An attribute
    that is no setting gives a warning with the closest one.
    Not safe for use by several threads at once.
    """

    def __init__(self) -> None:
        self._values: Dict[str, Any] = {}
        self._ge_options: Dict[str, str] = {}
        self._options: Dict[str, str] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        # A name that nobody reads is kept, as the original does, but it is most probably misspelt.
        if not name.startswith("_") and not hasattr(type(self), name):
            settings = ["ge_options", *(setting._name for setting in _SETTINGS)]
            if type(self) is LlmConfig or closest(name, settings):
                warnings.warn(f"LLMConfig has no setting {name!r}, which has no effect; {did_you_mean(name, settings)}",
                              UserWarning, stacklevel=2)
        super().__setattr__(name, value)

    @property
    def ge_options(self) -> Dict[str, str]:
        """Raw options, dict of str to str (TypeError), merged in first. Reading gives the live dict."""
        return self._ge_options

    @ge_options.setter
    def ge_options(self, ge_options: Dict[str, str]) -> None:
        self._ge_options = check_dict("ge_options", ge_options, str, str)

    device_id = _Setting[Union[int, List[int], Tuple[int, ...], None]](
        _check_device_id, None, _emit_device_id,
        """Device or devices to bind, 0..2**31 - 1; None when unset, which means device 0.""")
    listen_ip_info = _Setting[str](
        _of_type(str), "", _text("llm.listenIpInfo"),
        """Address to listen at, ``"ip:port"``; first generation: one per device, joined by ``;``. Parsed at init.""")
    deploy_res_path = _Setting[str](
        _of_type(str), "", _text("llm.deployResPath"), """Path of deployment resources; accepted and ignored.""")
    buf_pool_cfg = _Setting[str](
        _of_type(str), "", _text("llm.BufPoolCfg"),
        """JSON of the bounce buffers of the first generation; validated at init and otherwise ignored.""")
    mem_pool_cfg = _Setting[str](
        _of_type(str), "", _text("llm.MemPoolConfig"),
        """JSON of the device pool: ``memory_size`` in bytes, ``page_shift`` 10..30 (default 16). Parsed at init.""")
    host_mem_pool_cfg = _Setting[str](
        _of_type(str), "", _text("llm.HostMemPoolConfig"), """JSON of the host pool, like `mem_pool_cfg`.""")
    output_max_size = _Setting[Optional[int]](
        _of_type(int), None, _number("llm.OutputMaxSize"), """Accepted and ignored; None when unset.""")
    mem_utilization = _Setting[float](
        _check_mem_utilization, 0.95, _text("llm.MemoryUtilization"),
        """Fraction 0..1 as a float; always emitted, and ignored by the engine.""")
    cluster_info = _Setting[str](
        _check_cluster_info, "", _text("llm.ClusterInfo"),
        """JSON with ``cluster_id``, ``logic_device_id`` and ``listen_ip_info``, whose address texts become integers.

        Bad JSON raises ``json.JSONDecodeError`` (a ValueError), a bad address RuntimeError.
        """)
    sync_kv_timeout = _Setting[Union[int, str, None]](
        _check_sync_kv_timeout, None, _number("llm.SyncKvCacheWaitTime"),
        """Deadline of pulls and pushes, 1..2**31 - 1 ms, int or text of digits; None when unset, which means 1000.""")
    enable_switch_role = _Setting[bool](
        _of_type(bool), False, lambda value: {"llm.EnableSwitchRole": "1"} if value else {},
        """Whether ``switch_role`` is allowed; first generation only.""")
    link_total_time = _Setting[int](
        _integer_in(0, 0xFFFFFFFF), 0, _number("llm.LinkTotalTime"),
        """Time budget of ``link``, 0..2**32 - 1 s; 0 means ``HCCL_CONNECT_TIMEOUT``, or 120.""")
    cache_key_lease_ms = _Setting[int](
        _integer_in(0, 0x7FFFFFFF), 0, _number("llm.CacheKeyLeaseMs"),
        """How long request keys wait to be pulled before they release themselves, ms; 0: until they are pulled.""")
    checksum = _Setting[bool](
        _of_type(bool), False, _flag("llm.Checksum"),
        """Whether what pulls and pushes of this process move is held against checksums of its source.""")
    link_heal_time = _Setting[int](
        _integer_in(0, 0x7FFFFFFF), 500, _number("llm.LinkHealTime"),
        """What a call may spend, of its time, on making a broken link anew, ms; 0: it stays broken until unlinked.""")
    link_silence_time = _Setting[int](
        _integer_in(2000, 3600000), 3000, _number("llm.LinkSilenceTime"),
        """How long nothing may come from a peer's host, probes included, before its links end, 2000..3600000 ms.""")
    link_retry_count = _Setting[int](
        _integer_in(1, 100), 1, _number("llm.LinkRetryCount"), """Attempts of ``link``, 1..100.""")
    link_secret = _Setting[str](
        _of_secret, "", _text("llm.LinkSecret"),
        """What peers must know to link, at least 16 characters; two, with white space between, while it changes.""")
    listen_open = _Setting[str](
        _of_type(str), "", _text("llm.ListenOpen"),
        """``"1"``: listen at any address without a secret; or at these addresses and networks, joined by commas.""")
    enable_cache_manager = _Setting[bool](
        _of_type(bool), False, _flag("llm.EnableCacheManager"),
        """Whether the engine has a ``cache_manager`` rather than a ``kv_cache_manager``.""")
    enable_remote_cache_accessible = _Setting[bool](
        _of_type(bool), False, _flag("llm.EnableRemoteCacheAccessible"),
        """Whether peers read and write our caches directly; both ends must agree.""")
    rdma_traffic_class = _Setting[Optional[int]](
        check_uint32, None, _number("llm.RdmaTrafficClass"),
        """Traffic class, uint32; None when unset, which means ``HCCL_RDMA_TC`` or the provider's own.""")
    rdma_service_level = _Setting[Optional[int]](
        check_uint32, None, _number("llm.RdmaServiceLevel"),
        """Service level, uint32; None when unset, which means ``HCCL_RDMA_SL`` or the provider's own.""")
    local_comm_res = _Setting[str](
        _of_type(str), "", _text("llm.LocalCommRes", emit_empty=True),
        """JSON of this side's network identity; ``""`` generates it. Setting it turns the cache manager on.""")
    transfer_backend = _Setting[str](
        _of_type(str), "", _text("llm.TransferBackend", emit_empty=True),
        """Name of the transfer backend, such as ``"hixl"``; emitted when set.""")
    global_resource_config = _Setting[str](
        _of_type(str), "", _text("llm.GlobalResourceConfig", emit_empty=True),
        """JSON passed through to the transfer backend; emitted when set.""")

    @property
    def options(self) -> Dict[str, str]:
        """The dict that `generate_options` fills."""
        return self._options

    def generate_options(self) -> Dict[str, str]:
        """Write the settings into the options dict and return it.

        Returns
        -------
        dict of str to str
            The same object on every call. It is never cleared, so a setting emitted once stays in it.
        """
        self._options.update(self._ge_options)
        for setting in _SETTINGS:
            setting.emit_into(self, self._options)
        self._options["llm.MemoryUtilization"] = str(self.mem_utilization)
        return self._options

    def gen_options(self) -> Dict[str, str]:
        """Do what `generate_options` does, under its other name."""
        return self.generate_options()


_SETTINGS = [setting for setting in vars(LlmConfig).values() if isinstance(setting, _Setting)]
LLMConfig = LlmConfig

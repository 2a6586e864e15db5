"""Endpoints of a real network, in the form the C API takes them.

An endpoint is 160 bytes (``EndpointDesc`` of ``include/hcomm/hcomm_res_defs.h``): protocol, address, location. They
come from ``local_comm_res``; where that names none, from what the runtime and the device's configuration tell. The
host provider needs none. What a device is called (its physical id, its place in a super node) is known only once the
runtime is open, so options keep what was said and `Endpoints.records` turns it into bytes.
"""
from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from llm_datadist.status import LLMParamInvalidError

__all__ = ["ENDPOINT_BYTES", "RECORD_BYTES", "Endpoint", "Endpoints", "endpoints_of"]

ENDPOINT_BYTES = 160
RECORD_BYTES = 256                  # an endpoint, 32 bytes of plane, 64 bytes of super node; see ldd_wire.h
HCCN_CONF = "/etc/hccn.conf"        # addresses of the devices' network ports, written by hccn_tool

_PROTOCOLS = {"hccs": 0, "roce": 1, "ub_ctp": 4, "uboe": 7, "ub_rtp": 9}
_LOCATION_OFFSET = 44
_IPV4, _IPV6, _ID, _EID = range(4)
_DEVICE, _HOST = range(2)
_UNKNOWN_SUPER_DEVICE = 0xFFFFFFFF
_UINT32_MAX = 2**32 - 1


class Endpoint(NamedTuple):
    """One way in which this process can be reached; `comm_id` is an ip address, a device number, or 32 hex digits."""

    protocol: str
    comm_id: str
    placement: str
    plane: str = ""
    device_id: str = ""             # of a rank table's entry, otherwise ""
    super_device_id: Optional[int] = None


def _address(endpoint: Endpoint, physical_id: int) -> Tuple[int, bytes]:
    if endpoint.protocol in ("roce", "uboe"):
        ip = ipaddress.ip_address(endpoint.comm_id)
        return (_IPV4 if ip.version == 4 else _IPV6), ip.packed
    if endpoint.protocol == "hccs":
        number = int(endpoint.comm_id) if endpoint.comm_id else physical_id
        if not 0 <= number <= _UINT32_MAX:
            raise ValueError(f"comm_id {endpoint.comm_id!r} of hccs is no device number")
        return _ID, struct.pack("<I", number)
    raw = bytes.fromhex(endpoint.comm_id)
    if len(raw) != 16:
        raise ValueError(f"comm_id {endpoint.comm_id!r} must be 32 hexadecimal digits for {endpoint.protocol}")
    return _EID, raw


def _pack(endpoint: Endpoint, physical_id: int, super_device_id: Optional[int], super_pod: Optional[int]) -> bytes:
    """One endpoint: everything 0xFF but what is known, as the library wants unused bytes."""
    if endpoint.protocol not in _PROTOCOLS:
        raise ValueError(f"protocol {endpoint.protocol!r} is unknown; known: {', '.join(sorted(_PROTOCOLS))}")
    if endpoint.placement not in ("host", "device"):
        raise ValueError(f"placement {endpoint.placement!r} is neither 'host' nor 'device'")
    if len(endpoint.plane.encode()) > 31:
        raise ValueError(f"plane {endpoint.plane!r} is longer than 31 bytes")
    kind, raw = _address(endpoint, physical_id)
    out = bytearray(b"\xff" * ENDPOINT_BYTES)
    struct.pack_into("<ii", out, 0, _PROTOCOLS[endpoint.protocol], kind)
    out[8:8 + len(raw)] = raw
    if endpoint.placement == "device":
        super_device = endpoint.super_device_id if endpoint.super_device_id is not None else super_device_id
        if super_device is None:
            super_device = _UNKNOWN_SUPER_DEVICE if endpoint.protocol == "hccs" else 0
        struct.pack_into("<iIIII", out, _LOCATION_OFFSET, _DEVICE, physical_id, super_device, 0, super_pod or 0)
    else:
        struct.pack_into("<iI", out, _LOCATION_OFFSET, _HOST, 0)
    return bytes(out)


def _device_ip(physical_id: int, path: str) -> str:
    """Return the address of a device's own network port, "" when it cannot be read."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition("=")
            if name.strip() == f"address_{physical_id}":
                return value.strip()
    return ""


def _this_machine() -> str:
    with contextlib.suppress(OSError):
        return "machine-" + Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


@dataclass(frozen=True)
class Endpoints:
    """What options say of the network.

    Parameters
    ----------
    named : tuple of Endpoint
        Those of ``local_comm_res``, in its order; empty when it names none.
    net_instance : str
        Name of the super node, "" when it is not given.
    of_rank_table : bool
        `named` are the devices of a rank table, of which only our own counts.
    """

    named: Tuple[Endpoint, ...] = ()
    net_instance: str = ""
    of_rank_table: bool = False

    def records(
        self, device_id: int, physical_id: int, super_device_id: Optional[int] = None, super_pod: Optional[int] = None,
        environ: Optional[Mapping[str, str]] = None,
    ) -> List[bytes]:
        """Return the endpoints of a device, made up where none are named.

        Parameters
        ----------
        device_id, physical_id : int
            What the process calls the device, and what it is.
        super_device_id, super_pod : int, optional
            Its place in a super node; None where the runtime does not tell.
        environ : mapping of str to str, optional
            Environment; default ``os.environ``. Read are ``LLM_DATADIST_HCCN_CONF``, in place of ``/etc/hccn.conf``,
            and ``HCCL_INTRA_ROCE_ENABLE``.

        Returns
        -------
        list of bytes, each of 256
            Records of ``ldd_endpoint_record``, at least one.

        Raises
        ------
        LLMParamInvalidError
            None are named, and none can be made up; the text says what to set.
        """
        environ = os.environ if environ is None else environ
        named, net_instance = self._own(device_id, physical_id), self.net_instance
        if not named:
            named = self._made_up(physical_id, environ)
            if not net_instance:
                net_instance = f"super-pod-{super_pod}" if super_pod is not None else _this_machine()
        return [
            _pack(endpoint, physical_id, super_device_id, super_pod) + endpoint.plane.encode().ljust(32, b"\0")
            + net_instance.encode()[:63].ljust(64, b"\0") for endpoint in named
        ]

    def _own(self, device_id: int, physical_id: int) -> Tuple[Endpoint, ...]:
        if not self.of_rank_table:
            return self.named
        for number in (physical_id, device_id):
            own = tuple(endpoint for endpoint in self.named if endpoint.device_id == str(number))
            if own:
                return own
        return self.named[:1]

    @staticmethod
    def _made_up(physical_id: int, environ: Mapping[str, str]) -> Tuple[Endpoint, ...]:
        """HCCS for devices of one super node, RoCE by the device's own port for all others."""
        path = environ.get("LLM_DATADIST_HCCN_CONF") or HCCN_CONF
        ip = _device_ip(physical_id, path)
        found = [] if environ.get("HCCL_INTRA_ROCE_ENABLE") == "1" else [
            Endpoint("hccs", str(physical_id), "device")]
        if ip:
            found.append(Endpoint("roce", ip, "device"))
        if not found:
            raise LLMParamInvalidError(
                f"HCCL_INTRA_ROCE_ENABLE=1 asks for RoCE, but {path} has no address_{physical_id}: write it there with "
                "hccn_tool, or name endpoints in local_comm_res")
        return tuple(found)


def _of_rank_table(config: Dict[str, Any]) -> List[Endpoint]:
    devices = [device for server in config["server_list"] for device in server["device"] if device.get("device_ip")]
    return [Endpoint("roce", str(device["device_ip"]), "device", device_id=str(device.get("device_id", "")),
                     super_device_id=_number(device.get("super_device_id"))) for device in devices]


def _number(text: Any) -> Optional[int]:
    return int(text) if text not in (None, "") and 0 <= int(text) <= _UINT32_MAX else None


def endpoints_of(option: str, text: str) -> Endpoints:
    """Return what a network identity says.

    Parameters
    ----------
    option : str
        Name of the option, for the texts.
    text : str
        JSON of version 1.0, 1.2 or 1.3, already checked for its structure; ``""`` names none.

    Raises
    ------
    LLMParamInvalidError
        A protocol, address or placement is none that is known.
    """
    config = json.loads(text) if text else {}
    if not config.get("version"):
        return Endpoints()
    try:
        of_rank_table = config["version"] != "1.3"
        found = _of_rank_table(config) if of_rank_table else [
            Endpoint(entry["protocol"], entry["comm_id"], entry["placement"], str(entry.get("plane", "")))
            for entry in config.get("endpoint_list", ())]
        for endpoint in found:
            _pack(endpoint, 0, None, None)
    except ValueError as error:
        raise LLMParamInvalidError(f"option {option}={text[:200]!r} is not allowed; {error}") from None
    return Endpoints(tuple(found), str(config.get("net_instance_id", "")), of_rank_table)

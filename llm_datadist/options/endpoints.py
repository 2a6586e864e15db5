"""Endpoints of a real network out of ``local_comm_res``, in the form the C API takes them.

An endpoint is 160 bytes (``EndpointDesc`` of ``include/hcomm/hcomm_types.h``): protocol, address, location. The host
provider needs none; a provider over hardware gets ours at both ends, and the peer's from the handshake of a link.
"""
from __future__ import annotations

import ipaddress
import json
import struct
from typing import Any, Dict, List, Tuple

from llm_datadist.status import LLMParamInvalidError

__all__ = ["ENDPOINT_BYTES", "endpoints_of"]

ENDPOINT_BYTES = 160
_PROTOCOLS = {"hccs": 0, "roce": 1, "ub_ctp": 4, "uboe": 7, "ub_rtp": 9}
_LOCATION_OFFSET = 44
_IPV4, _IPV6, _ID, _EID = range(4)
_DEVICE, _HOST = range(2)
_UNKNOWN_SUPER_DEVICE = 0xFFFFFFFF


def _pack(protocol: str, comm_id: str, placement: str, device_id: int) -> bytes:
    """One endpoint: everything 0xFF but what is known, as the library wants unused bytes."""
    if protocol not in _PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; known: {', '.join(sorted(_PROTOCOLS))}")
    if placement not in ("host", "device"):
        raise ValueError(f"placement {placement!r} is neither 'host' nor 'device'")
    if protocol in ("roce", "uboe"):
        address = ipaddress.ip_address(comm_id)
        kind, raw = (_IPV4 if address.version == 4 else _IPV6), address.packed
    elif protocol == "hccs":
        kind, raw = _ID, struct.pack("<I", device_id)
    else:
        kind, raw = _EID, bytes.fromhex(comm_id)
        if len(raw) != 16:
            raise ValueError(f"comm_id {comm_id!r} must be 32 hexadecimal digits for {protocol}")
    out = bytearray(b"\xff" * ENDPOINT_BYTES)
    struct.pack_into("<ii", out, 0, _PROTOCOLS[protocol], kind)
    out[8:8 + len(raw)] = raw
    if placement == "device":
        super_device = _UNKNOWN_SUPER_DEVICE if protocol == "hccs" else 0
        struct.pack_into("<iIIII", out, _LOCATION_OFFSET, _DEVICE, device_id, super_device, 0, 0)
    else:
        struct.pack_into("<iI", out, _LOCATION_OFFSET, _HOST, 0)
    return bytes(out)


def _entries(config: Dict[str, Any], device_id: int) -> List[Tuple[str, str, str]]:
    """(protocol, comm_id, placement) of each endpoint; a rank table names the own device's address alone."""
    if config.get("version") == "1.3":
        return [(entry["protocol"], entry["comm_id"], entry["placement"]) for entry in config.get("endpoint_list", ())]
    devices = [device for server in config["server_list"] for device in server["device"]]
    own = [device for device in devices if str(device.get("device_id")) == str(device_id)] or devices[:1]
    return [("roce", device["device_ip"], "device") for device in own if device.get("device_ip")]


def endpoints_of(option: str, text: str, device_id: int) -> Tuple[bytes, ...]:
    """Return the endpoints that a network identity names.

    Parameters
    ----------
    option : str
        Name of the option, for the texts.
    text : str
        JSON of version 1.0, 1.2 or 1.3, already checked for its structure; ``""`` names none.
    device_id : int
        The device that is bound.

    Returns
    -------
    tuple of bytes, each of 160
        In the order of the list.

    Raises
    ------
    LLMParamInvalidError
        A protocol, address or placement is none that is known.
    """
    config = json.loads(text) if text else {}
    if not config.get("version"):
        return ()
    try:
        return tuple(_pack(*entry, device_id) for entry in _entries(config, device_id))
    except ValueError as error:
        raise LLMParamInvalidError(f"option {option}={text[:200]!r} is not allowed; {error}") from None

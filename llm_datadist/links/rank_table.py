"""Rank tables of ``link``: who the members of a communicator are and where they may be met.

A table names servers, their devices and the rank of each device. It carries no port, and often no address that a
host has: ``server_id`` may be just "0" or "1", and ``device_ip`` that of a device's own network.
"""
from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from llm_datadist.status import LLMParamInvalidError

__all__ = ["Member", "parse_rank_table"]

VERSIONS = ("1.0", "1.2")


@dataclass(frozen=True)
class Member:
    """One member of a communicator.

    Parameters
    ----------
    rank : int
        Its rank.
    server : str
        Its ``server_id``: members with the same one are on one host.
    device_id : int
        Its device on that server.
    address : str, optional
        The first of ``host_ip``, ``server_id`` and ``device_ip`` that is an IP address.
    """

    rank: int
    server: str
    device_id: int
    address: Optional[str]


def parse_rank_table(text: str) -> Dict[int, Member]:
    """Return the members by rank.

    Parameters
    ----------
    text : str
        JSON: ``version`` "1.0" or "1.2", ``status`` "completed", ``server_list`` of ``server_id``, optional
        ``host_ip`` and ``device`` lists of ``device_id``, ``rank_id`` and optional ``device_ip``. ``server_count``
        and ``super_pod_list`` may be there; numbers may be written as texts.

    Raises
    ------
    LLMParamInvalidError
        The text is no such table; the message says where.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LLMParamInvalidError(f"rank_table is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise LLMParamInvalidError("rank_table is not allowed; it must be a JSON object")
    version = str(table.get("version", "1.0"))
    if version not in VERSIONS:
        raise LLMParamInvalidError(f"rank_table: version {version!r} is not allowed; known: {', '.join(VERSIONS)}")
    if table.get("status", "completed") != "completed":
        raise LLMParamInvalidError(f"rank_table: status {table['status']!r} is not allowed; it must be 'completed'")
    servers = _objects(table, "server_list", "rank_table")
    if "server_count" in table and _integer(table, "server_count", "rank_table") != len(servers):
        raise LLMParamInvalidError(
            f"rank_table: server_count is {table['server_count']!r}, but server_list has {len(servers)} servers")
    members: Dict[int, Member] = {}
    for i, server in enumerate(servers):
        where = f"rank_table: server_list[{i}]"
        server_id = server.get("server_id")
        if server_id is None:
            raise LLMParamInvalidError(f"{where} has no server_id")
        for j, device in enumerate(_objects(server, "device", where)):
            place = f"{where}.device[{j}]"
            rank = _integer(device, "rank_id", place)
            if rank in members:
                raise LLMParamInvalidError(f"{place}: rank_id {rank} occurs twice")
            candidates = (server.get("host_ip"), server_id, device.get("device_ip"))
            members[rank] = Member(rank, str(server_id), _integer(device, "device_id", place),
                                   next((ip for ip in map(_address, candidates) if ip is not None), None))
    return members


def _objects(parent: Dict[str, Any], key: str, where: str) -> List[Dict[str, Any]]:
    value = parent.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise LLMParamInvalidError(f"{where}: {key} must be a non-empty list of objects")
    return value


def _integer(parent: Dict[str, Any], key: str, where: str) -> int:
    try:
        value = int(parent[key])
    except (KeyError, TypeError, ValueError):
        raise LLMParamInvalidError(f"{where}: {key}={parent.get(key)!r} is not allowed; it must be a number") from None
    if not 0 <= value < 2**32:
        raise LLMParamInvalidError(f"{where}: {key}={value} is not allowed; it must be in [0, 2**32)")
    return value


def _address(text: Any) -> Optional[str]:
    """The text in canonical form when it is an IP address."""
    if not isinstance(text, str):
        return None
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    return None if address.is_unspecified else str(address)

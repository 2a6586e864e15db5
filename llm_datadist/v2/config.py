"""Older path of the engine's configuration: what `EngineOptions` says, with addresses as integers."""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Mapping, Tuple

from llm_datadist.configs import LLMRole, trans_str_ip
from llm_datadist.options.parser import EngineOptions
from llm_datadist.options.values import parse_listen_ip_info

__all__ = ["EngineConfig", "ClusterConfig"]


@dataclass(frozen=True)
class ClusterConfig:
    """Identity and addresses of a process.

    Parameters
    ----------
    cluster_id : int
        Id of the process.
    device_ids : tuple of int
        Devices it binds.
    listen_ip_info : tuple of (int, int)
        Address, as of `trans_str_ip`, and port of each listener.
    """

    cluster_id: int
    device_ids: Tuple[int, ...] = (0,)
    listen_ip_info: Tuple[Tuple[int, int], ...] = ()

    def to_json(self) -> str:
        """Return the text that the option ``llm.ClusterInfo`` holds."""
        return json.dumps({
            "cluster_id": self.cluster_id, "logic_device_id": list(self.device_ids),
            "listen_ip_info": [{"ip": ip, "port": port} for ip, port in self.listen_ip_info],
        })


@dataclass(frozen=True)
class EngineConfig:
    """The parsed options of an engine with the identity of its process.

    Parameters
    ----------
    options : EngineOptions
        The parsed options.
    cluster_config : ClusterConfig
        The identity.
    """

    options: EngineOptions
    cluster_config: ClusterConfig

    @classmethod
    def from_options(cls, options: Mapping[str, str], role: LLMRole, cluster_id: int) -> "EngineConfig":
        """Parse an options dict.

        Parameters
        ----------
        options : dict of str to str
            As of ``LlmConfig.generate_options``.
        role : LLMRole
            Role of the process.
        cluster_id : int
            Id of the process.

        Raises
        ------
        TypeError, ValueError, LLMParamInvalidError
            As `EngineOptions.parse`.
        RuntimeError
            A listening address is no IPv4 address.
        """
        parsed = EngineOptions.parse(options, role, cluster_id)
        addresses = parsed.listen_all or (() if parsed.listen is None else (parsed.listen,))
        listen_ip_info = tuple((trans_str_ip(ip), port) for ip, port in addresses)
        return cls(parsed, ClusterConfig(cluster_id, parsed.device_ids, listen_ip_info))

    @staticmethod
    def parse_listen_ip_info(listen_ip_info: str) -> Tuple[int, int]:
        """Split ``"ip:port"`` in `listen_ip_info` into the integer of `trans_str_ip` and the port.

        Raises
        ------
        ValueError
            The port is no number.
        RuntimeError
            The address is no IPv4 address.
        LLMParamInvalidError
            There are not exactly two parts.
        """
        ip, port = parse_listen_ip_info(listen_ip_info)
        return trans_str_ip(ip), port

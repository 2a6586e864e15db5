"""Resolve the host of an address: IPv4, IPv6 in brackets or a name; ``values.parse_address`` checks host and port."""
from __future__ import annotations

import ipaddress
import socket
from typing import Optional

__all__ = ["numeric_address"]


def numeric_address(host: str) -> Optional[str]:
    """Return the numeric text of an address or host name, IPv4 where it has one; None when it has none.

    Parameters
    ----------
    host : str
        An IPv4 address (also short ones, as ``inet_aton`` reads them), an IPv6 address with or without brackets, or
        a name that this host's resolver knows.
    """
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            return None
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or "\0" in host:
        return None
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    texts = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return texts[0] if texts else None

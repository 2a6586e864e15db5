"""Parsers of single option values and of addresses. Each takes (option, text); every error names the option."""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from llm_datadist.options.addresses import numeric_address
from llm_datadist.status import LLMParamInvalidError

__all__ = ["PoolOptions", "parse_listen_ip_info"]

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1
INT64_MAX = 2**63 - 1
DEFAULT_PAGE_SHIFT = 16             # 64 KiB
V1_PAGE_SHIFT = 9                   # the first generation aligns tensors to 512 bytes

_MAX_PAGES = 2**32 - 2
_BUFFER_ALIGNMENT_BYTES = 2 << 20
_COMM_RES_VERSIONS = ("1.0", "1.2", "1.3")
_SHOWN_CHARACTERS = 200             # of a value, in the text of an error

Address = Tuple[str, int]


@dataclass(frozen=True)
class PoolOptions:
    """A memory pool.

    Parameters
    ----------
    memory_size : int
        Bytes, at least one page.
    page_shift : int
        Binary logarithm of the page size in bytes.
    """

    memory_size: int
    page_shift: int = DEFAULT_PAGE_SHIFT


def _shown(option: str, value: object) -> str:
    text = repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}..."
    return f"{option if ' ' in option else f'option {option}'}={text}"


def invalid(option: str, value: object, reason: str) -> LLMParamInvalidError:
    """Return the exception for a value; `option` may also be ``"environment variable NAME"``."""
    return LLMParamInvalidError(f"{_shown(option, value)} is not allowed: {reason}")


def parse_listen_ip_info(listen_ip_info: str, option: str = "llm.listenIpInfo") -> Address:
    """Split ``"ip:port"``.

    Parameters
    ----------
    listen_ip_info : str
        The text. An IPv6 address stands in brackets, ``"[::1]:26000"``; they are not part of the result.
    option : str
        Name of the option it came from, for the text of errors.

    Returns
    -------
    tuple of (str, int)
        Address and port.

    Raises
    ------
    ValueError
        The port is no number.
    LLMParamInvalidError
        There are not exactly two parts.
    """
    if listen_ip_info.startswith("[") and "]:" in listen_ip_info:
        host, _, port = listen_ip_info[1:].partition("]:")
        parts = [host, port]
    else:
        parts = listen_ip_info.split(":")
    if len(parts) != 2:
        raise invalid(option, listen_ip_info, "it must be host:port; an IPv6 address stands in brackets, as in "
                                              "[::1]:26000")
    try:
        return parts[0], int(parts[1])
    except ValueError:
        raise ValueError(f"{_shown(option, listen_ip_info)}: the port is no number") from None


def parse_address(option: str, text: str) -> Address:
    """Split ``"host:port"``, check both parts and resolve a host name; port 0 lets the system choose."""
    ip, port = parse_listen_ip_info(text.strip(), option)
    if not ip:
        raise invalid(option, text, "the address is empty")
    if not 0 <= port <= 65535:
        raise invalid(option, text, "the port must be in [0, 65535]")
    numeric = numeric_address(ip)
    if numeric is None:
        raise invalid(option, text, f"{ip!r} is neither an IP address nor a host name that can be resolved here")
    return numeric, port


def parse_integer(option: str, text: str, low: int, high: int) -> int:
    """Return the number of a text of ASCII digits."""
    if not (text.isascii() and text.isdigit()):
        raise invalid(option, text, "it must hold digits only")
    # A text with more digits than any bound is not converted: that takes quadratic time, and newer Pythons refuse it.
    number = int(text) if len(text) <= 20 else high + 1
    if not low <= number <= high:
        raise invalid(option, text, f"it must be in [{low}, {high}]")
    return number


def integer_in(low: int, high: int) -> Callable[[str, str], int]:
    """Return a parser of integers in [low, high]."""
    return lambda option, text: parse_integer(option, text, low, high)


def one_of(*allowed: str) -> Callable[[str, str], str]:
    """Return a parser that takes nothing but the texts given."""
    def parse(option: str, text: str) -> str:
        if text not in allowed:
            raise invalid(option, text, f"it must be one of {', '.join(allowed)}")
        return text

    return parse


def parse_flow_graph_bytes(option: str, text: str) -> PoolOptions:
    """Return the device pool of the first generation: a decimal number of bytes, exactly one."""
    if "," in text:
        raise invalid(option, text, "exactly one pool is supported")
    return _sized_pool(option, text, parse_integer(option, text, 1, INT64_MAX), V1_PAGE_SHIFT)


def parse_json_object(option: str, text: str) -> Dict[str, Any]:
    """Return a JSON object."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(option, text, f"it is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise invalid(option, text, "it must be a JSON object")
    return parsed


def objects_of(option: str, text: str, owner: Mapping[str, Any], field: str) -> List[Dict[str, Any]]:
    """Return a field of a JSON object that must be a non-empty array of objects."""
    value = owner.get(field)
    if not isinstance(value, list) or not value or not all(isinstance(element, dict) for element in value):
        raise invalid(option, text, f"{field} must be a non-empty array of objects")
    return value


def _unsigned(option: str, text: str, owner: Mapping[str, Any], field: str, default: Optional[int] = None) -> int:
    """Return a field of a JSON object that must be an unsigned integer; true and 1.0 are none."""
    value = owner.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= INT64_MAX:
        raise invalid(option, text, f"{field} must be an unsigned integer below 2**63")
    return value


def _sized_pool(option: str, text: str, memory_size: int, page_shift: int) -> PoolOptions:
    if not 1 <= memory_size >> page_shift <= _MAX_PAGES:
        raise invalid(option, text, f"the size must be 1 to 2**32 - 2 pages of {1 << page_shift} bytes")
    return PoolOptions(memory_size, page_shift)


def parse_pool(option: str, text: str) -> PoolOptions:
    """Return the pool of a JSON object with ``memory_size`` in bytes and, optionally, ``page_shift`` 10..30."""
    config = parse_json_object(option, text)
    memory_size = _unsigned(option, text, config, "memory_size")
    page_shift = _unsigned(option, text, config, "page_shift", DEFAULT_PAGE_SHIFT)
    if not 10 <= page_shift <= 30:
        raise invalid(option, text, "page_shift must be in [10, 30]")
    return _sized_pool(option, text, memory_size, page_shift)


def check_buffers(option: str, text: str) -> None:
    """Check the bounce buffers of the first generation, which nothing here needs."""
    previous = 0
    for entry in objects_of(option, text, parse_json_object(option, text), "buf_cfg"):
        total = _unsigned(option, text, entry, "total_size")
        block = _unsigned(option, text, entry, "blk_size")
        largest = _unsigned(option, text, entry, "max_buf_size")
        if not 0 < block <= _BUFFER_ALIGNMENT_BYTES or block & (block - 1) or block > largest:
            raise invalid(option, text, "blk_size must be a power of two, at most 2 MiB and at most max_buf_size")
        if not 0 < total <= UINT32_MAX or total % _BUFFER_ALIGNMENT_BYTES or total % block:
            raise invalid(option, text, "total_size must be a multiple of 2 MiB and of blk_size, below 2**32")
        if not previous < largest < total:
            raise invalid(option, text, "max_buf_size must be less than total_size, and increase over the entries")
        previous = largest


def check_comm_res(option: str, text: str) -> None:
    """Check a network identity: empty, a rank table of the own device (1.0, 1.2), or a list of endpoints (1.3)."""
    if text == "":
        return
    config = parse_json_object(option, text)
    version = config.get("version", "")
    if version == "":
        return                                              # nothing is named: as the empty text
    if version not in _COMM_RES_VERSIONS:
        raise invalid(option, text, f"version must be one of {', '.join(_COMM_RES_VERSIONS)}, as a text")
    if version != "1.3":
        for server in objects_of(option, text, config, "server_list"):
            objects_of(option, text, server, "device")
    elif "endpoint_list" in config:
        for endpoint in objects_of(option, text, config, "endpoint_list"):
            if not all(isinstance(endpoint.get(field), str) for field in ("protocol", "comm_id", "placement")):
                raise invalid(option, text, "every endpoint needs the texts protocol, comm_id and placement")


def check_json_object(option: str, text: str) -> None:
    """Check that a text is empty or a JSON object."""
    if text:
        parse_json_object(option, text)

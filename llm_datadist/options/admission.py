"""Who may link: the shared secret, and the addresses that are listened at without one.

No text of this module holds a secret or a part of one.
"""
from __future__ import annotations

import hashlib
import hmac
import ipaddress
from typing import List, Tuple, Union

from llm_datadist.options.addresses import numeric_address
from llm_datadist.options.values import invalid
from llm_datadist.status import LLMParamInvalidError

__all__ = ["OpenAddresses", "check_secret", "closed_text", "parse_open", "parse_secret", "read_secret_file"]

MIN_SECRET_CHARACTERS = 16
MAX_SECRETS = 2                 # LDD_MAX_SECRETS of ldd_wire.h: the one in use, and the one before or after it
_MAX_FILE_BYTES = 4096
_KEY_LABEL = b"llm_datadist link key"

_Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def closed_text(ip: str) -> str:
    """What to say of an address that is not listened at."""
    return (f"listening at {ip} lets everybody link who reaches it: set a shared secret (LLM_DATADIST_SECRET, "
            "LLM_DATADIST_SECRET_FILE or option llm.LinkSecret), or LLM_DATADIST_OPEN=1 (option llm.ListenOpen) where "
            "the network lets nobody else reach it")


def _named(option: str) -> str:
    return option if " " in option else f"option {option}"


def parse_secret(option: str, text: str) -> Tuple[bytes, ...]:
    """Turn one secret, or two with white space between, into the keys of proofs.

    Parameters
    ----------
    option : str
        Where the text came from, for the text of errors.
    text : str
        The secret that this process proves first, and one more that it accepts while secrets change.

    Returns
    -------
    tuple of bytes
        32 bytes for each; they are as secret as the text.

    Raises
    ------
    LLMParamInvalidError
        There is none, there are more than two, or one has fewer than 16 characters.
    """
    words = text.split()
    if not 1 <= len(words) <= MAX_SECRETS:
        raise LLMParamInvalidError(f"{_named(option)} holds {len(words)} secrets: one is needed, or two with white "
                                   "space between while they change")
    for number, word in enumerate(words, 1):
        if len(word) < MIN_SECRET_CHARACTERS:
            raise LLMParamInvalidError(f"secret {number} of {_named(option)} has {len(word)} characters: at least "
                                       f"{MIN_SECRET_CHARACTERS} are needed, chosen at random")
    return tuple(hmac.new(word.encode("utf-8", "surrogateescape"), _KEY_LABEL, hashlib.sha256).digest()
                 for word in words)


def check_secret(variable: str, text: str) -> None:
    """Check the text of a secret, as `parse_secret` does."""
    parse_secret(variable, text)


def read_secret_file(option: str, path: str) -> Tuple[bytes, ...]:
    """Return the keys for the secrets of a file, see `parse_secret`.

    Raises
    ------
    LLMParamInvalidError
        The file cannot be read, or does not hold what it should.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise invalid(option, path, f"it cannot be read: {error.strerror}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise invalid(option, path, f"the file has more than {_MAX_FILE_BYTES} bytes")
    return parse_secret(f"file {path}", text.decode("utf-8", "surrogateescape"))


class OpenAddresses:
    """The addresses that may be listened at although whoever reaches them may link.

    Parameters
    ----------
    every : bool
        Every address.
    networks : sequence of IPv4Network or IPv6Network
        Those in these networks, besides loopback.
    """

    def __init__(self, every: bool = False, networks: Tuple[_Network, ...] = ()) -> None:
        self._every = every
        self._networks = networks

    def allows(self, ip: str) -> bool:
        """Whether this address, a text or a host name, is loopback or one of these; ``"@name"`` is of this host."""
        if self._every or ip.startswith("@"):
            return True
        numeric = numeric_address(ip)
        if numeric is None:
            return True                         # listening fails, and says why
        address = ipaddress.ip_address(numeric.partition("%")[0])
        return address.is_loopback or any(address in network for network in self._networks)

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, OpenAddresses)
                and (self._every, self._networks) == (other._every, other._networks))

    def __hash__(self) -> int:
        return hash((self._every, self._networks))

    def __repr__(self) -> str:
        return f"OpenAddresses({'every' if self._every else ', '.join(map(str, self._networks))})"


def parse_open(option: str, text: str) -> OpenAddresses:
    """Parse ``"1"`` for every address, ``"0"`` for loopback alone, or networks and addresses joined by commas.

    Raises
    ------
    LLMParamInvalidError
        Something in it is neither an address nor a network.
    """
    if text in ("", "0", "1"):
        return OpenAddresses(every=text == "1")
    networks: List[_Network] = []
    for part in text.split(","):
        try:
            networks.append(ipaddress.ip_network(part.strip()))
        except ValueError as error:
            raise invalid(option, text, f"it must be 1, or addresses and networks joined by commas: {error}") from None
    return OpenAddresses(networks=tuple(networks))

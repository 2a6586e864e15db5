"""Status codes and the exception tree. A leaf: it imports only the logger, and everything may import it.

Which exception class, default `recoverable` and default `hint` belong to a code is said once, in `_OUTCOMES`.
Internal statuses of the compiled core reach these names through the list in ``ldd_status.h``.
"""
from __future__ import annotations

from enum import IntEnum
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple, Type, Union

from llm_datadist.utils import log

__all__ = [
    "LLMStatusCode", "Status", "LLMException", "LLMTimeoutError", "LLMParamInvalidError", "LLMNotFoundError",
    "LLMMemoryError", "LLMLinkError", "LLMNotEnabledError", "LLMDeviceError", "LLMChecksumError", "code_2_status",
    "exception_for", "handle_llm_status", "raise_if_false", "raise_if_true",
]


class NamedIntEnum(IntEnum):
    """An `IntEnum` whose text is ``Class.NAME`` on every Python; since 3.11 plain ones print the number."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, spec: str) -> str:
        # An integer presentation type ("d", "#x") still formats the number.
        return int.__format__(self, spec) if spec[-1:] in tuple("bcdnoxX") else format(str(self), spec)


class LLMStatusCode(NamedIntEnum):
    """Outcome of an operation. ``str()`` gives ``LLMStatusCode.NAME``.

    Notes
    -----
    Values of the block 0x5010B0xx are ``runtime(1) << 30 | type(1) << 28 | system(8) << 17 | module(11) << 12 | n``.
    ``LLM_DEVICE_MEM_ERROR`` and ``LLM_SUSPECT_REMOTE_ERROR`` are numbers of the acl runtime passed through.
    """

    LLM_SUCCESS = 0
    LLM_FAILED = 0xFFFFFFFF
    LLM_WAIT_PROCESS_TIMEOUT = 0x5010B001
    LLM_KV_CACHE_NOT_EXIST = 0x5010B002
    LLM_REPEAT_REQUEST = 0x5010B003
    LLM_REQUEST_ALREADY_COMPLETED = 0x5010B004
    LLM_PARAM_INVALID = 0x5010B005
    LLM_ENGINE_FINALIZED = 0x5010B006
    LLM_NOT_YET_LINK = 0x5010B007
    LLM_ALREADY_LINK = 0x5010B008
    LLM_LINK_FAILED = 0x5010B009
    LLM_UNLINK_FAILED = 0x5010B00A
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = 0x5010B00B
    LLM_CLUSTER_NUM_EXCEED_LIMIT = 0x5010B00C
    LLM_PROCESSING_LINK = 0x5010B00D
    LLM_DEVICE_OUT_OF_MEMORY = 0x5010B00E
    LLM_PREFIX_ALREADY_EXIST = 0x5010B00F
    LLM_PREFIX_NOT_EXIST = 0x5010B010
    LLM_SEQ_LENOVERLIMIT = 0x5010B011
    LLM_NO_FREE_BLOCK = 0x5010B012
    LLM_BLOCKS_OUT_OF_MEMORY = 0x5010B013
    LLM_EXIST_LINK = 0x5010B018
    LLM_FEATURE_NOT_ENABLED = 0x5010B019
    LLM_TIMEOUT = 0x5010B01A
    LLM_LINK_BUSY = 0x5010B01B
    LLM_OUT_OF_MEMORY = 0x5010B01C
    LLM_DEVICE_MEM_ERROR = 507053
    LLM_SUSPECT_REMOTE_ERROR = 507057
    LLM_UNKNOWN_ERROR = -1


def code_2_status(code: int) -> LLMStatusCode:
    """Return the member with the value `code`; an unknown value is ``LLM_FAILED``."""
    try:
        return LLMStatusCode(code)
    except ValueError:
        return LLMStatusCode.LLM_FAILED


class Status:
    """A status code as an object.

    Parameters
    ----------
    status : LLMStatusCode
        The code to hold.
    """

    def __init__(self, status: LLMStatusCode) -> None:
        self._status = status

    def is_ok(self) -> bool:
        """Return whether the code is ``LLM_SUCCESS``."""
        return self._status == LLMStatusCode.LLM_SUCCESS

    @property
    def status_code(self) -> LLMStatusCode:
        """The code."""
        return self._status

    def __repr__(self) -> str:
        return f"Status({self._status})"


class LLMException(RuntimeError):
    """An operation failed. Subclasses are also the builtin exception of their kind, where there is one.

    Parameters
    ----------
    *args : object
        As for any exception. ``str()`` of one that this package raised ends with the hint.
    status_code : LLMStatusCode
        What happened. A subclass puts its own code in the place of ``LLM_SUCCESS``.
    operation : str, optional
        The call that failed, such as ``"pull_blocks"``.
    peer : int or str, optional
        Cluster id or address of the other side.
    stage : str, optional
        How far the operation had come: ``"check"``, ``"link"``, ``"resolve"``, ``"plan"``, ``"transfer"``,
        ``"verify"``, ``"release"``, or ``"ping"``.
    provider_code : int, optional
        The number the memory or network provider returned: acl, HIXL or errno.
    recoverable : bool, optional
        Whether the call can succeed later in this process, perhaps after what `hint` says. Default: by status code.
    hint : str, optional
        What to do about it. Default: by status code.

    Notes
    -----
    Pickles with every field, also in subclasses that clients define, whatever their constructor takes.
    Of the codes, timeouts, all link states, and lack of memory or blocks are recoverable; wrong parameters, absent
    caches and features, device errors and unspecified failures are not.
    """

    _own_code = LLMStatusCode.LLM_SUCCESS
    # A client's subclass need not call our constructor.
    _status_code = LLMStatusCode.LLM_SUCCESS
    _operation: Optional[str] = None
    _peer: Union[int, str, None] = None
    _stage: Optional[str] = None
    _provider_code: Optional[int] = None
    _recoverable: Optional[bool] = None
    _hint: Optional[str] = None
    _failed_blocks: Optional[List[int]] = None
    _failed_layers: Optional[Sequence[int]] = None
    _faulty_tensors: Optional[List[int]] = None     # of the destination, whose bytes differ from their source's
    _num_tensors = 0                                # of the selection of a push that arrived before it failed

    def __init__(
        self, *args: object, status_code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS, operation: Optional[str] = None,
        peer: Union[int, str, None] = None, stage: Optional[str] = None, provider_code: Optional[int] = None,
        recoverable: Optional[bool] = None, hint: Optional[str] = None,
    ) -> None:
        super().__init__(*args)
        self._status_code = self._own_code if status_code == LLMStatusCode.LLM_SUCCESS else status_code
        self._operation = operation
        self._peer = peer
        self._stage = stage
        self._provider_code = provider_code
        self._recoverable = recoverable
        self._hint = hint

    def __str__(self) -> str:
        """The text, and where this package raised the exception also the hint."""
        text = super().__str__()
        # What a client makes itself reads as it wrote it.
        if (self._hint is None and self._operation is None) or not self.hint:
            return text
        return f"{text}{'' if text.endswith('.') else '.'} Hint: {self.hint}."

    def _complete(
        self, *, operation: Optional[str] = None, peer: Union[int, str, None] = None, stage: Optional[str] = None,
        link: Optional[str] = None, hint: Optional[str] = None, blocks: Optional[Sequence[int]] = None,
        layers: Optional[Sequence[int]] = None,
    ) -> None:
        """Fill in what the raising site did not know. `link`: how the link to the peer is now."""
        self._operation = operation if self._operation is None else self._operation
        self._peer = peer if self._peer is None else self._peer
        self._stage = stage if self._stage is None else self._stage
        self._hint = hint if self._hint is None else self._hint
        if link is not None and self._hint is None:
            self._hint = _LINK_HINTS.get((exception_for(self._status_code), link))
        if blocks is not None and self._failed_blocks is None:
            self._failed_blocks = [int(block) for block in blocks]
        if layers is not None and self._failed_layers is None:
            self._failed_layers = layers

    def __reduce__(self) -> Tuple[Any, ...]:
        # Not through __init__: a client's subclass may ask for arguments that args does not hold.
        return _restore, (type(self), self.args), self.__dict__

    @property
    def status_code(self) -> LLMStatusCode:
        """What happened."""
        return self._status_code

    @property
    def operation(self) -> Optional[str]:
        """The call that failed."""
        return self._operation

    @property
    def peer(self) -> Union[int, str, None]:
        """Cluster id or address of the other side."""
        return self._peer

    @property
    def stage(self) -> Optional[str]:
        """How far the operation had come."""
        return self._stage

    @property
    def failed_blocks(self) -> Optional[List[int]]:
        """Destination blocks that the call was to fill and did not; None where it names no blocks.

        Of an `LLMChecksumError` those alone that differ from their source.
        """
        return self._failed_blocks

    @property
    def failed_layers(self) -> Optional[Sequence[int]]:
        """Destination layers that were not completed; those before them of a push were. None where none are known.

        A range, but for an `LLMChecksumError` whose layers do not follow each other, which lists them.
        """
        return self._failed_layers

    @property
    def provider_code(self) -> Optional[int]:
        """The number the provider returned: acl, HIXL or errno."""
        return self._provider_code

    @property
    def recoverable(self) -> bool:
        """Whether the call can succeed later in this process, perhaps after what `hint` says."""
        return _OUTCOMES.get(self._status_code, _UNKNOWN)[1] if self._recoverable is None else self._recoverable

    @property
    def hint(self) -> Optional[str]:
        """What to do about it."""
        if self._hint is None and self._peer is None and self._operation is not None and isinstance(
                self, LLMTimeoutError):
            return _REPEAT                          # nobody else was involved
        return _OUTCOMES.get(self._status_code, _UNKNOWN)[2] if self._hint is None else self._hint


class LLMTimeoutError(LLMException, TimeoutError):
    """The deadline of the call passed; own code ``LLM_TIMEOUT``."""

    _own_code = LLMStatusCode.LLM_TIMEOUT


class LLMParamInvalidError(LLMException, ValueError):
    """An argument or option has a value that is not allowed, and nothing was done; own code ``LLM_PARAM_INVALID``."""

    _own_code = LLMStatusCode.LLM_PARAM_INVALID


class LLMNotFoundError(LLMException, LookupError):
    """No such cache or key, here or at the peer; own code ``LLM_KV_CACHE_NOT_EXIST``."""

    _own_code = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


class LLMMemoryError(LLMException, MemoryError):
    """A pool or the provider has no room, and nothing was allocated; own code ``LLM_OUT_OF_MEMORY``."""

    _own_code = LLMStatusCode.LLM_OUT_OF_MEMORY


class LLMLinkError(LLMException, ConnectionError):
    """The state of a link forbids the call, or linking failed; own code ``LLM_LINK_FAILED``."""

    _own_code = LLMStatusCode.LLM_LINK_FAILED


class LLMNotEnabledError(LLMException):
    """The options, the provider or the role lack the feature; own code ``LLM_FEATURE_NOT_ENABLED``."""

    _own_code = LLMStatusCode.LLM_FEATURE_NOT_ENABLED


class LLMDeviceError(LLMException):
    """The device reported a memory fault; own code ``LLM_DEVICE_MEM_ERROR``."""

    _own_code = LLMStatusCode.LLM_DEVICE_MEM_ERROR


class LLMChecksumError(LLMException):
    """Bytes arrived otherwise than they left, seen where `LLMConfig.checksum` is on; own code ``LLM_FAILED``."""

    _own_code = LLMStatusCode.LLM_FAILED

    @property
    def recoverable(self) -> bool:
        """True unless said otherwise: the source is as it was, and its key was not taken."""
        return True if self._recoverable is None else self._recoverable

    @property
    def hint(self) -> Optional[str]:
        """What to do about it."""
        return _MOVE_AGAIN if self._hint is None else self._hint


def _restore(cls: Type[LLMException], args: Tuple[object, ...]) -> LLMException:
    """Rebuild a pickled exception; its fields follow as state."""
    # The builtin that lays out the object must create it: OSError and its kind have fields of their own.
    exception = OSError.__new__(cls) if issubclass(cls, OSError) else RuntimeError.__new__(cls)
    exception.args = args
    return exception


_Outcome = Tuple[Type[LLMException], bool, Optional[str]]
_UNKNOWN: _Outcome = (LLMException, False, None)
_RELINK = "unlink the peer, link it again, and repeat the call"
_HEALS = "repeat the call: it makes the link anew if the peer is there"
_LINK = "link the peer, or wait until its registration is OK"
_REPEAT = "repeat the call, or give it more time with sync_kv_timeout"
_MOVE_AGAIN = ("repeat the call, and look for programs that write to either end meanwhile; what differs again and "
               "again is damaged by memory or network")
_FREE = "deallocate caches or remove keys that are no longer pulled, or configure a larger pool"

# Code -> (exception class, recoverable, hint). A code without a row is an LLMException that is not recoverable.
_OUTCOMES: Dict[int, _Outcome] = {
    LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT: (LLMTimeoutError, True, _RELINK),
    LLMStatusCode.LLM_TIMEOUT: (LLMTimeoutError, True, _RELINK),
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST: (
        LLMNotFoundError, False, "compute the cache again: it was never bound, was pulled already, or was freed"),
    LLMStatusCode.LLM_PARAM_INVALID: (LLMParamInvalidError, False, None),
    LLMStatusCode.LLM_REPEAT_REQUEST: (LLMParamInvalidError, False, "name each cluster once per call"),
    LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT: (LLMParamInvalidError, False, "split the clusters over several calls"),
    LLMStatusCode.LLM_ENGINE_FINALIZED: (LLMException, False, "call init again"),
    LLMStatusCode.LLM_NOT_YET_LINK: (LLMLinkError, True, _LINK),
    LLMStatusCode.LLM_ALREADY_LINK: (LLMLinkError, True, "use the link, or unlink with force=True first"),
    LLMStatusCode.LLM_LINK_FAILED: (LLMLinkError, True, "check that the peer listens there, and link again"),
    LLMStatusCode.LLM_UNLINK_FAILED: (LLMLinkError, True, "unlink with force=True"),
    LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED: (LLMLinkError, True, "unlink on the peer with force=True"),
    LLMStatusCode.LLM_PROCESSING_LINK: (LLMLinkError, True, "repeat the call when the other link call has returned"),
    LLMStatusCode.LLM_EXIST_LINK: (LLMLinkError, True, "unlink all peers first"),
    LLMStatusCode.LLM_LINK_BUSY: (LLMLinkError, True, "repeat the call when the other one on this link has returned"),
    LLMStatusCode.LLM_OUT_OF_MEMORY: (LLMMemoryError, True, _FREE),
    LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY: (LLMMemoryError, True, _FREE),
    LLMStatusCode.LLM_NO_FREE_BLOCK: (LLMMemoryError, True, _FREE),
    LLMStatusCode.LLM_BLOCKS_OUT_OF_MEMORY: (LLMMemoryError, True, _FREE),
    LLMStatusCode.LLM_FEATURE_NOT_ENABLED: (LLMNotEnabledError, False, None),
    LLMStatusCode.LLM_DEVICE_MEM_ERROR: (LLMDeviceError, False, "restart the process: the device memory is damaged"),
    LLMStatusCode.LLM_SUSPECT_REMOTE_ERROR: (LLMDeviceError, True, _RELINK),
}


# What helps depends on what became of the link; other pairs keep the hint of their code.
_LINK_HINTS = {
    (LLMLinkError, "broken"): _RELINK, (LLMTimeoutError, "broken"): _RELINK, (LLMTimeoutError, "none"): _RELINK,
    (LLMTimeoutError, "active"): _REPEAT, (LLMLinkError, "heals"): _HEALS, (LLMTimeoutError, "heals"): _HEALS,
}


def exception_for(status_code: LLMStatusCode) -> Type[LLMException]:
    """Return the exception class of `status_code`; `LLMException` itself when no subclass fits."""
    return _OUTCOMES.get(status_code, _UNKNOWN)[0]


def handle_llm_status(status: int, func_name: str, other_info: object) -> None:
    """Raise the exception of a nonzero `status`.

    Parameters
    ----------
    status : int
        Value of an `LLMStatusCode`; an unknown one counts as ``LLM_FAILED``.
    func_name : str
        The operation, for the text.
    other_info : object
        Detail, for the text.

    Raises
    ------
    LLMException
        The subclass for the code, with the text ``<func_name> failed, error code is <code>, <other_info>.``
    """
    if status != LLMStatusCode.LLM_SUCCESS:
        code = code_2_status(status)
        raise exception_for(code)(
            f"{func_name} failed, error code is {code}, {other_info}.", status_code=code, operation=func_name)


def _log_and_raise(fmt: str, args: Tuple[object, ...], kwargs: Dict[str, object], code: LLMStatusCode) -> NoReturn:
    text = fmt.format(*args, **kwargs) if args or kwargs else fmt
    log.get_logger().error("%s", text, stacklevel=3)    # named in the record is the caller of raise_if_*
    raise exception_for(code)(text, status_code=code)


def raise_if_false(
    pred: object, fmt: str, *args: object, status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kwargs: object,
) -> None:
    """Log and raise unless `pred` holds.

    Parameters
    ----------
    pred : object
        Taken for its truth.
    fmt : str
        Text. It passes through ``str.format`` only when there are `args` or `kwargs`, so a final text may hold braces.
    status_code : LLMStatusCode
        Code, and thereby class, of the exception.

    Raises
    ------
    LLMException
        The subclass for `status_code`.
    """
    if not pred:
        _log_and_raise(fmt, args, kwargs, status_code)


def raise_if_true(
    pred: object, fmt: str, *args: object, status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kwargs: object,
) -> None:
    """Log and raise if `pred` holds; `fmt` and `status_code` are those of `raise_if_false`.

    Raises
    ------
    LLMException
        The subclass for `status_code`.
    """
    if pred:
        _log_and_raise(fmt, args, kwargs, status_code)

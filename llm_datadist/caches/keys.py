"""Names under which a cache is found, on this side and by peers."""
from __future__ import annotations

from typing import Any, Dict, Optional, Tuple, Union

from llm_datadist.status import LLMParamInvalidError
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.spelling import did_you_mean
from llm_datadist.utils.utils import check_int64, check_isinstance, check_uint32, check_uint64

__all__ = ["CacheKey", "CacheKeyByIdAndIndex", "BlocksCacheKey", "INVALID_ID", "is_invalid_id", "is_valid_id"]

INVALID_ID = 2**64 - 1


def is_valid_id(number: int) -> bool:
    """Return whether `number` is an id, that is, not 2**64 - 1."""
    return number != INVALID_ID


def is_invalid_id(number: int) -> bool:
    """Return whether `number` is 2**64 - 1, which stands for no id."""
    return number == INVALID_ID


def _bind(
    kind: str, names: Tuple[str, ...], required: int, args: Tuple[Any, ...], kwargs: Dict[str, Any],
) -> Dict[str, Any]:
    """Bind arguments to `names`; ``prompt_cluster_id`` is the older name of ``cluster_id``, which wins over it."""
    if len(args) + len(kwargs) > len(names):
        raise LLMParamInvalidError(f"{kind} takes at most {len(names)} arguments, {', '.join(names)}; "
                                   f"got {len(args) + len(kwargs)}", operation=kind)
    bound = dict(zip(names, args))
    for name, value in kwargs.items():
        if name not in names and name != "prompt_cluster_id":
            raise LLMParamInvalidError(
                f"{kind} has no argument {name!r}; {did_you_mean(name, (*names, 'prompt_cluster_id'))}",
                operation=kind)
        if name in bound:
            raise LLMParamInvalidError(f"{kind} got {name!r} both by position and by keyword", operation=kind)
        bound[name] = value
    if "prompt_cluster_id" in bound:
        older = bound.pop("prompt_cluster_id")
        bound.setdefault("cluster_id", older)
    for name in names[:required]:
        if name not in bound:
            raise LLMParamInvalidError(f"{kind}: {name} is required; it takes {', '.join(names)}", operation=kind)
    return bound


class CacheKey:
    """Key of one batch slot of a contiguous cache, by request or by prefix.

    Parameters
    ----------
    cluster_id : int
        Cluster that owns the cache, uint64. As a keyword also ``prompt_cluster_id``.
    req_id : int
        Request, uint64. 2**64 - 1 means none; without a prefix, that is a padding key, which binds nothing.
    model_id : int
        Model, uint64; default 0.
    prefix_id : int
        Prefix, uint64; default 2**64 - 1, which means none.

    Raises
    ------
    TypeError, ValueError
        A value is no int, or does not fit uint64.
    LLMParamInvalidError
        More than 4 arguments, an unknown or repeated one, or `cluster_id` or `req_id` missing.

    Notes
    -----
    Compares by identity.
    """

    _packed: Optional[Tuple[int, Tuple[int, int, int, int]]] = None     # how the engine names it, once it was used

    def __init__(self, *args: int, **kwargs: int) -> None:
        bound = _bind("CacheKey", ("cluster_id", "req_id", "model_id", "prefix_id"), 2, args, kwargs)
        self._cluster_id = check_uint64("cluster_id", bound["cluster_id"])
        self._req_id = check_uint64("req_id", bound["req_id"])
        self._model_id = check_uint64("model_id", bound.get("model_id", 0))
        self._prefix_id = check_uint64("prefix_id", bound.get("prefix_id", INVALID_ID))

    @property
    def cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """Older name of `cluster_id`."""
        return self._cluster_id

    @property
    def req_id(self) -> int:
        """Request; 2**64 - 1 for none."""
        return self._req_id

    @property
    def prefix_id(self) -> int:
        """Prefix; 2**64 - 1 for none."""
        return self._prefix_id

    @property
    def model_id(self) -> int:
        """Model."""
        return self._model_id

    def __repr__(self) -> str:
        return (f"CacheKey(cluster_id={self._cluster_id}, req_id={self._req_id}, prefix_id={self._prefix_id}, "
                f"model_id={self._model_id})")


class CacheKeyByIdAndIndex:
    """Key of one batch slot of a cache by the id its owner knows it under.

    Parameters
    ----------
    cluster_id : int
        Cluster that owns the cache, uint64.
    cache_id : int
        Id of the cache there, int64.
    batch_index : int
        Batch slot, uint32.

    Raises
    ------
    TypeError, ValueError
        A value is no int, or does not fit its integer type.
    """

    _packed: Optional[Tuple[int, Tuple[int, int, int, int]]] = None     # how the engine names it, once it was used

    @public_call
    def __init__(self, cluster_id: int, cache_id: int, batch_index: int = 0) -> None:
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._cache_id = check_int64("cache_id", cache_id)
        self._batch_index = check_uint32("batch_index", batch_index)

    @property
    def cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def cache_id(self) -> int:
        """Id of the cache there."""
        return self._cache_id

    @property
    def batch_index(self) -> int:
        """Batch slot."""
        return self._batch_index

    def __repr__(self) -> str:
        return (f"CacheKeyByIdAndIndex(cluster_id={self._cluster_id}, cache_id={self._cache_id}, "
                f"batch_index={self._batch_index})")


class BlocksCacheKey:
    """Key of the blocks cache of a model.

    Parameters
    ----------
    cluster_id : int
        Cluster that owns the cache. As a keyword also ``prompt_cluster_id``.
    model_id : int
        Model; default 0.

    Raises
    ------
    TypeError
        A value is neither an int nor None. Its range is checked when the key is used.
    LLMParamInvalidError
        More than 2 arguments, an unknown or repeated one, or `cluster_id` missing.

    Notes
    -----
    Compares by identity.
    """

    _packed: Optional[Tuple[int, Tuple[int, int, int, int]]] = None     # how the engine names it, once it was used

    def __init__(self, *args: int, **kwargs: int) -> None:
        bound = _bind("BlocksCacheKey", ("cluster_id", "model_id"), 1, args, kwargs)
        self._spelling = "cluster_id" if args or "cluster_id" in kwargs else "prompt_cluster_id"
        self._cluster_id: int = check_isinstance(self._spelling, bound["cluster_id"], int)
        self._model_id: int = check_isinstance("model_id", bound.get("model_id", 0), int)

    @property
    def cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """Older name of `cluster_id`."""
        return self._cluster_id

    @property
    def model_id(self) -> int:
        """Model."""
        return self._model_id

    def __repr__(self) -> str:
        return f"BlocksCacheKey({self._spelling}={self._cluster_id}, model_id={self._model_id})"


AnyCacheKey = Union[CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey]

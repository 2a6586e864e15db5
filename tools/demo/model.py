"""A small decoder-only transformer over bytes, in float32 NumPy.

Pre-norm blocks of causal multi-head attention with rotary positions and a SwiGLU feed-forward layer. Weights are drawn
from a seed, so two processes that share a seed hold the same model without exchanging a byte. Keys and values live in a
store the caller supplies (`llm_datadist.tools.demo.kv`), which is what makes prefill and decode separable.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

VOCABULARY = 256
_EPSILON = np.float32(1e-6)
_ROTARY_BASE = 10000.0
# Queries and keys of plain random weights give nearly uniform attention, and then hardly any cached token matters to
# what is generated. Sharper scores and a louder result make the output depend on single cache entries, as it does in a
# trained model: equal tokens are to be evidence that the cache arrived.
_QUERY_GAIN = 6.0
_ATTENTION_GAIN = 2.5


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Attributes
    ----------
    num_layers, num_heads, head_size : int
        All at least 1; `head_size` is even, because rotary positions turn pairs of dimensions.
    seed : int
        Source of all weights, at least 0.
    """

    num_layers: int = 6
    num_heads: int = 8
    head_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size}: must be even")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.num_heads * self.head_size

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one tensor (K or V of one layer)."""
        return self.width * np.dtype(np.float32).itemsize


def encode(text: str) -> list[int]:
    """Return the UTF-8 bytes of `text` as tokens."""
    return list(text.encode("utf-8"))


def decode(tokens: list[int]) -> str:
    """Return the text of `tokens`; bytes that are no UTF-8 become replacement characters."""
    return bytes(tokens).decode("utf-8", "replace")


class _Layer:
    def __init__(self, rng: np.random.Generator, config: ModelConfig) -> None:
        width, hidden = config.width, 2 * config.width

        def weight(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
            return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale / math.sqrt(rows))

        self.query = weight(width, width, _QUERY_GAIN)
        self.key = weight(width, width)
        self.value = weight(width, width)
        self.out = weight(width, width, _ATTENTION_GAIN)
        self.gate = weight(width, hidden)
        self.up = weight(width, hidden)
        self.down = weight(hidden, width, 1.0 / math.sqrt(2 * config.num_layers))


class Transformer:
    """The model. Holds no state between calls; the store passed in does.

    Parameters
    ----------
    config : ModelConfig

    Notes
    -----
    The same tokens, store lengths and NumPy build give the same bits on every run. Prefill and token-by-token decode of
    one sequence agree to rounding only, since the shapes of the matrix products differ.
    """

    def __init__(self, config: ModelConfig) -> None:
        rng = np.random.default_rng(config.seed)
        self.config = config
        self._embedding = rng.standard_normal((VOCABULARY, config.width), dtype=np.float32)
        self._layers = [_Layer(rng, config) for _ in range(config.num_layers)]
        self._head = rng.standard_normal((config.width, VOCABULARY), dtype=np.float32)
        half = config.head_size // 2
        self._rotary = (_ROTARY_BASE ** (-np.arange(half) / half)).astype(np.float32)

    def prefill(self, tokens: list[int], store) -> np.ndarray:
        """Run a whole prompt, writing K and V of every layer into `store` from position 0.

        Returns
        -------
        numpy.ndarray, shape (256,), float32
            Logits of the token that follows the prompt.
        """
        return self._forward(np.asarray(tokens, dtype=np.intp), 0, store)

    def decode_step(self, token: int, position: int, store) -> np.ndarray:
        """Run one token at `position`; K and V of positions 0 to position-1 are read from `store`.

        Returns
        -------
        numpy.ndarray, shape (256,), float32
            Logits of the token that follows.
        """
        return self._forward(np.asarray([token], dtype=np.intp), position, store)

    def _forward(self, tokens: np.ndarray, start: int, store) -> np.ndarray:
        num_tokens = len(tokens)
        heads = (num_tokens, self.config.num_heads, self.config.head_size)
        angles = np.arange(start, start + num_tokens, dtype=np.float32)[:, None] * self._rotary
        cosine, sine = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
        hidden = self._embedding[tokens]
        for index, layer in enumerate(self._layers):
            normed = _rms_norm(hidden)
            query = _rotate((normed @ layer.query).reshape(heads), cosine, sine)
            key = _rotate((normed @ layer.key).reshape(heads), cosine, sine)
            store.write(index, start, key, (normed @ layer.value).reshape(heads))
            keys, values = store.read(index, start + num_tokens)
            hidden = hidden + _attend(query, keys, values) @ layer.out
            normed = _rms_norm(hidden)
            hidden = hidden + (_silu(normed @ layer.gate) * (normed @ layer.up)) @ layer.down
        return _rms_norm(hidden[-1]) @ self._head


def greedy(logits: np.ndarray) -> int:
    """Return the most likely token; the lowest one among equals."""
    return int(np.argmax(logits))


def generate(model: Transformer, store, first_token: int, position: int, num_tokens: int) -> list[int]:
    """Return `num_tokens` greedy tokens: `first_token`, which stands at `position`, and those that follow it.

    The store holds K and V of all positions before `position` and has room for the new ones.
    """
    tokens = [first_token]
    while len(tokens) < num_tokens:
        tokens.append(greedy(model.decode_step(tokens[-1], position, store)))
        position += 1
    return tokens


def _rms_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + _EPSILON)


def _silu(x: np.ndarray) -> np.ndarray:
    # tanh instead of exp: the same function, and no overflow for large negative inputs.
    return np.float32(0.5) * x * (np.float32(1.0) + np.tanh(np.float32(0.5) * x))


def _rotate(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Turn each pair (x[i], x[i + half]) of every head by the angle of its position."""
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    return np.concatenate((left * cosine - right * sine, left * sine + right * cosine), axis=-1)


def _attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of the last n positions, (n, heads, size), over all t of them; result (n, heads * size)."""
    num_queries, num_heads, head_size = query.shape
    num_keys = len(keys)
    scores = np.matmul(query.transpose(1, 0, 2), keys.transpose(1, 2, 0)) * np.float32(1.0 / math.sqrt(head_size))
    if num_queries > 1:
        future = np.arange(num_keys) > np.arange(num_keys - num_queries, num_keys)[:, None]
        scores[:, future] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.matmul(scores, values.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(num_queries, num_heads * head_size)

"""Shapes of the KV caches of known models."""
from __future__ import annotations

from dataclasses import dataclass, replace

DEFAULT_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Model:
    """How a model lays out what it keeps per token, one tensor group per layer.

    Attributes
    ----------
    layers : int
    kv_heads : int
        Heads of keys and values; 1 for multi-head latent attention.
    head_size : int
        Elements per head; for latent attention the latent and the rotary part together.
    tensors_per_layer : int
        2: keys and values; 1: one latent.
    element_bytes : int
    """

    layers: int
    kv_heads: int
    head_size: int
    tensors_per_layer: int = 2
    element_bytes: int = 2

    @property
    def num_tensors(self) -> int:
        return self.layers * self.tensors_per_layer

    @property
    def tensor_token_bytes(self) -> int:
        """Bytes per token and tensor."""
        return self.kv_heads * self.head_size * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return self.num_tensors * self.tensor_token_bytes

    def shard(self, tensor_parallel: int) -> Model:
        """Return what one of `tensor_parallel` ranks keeps: its share of the heads, at least one; latents are whole."""
        return replace(self, kv_heads=max(1, self.kv_heads // tensor_parallel))


# Published configurations; 16 bit elements.
MODELS = {
    "llama-3-8b": Model(layers=32, kv_heads=8, head_size=128),
    "llama-3-70b": Model(layers=80, kv_heads=8, head_size=128),
    "llama-3.1-405b": Model(layers=126, kv_heads=8, head_size=128),
    "qwen2.5-7b": Model(layers=28, kv_heads=4, head_size=128),
    "qwen2.5-72b": Model(layers=80, kv_heads=8, head_size=128),
    "qwen3-32b": Model(layers=64, kv_heads=8, head_size=128),
    "mistral-7b": Model(layers=32, kv_heads=8, head_size=128),
    "mixtral-8x7b": Model(layers=32, kv_heads=8, head_size=128),
    "gpt-oss-120b": Model(layers=36, kv_heads=8, head_size=64),
    "deepseek-v3": Model(layers=61, kv_heads=1, head_size=512 + 64, tensors_per_layer=1),
}

"""Small language models with random weights and a tokenizer, made on the spot: nothing is downloaded.

Needs torch, transformers and tokenizers, which come with vLLM.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, List

__all__ = ["KINDS", "make_model", "server_arguments"]

VOCAB_SIZE = 2048
MAX_TOKENS = 2048
# So wide that the greatest logit is seldom a close call: a sum in another order must not change the token.
SPREAD = 0.15


def make_model(directory: Path, kind: str = "tiny") -> Path:
    """Write a model and its tokenizer, unless they are there.

    Parameters
    ----------
    directory : Path
        Where models are kept; each kind in a directory of its own.
    kind : str
        One of `KINDS`.

    Returns
    -------
    Path
        The model's directory, as vLLM takes it.
    """
    place = directory / kind
    if (place / "complete").exists():
        return place
    import torch

    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = KINDS[kind]()
    model.to(torch.float32).eval()
    model.save_pretrained(place, safe_serialization=True)
    _write_tokenizer(place)
    (place / "complete").touch()
    return place


def _llama(**sizes: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_common(), **sizes))


def _tiny() -> Any:
    return _llama(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
                  num_key_value_heads=4, head_dim=32)


def _fat() -> Any:
    """Little to compute and much to move: 128 KiB per token."""
    return _llama(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=16,
                  num_key_value_heads=16, head_dim=128)


def _hybrid() -> Any:
    """Sliding windows beside full attention."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(
        **{**_common(), "tie_word_embeddings": True}, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, sliding_window=256, query_pre_attn_scalar=32))


def _mla() -> Any:
    """Keys and values as one latent vector per token."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return DeepseekV2ForCausalLM(DeepseekV2Config(
        **_common(), hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=32,
        v_head_dim=32, head_dim=64, first_k_dense_replace=3, moe_intermediate_size=64))


def server_arguments(kind: str) -> List[str]:
    """Return what a server needs besides, to answer the same however a prompt is split.

    vLLM's compiled rotary embedding for processors leaves out every position but the first where keys and queries are
    not contiguous, as those of latent attention are; a token by itself is contiguous. Its PyTorch form is right.
    """
    return ["--compilation-config", '{"custom_ops": ["all", "-rotary_embedding"]}'] if kind == "mla" else []


KINDS: Dict[str, Callable[[], Any]] = {"tiny": _tiny, "fat": _fat, "hybrid": _hybrid, "mla": _mla}


def _common() -> Dict[str, Any]:
    return {"vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_TOKENS, "initializer_range": SPREAD,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False}


def _write_tokenizer(place: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (Path(__file__).parent.parent / "demo" / "paged_kv.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # Random weights choose any id; every id must be a token for the text to tell them apart.
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f" <{index}>" for index in range(missing)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(place)
    settings = place / "generation_config.json"
    settings.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}), encoding="utf-8")

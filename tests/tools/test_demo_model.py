"""The demo's model against itself: cached decode, both layouts, determinism."""
import numpy as np
import pytest

from llm_datadist.tools.demo import kv, model, workload
from llm_datadist.tools.demo.model import ModelConfig, Transformer

CONFIG = ModelConfig(num_layers=3, num_heads=2, head_size=16, seed=5)
PROMPT = model.encode("A cache that is being read is pinned.")
NUM_NEW = 12
BLOCK_TOKENS = 8


@pytest.fixture(scope="module")
def transformer():
    return Transformer(CONFIG)


def contiguous():
    return kv.ContiguousKV.private(CONFIG.num_layers, len(PROMPT) + NUM_NEW, CONFIG.num_heads, CONFIG.head_size)


def paged(seed=1, total_blocks=20):
    shape = (total_blocks, BLOCK_TOKENS, CONFIG.num_heads, CONFIG.head_size)
    tensors = [np.full(shape, np.nan, dtype=np.float32) for _ in range(2 * CONFIG.num_layers)]
    return kv.PagedKV(tensors, kv.scatter_tables([len(PROMPT) + NUM_NEW], BLOCK_TOKENS, total_blocks, seed)[0])


def run(transformer, store):
    first = model.greedy(transformer.prefill(PROMPT, store))
    return model.generate(transformer, store, first, len(PROMPT), NUM_NEW)


def test_cached_decode_equals_full_recompute(transformer):
    store = contiguous()
    logits = transformer.prefill(PROMPT, store)
    sequence = list(PROMPT)
    for _ in range(NUM_NEW):
        full = transformer.prefill(sequence, contiguous())
        np.testing.assert_allclose(logits, full, rtol=2e-3, atol=2e-3)
        token = model.greedy(full)
        assert model.greedy(logits) == token
        logits = transformer.decode_step(token, len(sequence), store)
        sequence.append(token)


def test_paged_layout_gives_the_same_bits(transformer):
    slot, blocks = contiguous(), paged()
    assert run(transformer, slot) == run(transformer, blocks)
    grown = len(PROMPT) + NUM_NEW - 1
    assert kv.digest(slot, grown) == kv.digest(blocks, grown)


def test_causal(transformer):
    """A later token changes neither K nor V of earlier positions."""
    changed = [*PROMPT[:-1], (PROMPT[-1] + 1) % model.VOCABULARY]
    one, other = contiguous(), contiguous()
    transformer.prefill(PROMPT, one)
    transformer.prefill(changed, other)
    assert kv.digest(one, len(PROMPT) - 1) == kv.digest(other, len(PROMPT) - 1)
    assert kv.digest(one, len(PROMPT)) != kv.digest(other, len(PROMPT))


def test_equal_seeds_give_equal_models(transformer):
    twin = Transformer(CONFIG)
    other = Transformer(ModelConfig(num_layers=3, num_heads=2, head_size=16, seed=6))
    assert run(twin, contiguous()) == run(transformer, contiguous()) != run(other, contiguous())


def test_tokens_depend_on_the_cache(transformer):
    """Otherwise equal tokens would say nothing about the transfer."""
    store = contiguous()
    first = model.greedy(transformer.prefill(PROMPT, store))
    expected = model.generate(transformer, store, first, len(PROMPT), NUM_NEW)
    store = contiguous()
    assert model.generate(transformer, store, first, len(PROMPT), NUM_NEW) != expected


def test_copy_tokens_between_layouts(transformer):
    slot, blocks = contiguous(), paged()
    transformer.prefill(PROMPT, slot)
    kv.copy_tokens(slot, blocks, len(PROMPT))
    assert kv.digest(slot, len(PROMPT)) == kv.digest(blocks, len(PROMPT))


@pytest.mark.parametrize("make", [contiguous, paged])
def test_flip_byte_damages_one_value(transformer, make):
    store = make()
    transformer.prefill(PROMPT, store)
    before = [tensor.copy() for layer in range(CONFIG.num_layers) for tensor in store.read(layer, len(PROMPT))]
    digest = kv.digest(store, len(PROMPT))
    kv.flip_byte(store, len(PROMPT))
    after = [tensor for layer in range(CONFIG.num_layers) for tensor in store.read(layer, len(PROMPT))]
    changed = sum(int((old.view(np.uint8) != new.view(np.uint8)).sum()) for old, new in zip(before, after))
    assert changed == 1
    assert kv.digest(store, len(PROMPT)) != digest


def test_a_missing_token_spoils_what_follows(transformer):
    """Poisoned memory that no transfer reached must not pass for an empty cache."""
    slot = contiguous()
    transformer.prefill(PROMPT, slot)
    tensors = [np.empty((1, len(PROMPT) + NUM_NEW, CONFIG.num_heads, CONFIG.head_size), np.float32) for _ in range(6)]
    kv.poison(tensors)
    partial = kv.ContiguousKV(tensors)
    kv.copy_tokens(slot, partial, len(PROMPT) - 1)
    assert np.isnan(transformer.decode_step(65, len(PROMPT), partial)).all()
    kv.copy_tokens(slot, partial, len(PROMPT))
    assert np.isfinite(transformer.decode_step(65, len(PROMPT), partial)).all()


def test_scatter_tables_are_disjoint_and_sized():
    tables = kv.scatter_tables([1, 16, 17, 40], 16, 20, seed=3)
    assert [len(table) for table in tables] == [1, 1, 2, 3]
    blocks = np.concatenate(tables).tolist()
    assert len(set(blocks)) == len(blocks)
    assert set(blocks) <= set(range(20))
    with pytest.raises(ValueError, match="total_blocks=6"):
        kv.scatter_tables([1, 16, 17, 40], 16, 6, seed=3)


def test_tokenizer_round_trip():
    text = "Blöcke, 块, bloques"
    assert model.decode(model.encode(text)) == text
    assert max(model.encode(text)) < model.VOCABULARY


@pytest.mark.parametrize(
    "values", [{"num_layers": 0}, {"num_heads": 0}, {"head_size": 0}, {"head_size": 7}, {"seed": -1}]
)
def test_model_config_refuses(values):
    (name,) = values
    with pytest.raises(ValueError, match=name):
        ModelConfig(**values)


def test_prompts_are_cut_from_the_text():
    text = workload.default_text()
    prompts = workload.cut_prompts(text, 8, 17, 700, seed=0)
    lengths = [len(prompt) for prompt in prompts]
    assert lengths[0] == 17 and lengths[-1] == 700
    assert lengths == sorted(set(lengths))
    assert all(bytes(prompt) in text.encode() for prompt in prompts)
    assert prompts == workload.cut_prompts(text, 8, 17, 700, seed=0)


def test_prompts_of_a_short_text_are_shortened():
    assert [len(prompt) for prompt in workload.cut_prompts("abcdefgh", 3, 2, 700, seed=0)] == [2, 4, 8]


@pytest.mark.parametrize(
    ("num_requests", "shortest", "longest", "named"),
    [(0, 1, 2, "requests=0"), (1, 0, 2, "0 to 2"), (1, 3, 2, "3 to 2"), (1, 9, 9, "8 bytes")],
)
def test_impossible_prompts_are_refused(num_requests, shortest, longest, named):
    with pytest.raises(ValueError, match=named):
        workload.cut_prompts("abcdefgh", num_requests, shortest, longest, seed=0)


def test_settings_size_the_pool():
    settings = workload.Settings(CONFIG, ((1,) * 17, (2,) * 100), num_new_tokens=4, block_tokens=16)
    assert settings.slot_shape == [1, 104, 2, 16]
    assert settings.blocks_shape == [2 * (2 + 7), 16, 2, 16]
    # 18 blocks of 16 positions at 128 bytes fit one 64 KiB page per tensor, and so does a slot.
    assert settings.pool_config(num_slots=2) == f'{{"memory_size": {6 * 3 * 65536}, "page_shift": 16}}'
    with pytest.raises(ValueError, match="num_new_tokens=0"):
        workload.Settings(CONFIG, ((1,),), num_new_tokens=0)
    with pytest.raises(ValueError, match="prompts"):
        workload.Settings(CONFIG, ((1,), ()))

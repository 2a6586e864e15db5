"""Layer-wise transfers that stop early, cannot reach their destination, or must not start."""
import pytest
from support import reference
from transfers.caches import Named, Spec, invoke
from transfers.refusal import INVALID, NOT_EXIST, NOT_LINKED
from transfers.tasks import DST, LAYERS, SRC, STRIDE, Recorder, layer, sent, transfer

from llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.status import LLMParamInvalidError

SUCCESS, FAILED = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_FAILED
STRANGER = 12345


# ----------------------------------------------------------------------------------------------------- synchroniser

@pytest.mark.parametrize("at", range(LAYERS))
def test_synchroniser_says_no(mode_pair, scene, at):
    """Layers before are sent; who wants the refused one fails, and nothing follows it."""
    pair = mode_pair
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST)
    configs = [TransferConfig(pair.there.cluster_id, made.addrs),
               TransferConfig(pair.there.cluster_id, [addr + STRIDE for addr in layer(made.addrs, 0, 1)], range(1)),
               TransferConfig(pair.there.cluster_id, [addr + STRIDE for addr in layer(made.addrs, 2, 3)], range(2, 3))]
    outcome = pair.here.call(transfer, "src", configs, false_at=at)
    wants = [range(3), range(1), range(2, 3)]
    assert outcome.results == [INVALID if at in want else SUCCESS if want.stop <= at else None for want in wants]
    assert outcome.code is INVALID
    assert outcome.asked == [(i, None) for i in range(at + 1)]
    if at:
        sent(target, source, range(at))
        reference.copy_slot(target, 1, source, 0, STRIDE, src_layers=range(1), dst_layers=range(1))
    scene.check()


@pytest.mark.parametrize("at", range(LAYERS))
def test_synchroniser_raises(mode_pair, scene, at):
    pair = mode_pair
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST)
    configs = [TransferConfig(pair.there.cluster_id, layer(made.addrs, 0, 2), range(2)),
               TransferConfig(pair.there.cluster_id, layer(made.addrs, 2, 3), range(2, 3))]
    outcome = pair.here.call(transfer, "src", configs, raise_at=at)
    assert outcome.results == [SUCCESS if at == 2 else FAILED, FAILED if at == 2 else None]
    assert outcome.code is FAILED
    assert isinstance(outcome.error, ArithmeticError) and f"layer {at}" in str(outcome.error)
    if at:
        sent(target, source, range(at))
    scene.check()
    # The worker that caught it still works.
    assert pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, made.addrs)]).code is SUCCESS
    sent(target, source, range(LAYERS))
    scene.check()


def test_synchroniser_may_call_the_api(mode_pair, scene):
    """Also transfers on the very link, and another transfer like its own."""
    pair = mode_pair
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST)
    other, aside = scene.make(pair.there, "other", DST._replace(seed=2))
    scene.make(pair.here, "pulled", DST._replace(seed=3))
    key = CacheKeyByIdAndIndex(pair.there.cluster_id, other.cache_id, 1)

    class Busy(Recorder):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            pair.here.call(invoke, "pull_cache", key, Named("pulled"))
            inner = pair.here.call(invoke, "transfer_cache_async", Named("src"), Recorder(),
                                   [TransferConfig(pair.there.cluster_id, other.addrs)])
            return super().synchronize_layer(layer_index, timeout_in_millis) and inner.synchronize() is SUCCESS

    task = pair.here.call(invoke, "transfer_cache_async", Named("src"), Busy(),
                          [TransferConfig(pair.there.cluster_id, made.addrs)])
    assert task.synchronize() is SUCCESS
    sent(target, source, range(LAYERS))
    sent(aside, source, range(LAYERS))
    scene.forget("pulled")
    scene.check()


# ---------------------------------------------------------------------------------------------------- destinations

def test_configs_after_a_failure_are_not_reached(mode_pair, scene):
    """In list order, within a layer, and over layers; what was sent before stays sent."""
    pair = mode_pair
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST)
    configs = [TransferConfig(pair.there.cluster_id, layer(made.addrs, 0, 1), range(1)),
               TransferConfig(pair.there.cluster_id, layer(made.addrs, 1, 3), range(1, 3)),
               TransferConfig(STRANGER, layer(made.addrs, 0, 2), range(1, 3)),
               TransferConfig(pair.there.cluster_id, layer(made.addrs, 0, 1), range(2, 3)),
               TransferConfig(pair.there.cluster_id, [addr + STRIDE for addr in layer(made.addrs, 1, 2)], range(1, 2))]
    outcome = pair.here.call(transfer, "src", configs)
    assert outcome.results == [SUCCESS, None, NOT_LINKED, None, None]
    assert outcome.code is NOT_LINKED and str(STRANGER) in str(outcome.error)
    assert outcome.asked == [(0, None), (1, None)]
    sent(target, source, range(2))
    scene.check()


def test_to_this_cluster(mode_pair, scene):
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.here, "dst", DST)
    outcome = pair.here.call(transfer, "src", [TransferConfig(pair.here.cluster_id, made.addrs)])
    assert outcome.results == [INVALID] and str(pair.here.cluster_id) in str(outcome.error)
    scene.check()


@pytest.mark.parametrize("shift", [
    -1, STRIDE + 1, 2 * STRIDE, 1 << 30, -(1 << 30), 1 << 46,
], ids=lambda shift: f"{shift:+d}")
@pytest.mark.parametrize("tensor", [0, 1, 5])
def test_an_address_outside_the_peers_caches(mode_pair, scene, shift, tensor):
    """One wrong address of one layer is enough: not a byte of any layer is written."""
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    addrs = list(made.addrs)
    addrs[tensor] += shift
    outcome = pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, addrs)])
    assert outcome.results == [INVALID] and outcome.code is INVALID
    assert f"{addrs[tensor]:#x}" in str(outcome.error)
    scene.check()


@pytest.mark.parametrize("addr", [0, 1, 4096, 2**64 - 1, 2**64 - STRIDE, 2**63])
def test_an_address_of_nothing(mode_pair, scene, addr):
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    outcome = pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, [*made.addrs[:5], addr])])
    assert outcome.results == [INVALID]
    scene.check()


def test_an_address_of_memory_that_is_free_again(mode_pair, scene):
    """It lies in the peer's pool, and yet in no cache."""
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "old", DST)
    scene.forget("old")
    outcome = pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, made.addrs)])
    assert outcome.results == [INVALID] and f"{made.addrs[0]:#x}" in str(outcome.error)


def test_blocks_outside_the_peers_cache(mode_pair, scene):
    """The highest block of the list ends one block behind the cache; a lower one would fit."""
    pair = mode_pair
    scene.make(pair.here, "src", Spec(2, 4, (STRIDE,), is_blocks=True))
    scene.make(pair.here, "slot", Spec(2, 1, (4 * STRIDE,)))
    made, _ = scene.make(pair.there, "dst", Spec(2, 3, (STRIDE,), is_blocks=True, seed=1))
    config = [TransferConfig(pair.there.cluster_id, made.addrs)]
    for name, lists in (("src", ([0, 1], [0, 3])), ("src", ([0, 1], [2**40, 0])), ("src", ([0], [2**58])),
                        ("slot", (None, [0, 3], STRIDE)), ("slot", (None, [0], 4 * STRIDE))):
        outcome = pair.here.call(transfer, name, config, *lists)
        assert outcome.results == [INVALID], (name, lists)
        scene.check()


def test_blocks_outside_the_source(mode_pair, scene):
    pair = mode_pair
    scene.make(pair.here, "src", Spec(2, 4, (STRIDE,), is_blocks=True))
    made, _ = scene.make(pair.there, "dst", Spec(2, 9, (STRIDE,), is_blocks=True, seed=1))
    outcome = pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, made.addrs)], [0, 4], [0, 1])
    assert outcome.results == [INVALID] and "4" in str(outcome.error)
    scene.check()


def test_more_blocks_than_a_slot_fills(mode_pair, scene):
    pair = mode_pair
    scene.make(pair.here, "src", Spec(2, 2, (STRIDE,)))
    made, _ = scene.make(pair.there, "dst", Spec(2, 9, (STRIDE // 2,), is_blocks=True, seed=1))
    outcome = pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, made.addrs)], None, [0, 1, 2],
                             STRIDE // 2)
    assert outcome.results == [INVALID] and "3" in str(outcome.error)
    scene.check()


def test_source_slot_outside(mode_pair, scene):
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    outcome = pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, made.addrs, None, 2)])
    assert outcome.results == [INVALID] and "2" in str(outcome.error)
    scene.check()


def test_memory_that_is_not_accessible(mode_pair, scene):
    """On either side, in remote-accessible mode; the other mode does not ask."""
    pair = mode_pair
    private = {"is_registered": True, "remote_accessible": False}
    _, source = scene.make(pair.here, "src", SRC)
    made, target = scene.make(pair.there, "dst", DST._replace(**private))
    scene.make(pair.here, "private", SRC._replace(**private))
    plain, other = scene.make(pair.there, "plain", DST)
    outcomes = [pair.here.call(transfer, "src", [TransferConfig(pair.there.cluster_id, made.addrs)]),
                pair.here.call(transfer, "private", [TransferConfig(pair.there.cluster_id, plain.addrs)])]
    if pair.remote_accessible:
        assert [outcome.results for outcome in outcomes] == [[INVALID]] * 2
        assert all("accessible" in str(outcome.error) for outcome in outcomes)
    else:
        assert [outcome.results for outcome in outcomes] == [[SUCCESS]] * 2
        sent(target, source, range(LAYERS))
        sent(other, source, range(LAYERS))
    scene.check()


def test_keys_that_do_not_fit(mode_pair, scene):
    pair = mode_pair
    if not pair.remote_accessible:
        scene.make(pair.here, "src", SRC)
        with pytest.raises(TypeError):
            pair.here.call(transfer, "src", [TransferWithCacheKeyConfig(
                CacheKeyByIdAndIndex(pair.there.cluster_id, 1), range(1), range(1))])
        return
    key = BlocksCacheKey(pair.there.cluster_id, 8)
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    scene.make(pair.there, "blocks", Spec(2, 2, (STRIDE,), is_blocks=True, keys=(key,)))
    wide, _ = scene.make(pair.there, "wide", DST._replace(slot_shape=(STRIDE + 1,)))

    def by_id(cache_id, slot=0, layers=range(1), cluster=pair.there.cluster_id):
        return TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(cluster, cache_id, slot), range(len(layers)), layers)

    for code, config, name in [
            (NOT_EXIST, by_id(2**40), 2**40), (INVALID, by_id(made.cache_id, 2), 2),
            (INVALID, by_id(made.cache_id, 0, range(2, 4)), 8), (NOT_LINKED, by_id(1, cluster=STRANGER), STRANGER),
            (INVALID, by_id(wide.cache_id), STRIDE + 1), (INVALID, TransferWithCacheKeyConfig(key, range(1), range(1)),
                                                          "blocks"),
            (NOT_EXIST, TransferWithCacheKeyConfig(BlocksCacheKey(pair.there.cluster_id, 9), range(1), range(1)), 9)]:
        outcome = pair.here.call(transfer, "src", [config])
        assert outcome.results == [code], outcome
        assert str(name) in str(outcome.error), outcome.error
        scene.check()


# ------------------------------------------------------------------------------------- what is refused before a start

def test_arguments_are_checked_first(mode_pair, scene):
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    scene.make(pair.here, "blocks", Spec(2, 4, (STRIDE,), is_blocks=True))
    scene.make(pair.here, "host", SRC._replace(on_host=True))
    scene.make(pair.here, "odd", SRC._replace(num_tensors=3))
    made, _ = scene.make(pair.there, "dst", DST)
    recorder = Recorder()

    def config(*args):
        return [TransferConfig(pair.there.cluster_id, *args)]

    everything, pair_of_layers = config(made.addrs), config(made.addrs[:2])
    for error, names, name, arguments in [
            (LLMParamInvalidError, ["HOST"], "host", (recorder, everything)),
            (LLMParamInvalidError, [3], "odd", (recorder, config(made.addrs[:3]))),
            (LLMParamInvalidError, [5, 6], "src", (recorder, config(made.addrs[:5]))),
            (LLMParamInvalidError, [6, 2], "src", (recorder, config(made.addrs, range(1, 2)))),
            (LLMParamInvalidError, ["range(2, 4)", 3], "src", (recorder, config(made.addrs[:4], range(2, 4)))),
            (LLMParamInvalidError, [1, 2], "blocks", (recorder, pair_of_layers, [0], [0, 1])),
            (LLMParamInvalidError, [1, 0], "blocks", (recorder, pair_of_layers, [0])),
            (LLMParamInvalidError, ["dst_block_memory_size"], "src", (recorder, everything, None, [0])),
            (LLMParamInvalidError, ["dst_block_memory_size"], "src", (recorder, everything, None, [0], 0)),
            (LLMParamInvalidError, [7], "src", (recorder, everything, None, None, 7)),
            (LLMParamInvalidError, [1], "blocks", (recorder, config(made.addrs[:2], None, 1), [0], [0])),
            (ValueError, [-1], "blocks", (recorder, pair_of_layers, [0], [-1])),
            (ValueError, [-1], "blocks", (recorder, pair_of_layers, [-1], [0])),
            (TypeError, ["src_block_indices"], "blocks", (recorder, pair_of_layers, [0.0], [0])),
            (TypeError, ["layer_synchronizer"], "src", (None, everything)),
            (TypeError, ["layer_synchronizer"], "src", (lambda *_: True, everything)),
            (TypeError, ["transfer_configs"], "src", (recorder, None)),
            (TypeError, ["transfer_configs"], "src", (recorder, [None])),
            (TypeError, ["transfer_configs"], "src", (recorder, everything[0])),
    ]:
        with pytest.raises(error) as caught:
            pair.here.call(invoke, "transfer_cache_async", Named(name), *arguments)
        assert all(str(part) in str(caught.value) for part in names), (arguments, str(caught.value))
    assert recorder.asked == []
    scene.check()


@pytest.mark.parametrize("name, lists, part", [
    ("src", (None, [0], 2 * STRIDE + 1), 2 * STRIDE + 1),
    ("blocks", ([0], [0], STRIDE - 1), STRIDE - 1), ("blocks", ([0], [0], STRIDE + 1), STRIDE + 1),
    ("blocks", (None, [0], STRIDE), "src_block_indices"), ("src", ([0], [0]), "src_block_indices"),
])
def test_forms_that_do_not_exist_are_reported_by_the_task(mode_pair, scene, name, lists, part):
    pair = mode_pair
    scene.make(pair.here, "src", Spec(2, 2, (STRIDE,)))
    scene.make(pair.here, "blocks", Spec(2, 4, (STRIDE,), is_blocks=True))
    made, _ = scene.make(pair.there, "dst", Spec(2, 4, (STRIDE,), seed=1))
    outcome = pair.here.call(transfer, name, [TransferConfig(pair.there.cluster_id, made.addrs)], *lists)
    assert outcome.results == [INVALID] and str(part) in str(outcome.error)
    scene.check()


def test_all_layers_are_filled_in(mode_pair, scene):
    pair = mode_pair
    scene.make(pair.here, "src", SRC)
    made, _ = scene.make(pair.there, "dst", DST)
    config = TransferConfig(pair.there.cluster_id, made.addrs)
    assert pair.here.call(transfer, "src", [config]).code is SUCCESS
    assert config.src_layer_range == range(LAYERS)


def test_no_configs(mode_pair, scene):
    """Nothing to send is done at once."""
    scene.make(mode_pair.here, "src", SRC)
    outcome = mode_pair.here.call(transfer, "src", [])
    assert (outcome.code, outcome.results, outcome.asked) == (SUCCESS, [], [])

"""The parts of the connector that decide nothing: options, layouts, what travels, counts, and the class itself."""
from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from connectors.halves import BLOCK_BYTES, BLOCKS, HAS_VLLM, LAYERS, blocks, cache_config, request

from llm_datadist.connectors import vllm as package
from llm_datadist.connectors.vllm.layout import BlocksLayout, blocks_layouts, layer_places, layout_digest
from llm_datadist.connectors.vllm.metadata import Endpoint, RemoteBlocks, WorkerCard
from llm_datadist.connectors.vllm.scheduler import SchedulerHalf
from llm_datadist.connectors.vllm.settings import Settings
from llm_datadist.connectors.vllm.stats import TransferStats

# ---------------------------------------------------------------------------------------------------- options

def test_options_have_defaults_and_are_checked():
    assert Settings.read({}) == Settings()
    assert Settings.read({"lease_ms": 5, "kv_in_pool": True}).lease_ms == 5
    for wrong in ({"lease": 5}, {"lease_ms": 0}, {"lease_ms": "5"}, {"lease_ms": True}, {"mode": "both"},
                  {"listen_port": 65536}, {"kv_in_pool": 2}, {"provider": "nixl"}, {"listen_host": None}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings.read(wrong)


# ---------------------------------------------------------------------------------------------------- layouts

def test_layers_one_after_the_other():
    assert blocks_layouts(cache_config()) == [BlocksLayout(
        BLOCK_BYTES, BLOCKS, tuple(BLOCKS * BLOCK_BYTES * layer for layer in range(LAYERS)), frozenset({0}))]


def test_groups_that_share_their_places_are_one_cache():
    (layout,) = blocks_layouts(cache_config(num_groups=2))
    assert len(layout.offsets) == LAYERS
    assert layout.groups == {0, 1}


def test_blocks_that_hold_the_pages_of_all_layers():
    config = cache_config()
    (tensor,) = config.kv_cache_tensors
    tensor.layer_stride, tensor.block_stride = BLOCK_BYTES, LAYERS * BLOCK_BYTES
    assert blocks_layouts(config) == [BlocksLayout(LAYERS * BLOCK_BYTES, BLOCKS, (0,), frozenset({0}))]


def test_block_sizes_that_differ_are_caches_of_their_own():
    config = cache_config(num_groups=2)
    first, second = config.kv_cache_tensors
    second.offset, second.block_stride, second.layer_stride = first.size, 64, 64 * BLOCKS
    small, large = blocks_layouts(config)
    assert (small.block_bytes, small.groups) == (64, {1})
    assert (large.block_bytes, large.groups) == (BLOCK_BYTES, {0})


def test_each_layer_has_a_place():
    assert layer_places(cache_config(num_groups=2)) == {
        f"group{group}.layer{layer}": (0, layer) for group in range(2) for layer in range(LAYERS)}


def test_places_that_overlap_are_refused():
    config = cache_config(num_groups=2)
    config.kv_cache_tensors[1].offset = BLOCK_BYTES
    with pytest.raises(ValueError, match="overlap"):
        blocks_layouts(config)


def test_the_digest_tells_layouts_apart():
    facts = {"data type": "float32"}
    digest = layout_digest(cache_config(), facts)
    assert digest == layout_digest(cache_config(num_blocks=7), facts)       # each side has as many as it has room for
    others = [layout_digest(cache_config(2), facts), layout_digest(cache_config(block_bytes=64), facts),
              layout_digest(cache_config(), {"data type": "bfloat16"})]
    assert digest not in others


# ------------------------------------------------------------------------------------------------- what travels

def test_blocks_travel_as_params():
    remote = RemoteBlocks("cmpl-1", 5, (Endpoint(2**52 - 1, "127.0.0.1", 80),), "digest", ([1, 2], [0, 3]), 20)
    assert RemoteBlocks.from_params(remote.to_params()) == remote
    assert RemoteBlocks.from_params({**remote.to_params(), "remote_key": "no number"}) is None
    assert RemoteBlocks.from_params({"do_remote_prefill": True}) is None


def test_workers_must_agree():
    cards = {rank: WorkerCard(Endpoint(rank, "127.0.0.1", 1), f"digest{rank}") for rank in range(2)}
    with pytest.raises(ValueError, match="digest1"):
        SchedulerHalf().set_workers(cards)


def test_a_step_costs_what_changed():
    """A hundred running requests are none of the connector's business."""
    scheduler = SchedulerHalf()
    scheduler.set_workers({0: WorkerCard(Endpoint(1, "127.0.0.1", 1), "digest")})
    for index in range(100):
        scheduler.allocated(request(f"{index}", 16, {"do_remote_decode": True}), blocks([index]), 0)
    assert len(scheduler.take_metadata().holds) == 100
    for index in range(100):                        # chunks of the same prompts
        scheduler.allocated(request(f"{index}", 16, {"do_remote_decode": True}), blocks([index]), 0)
    assert scheduler.take_metadata().holds == {}


# ------------------------------------------------------------------------------------------------------- counts

def test_counts_add_up():
    first, second = TransferStats(), TransferStats()
    assert first.is_empty()
    first.record("pull", 0.5, 2**20)
    second.record("pull", 0.25, 2**20)
    second.record("push", 0.125, 2**19)
    second.count("blocks_lost")
    total = first.aggregate(TransferStats(second.data))
    assert total.reduce() == {
        "pull: number": 2, "pull: MiB": 2.0, "pull: median, ms": 500.0, "pull: longest, ms": 500.0,
        "push: number": 1, "push: MiB": 0.5, "push: median, ms": 125.0, "push: longest, ms": 125.0, "blocks lost": 1}
    total.reset()
    assert total.is_empty()


# ---------------------------------------------------------------------------------------------- the class itself

def test_the_class_is_made_when_it_is_asked_for():
    assert package.LLMDataDistConnector.__name__ == "LLMDataDistConnector"
    with pytest.raises(AttributeError):
        _ = package.OtherConnector


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_reason_is_said():
    program = "from llm_datadist.connectors.vllm import LLMDataDistConnector"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert f"it was tested with {package.TESTED_VERSIONS[-1]}" in child.stderr


def test_importing_the_package_loads_neither_vllm_nor_compiled_modules():
    program = ("import sys, llm_datadist.connectors.vllm; "
               "print([name for name in sys.modules if name.partition('.')[0] in ('vllm', 'torch', 'numpy')])")
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


@pytest.mark.parametrize("role", ["SCHEDULER", "WORKER"])
def test_each_instance_is_one_half(role):
    if HAS_VLLM:
        pytest.skip("the whole engine is tested with vLLM")
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}, is_kv_producer=True),
        model_config=SimpleNamespace(dtype="float32"), parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto", get_resolved_kv_cache_layout=lambda: "LBHNC"))
    connector = package.LLMDataDistConnector(config, KVConnectorRole[role], cache_config())
    assert hasattr(connector, "_scheduler") == (role == "SCHEDULER")
    assert hasattr(connector, "_worker") == (role == "WORKER")
    connector.shutdown()


def test_the_imitation_is_found_only_without_vllm():
    assert ("imitation" in (importlib.util.find_spec("vllm").origin or "")) != HAS_VLLM

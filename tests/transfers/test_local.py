"""Local operations, byte for byte against the reference: allocated, registered and cpu caches of any placement."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.peer import Peers, engine_options, engine_options_v1
from transfers.caches import GUARD, Named, Spec, addrs_of, contents, drop_all, invoke, make
from transfers.cases import examples, specs, strides

from llm_datadist import Cache, KvCache, LLMRole, LLMStatusCode, Placement
from llm_datadist.status import LLMNotFoundError, LLMParamInvalidError


class Bench:
    """The engine of this process, and what its caches must contain."""

    def __init__(self, process):
        self.process = process
        self.models = {}

    def make(self, name, spec):
        self.process.call(make, name, spec)
        self.models[name] = spec.model()
        return self.models[name]

    def call(self, method, *args, **kwargs):
        self.process.call(invoke, method, *args, **kwargs)

    def check(self):
        for name, model in self.models.items():
            assert self.process.call(contents, name) == model.contents(), f"content of {name!r}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.models.clear()
        self.process.call(drop_all)


@pytest.fixture(scope="module", params=["v2", "v1"])
def engine(request):
    """An engine of either generation."""
    with Peers() as peers:
        make_options = engine_options if request.param == "v2" else engine_options_v1
        options = make_options(llm_Strict="0", **({"host_pool": 32 << 20} if request.param == "v2" else {}))
        yield peers.here(1, options, role=LLMRole.PROMPT)


def is_v1(engine):
    return engine.node.dist._require_engine().options.generation == 1


def local_specs(engine, stride, **fields):
    """Specs that the engine can hold: the first generation knows no registration and no host pool."""
    plain = specs(stride, may_be_host=not is_v1(engine), **fields)
    return plain.map(lambda spec: spec._replace(is_registered=False)) if is_v1(engine) else plain


@examples
@given(data=st.data())
def test_copy_cache(engine, data):
    num_tensors = data.draw(st.integers(1, 4), "num_tensors")
    src_stride, dst_stride = data.draw(strides, "src_stride"), data.draw(strides, "dst_stride")
    src = data.draw(local_specs(engine, src_stride, num_tensors=num_tensors), "src")
    dst = data.draw(local_specs(engine, dst_stride, num_tensors=num_tensors), "dst")
    src_slot = data.draw(st.integers(0, src.num_slots - 1), "src_slot")
    dst_slot = data.draw(st.integers(0, dst.num_slots - 1), "dst_slot")
    room = min(src_stride, dst_stride)
    offset = data.draw(st.one_of(st.just(0), st.integers(0, room - 1)), "offset")
    sizes = st.integers(1, room - offset)
    size = data.draw(st.one_of(st.just(-1), sizes) if src_stride <= dst_stride else sizes, "size")
    with Bench(engine) as bench:
        source, target = bench.make("src", src), bench.make("dst", dst)
        bench.call("copy_cache", Named("dst"), Named("src"), dst_slot, src_slot, offset, size)
        reference.copy_slot(target, dst_slot, source, src_slot, src_stride - offset if size == -1 else size,
                            src_offset=offset, dst_offset=offset)
        bench.check()


@examples
@given(data=st.data())
def test_copy_cache_to_another_slot_of_the_same(engine, data):
    stride = data.draw(strides, "stride")
    spec = data.draw(local_specs(engine, stride, num_tensors=2, num_slots=3), "cache")
    src_slot, dst_slot = data.draw(st.permutations(range(3)), "slots")[:2]
    with Bench(engine) as bench:
        model = bench.make("cache", spec)
        bench.call("copy_cache", Named("cache"), Named("cache"), dst_slot, src_slot)
        reference.copy_slot(model, dst_slot, model, src_slot, stride)
        bench.check()


def copies(num_blocks):
    """Block copies in which a later one sees what an earlier one wrote: at random, or chains up or down."""
    blocks = st.integers(0, num_blocks - 1)
    at_random = st.dictionaries(blocks, st.lists(blocks, max_size=4), max_size=5)
    up = st.integers(0, num_blocks).map(lambda first: {i: [i + 1] for i in range(first, num_blocks - 1)})
    down = st.integers(0, num_blocks).map(lambda first: {i: [i - 1] for i in range(num_blocks - 1, first, -1)})
    return st.one_of(at_random, up, down)


@examples
@given(data=st.data())
def test_copy_blocks(engine, data):
    stride = data.draw(strides, "block_bytes")
    spec = data.draw(local_specs(engine, stride, num_tensors=data.draw(st.integers(1, 3)), is_blocks=True,
                                 num_slots=data.draw(st.integers(1, 9))), "cache")
    info = data.draw(copies(spec.num_slots), "info")
    with Bench(engine) as bench:
        model = bench.make("cache", spec)
        bench.call("copy_blocks", Named("cache"), info)
        reference.copy_blocks_within(model, info)
        bench.check()


@examples
@given(data=st.data())
def test_swap_blocks(engine, data):
    """Despite the name a copy, between a HOST and a DEVICE cache, whichever is the source."""
    stride = data.draw(strides, "block_bytes")
    num_tensors = data.draw(st.integers(1, 3), "num_tensors")
    device = data.draw(specs(stride, num_tensors=num_tensors, is_blocks=True, may_be_host=False), "device")
    host = data.draw(specs(stride, num_tensors=num_tensors, is_blocks=True), "host")._replace(on_host=True)
    if is_v1(engine):
        device = device._replace(is_registered=False)
    cpu = is_v1(engine) or data.draw(st.booleans(), "cpu cache")
    out = data.draw(st.booleans(), "from device")
    sources, targets = (device, host) if out else (host, device)
    mapping = data.draw(st.dictionaries(st.integers(0, sources.num_slots - 1), st.integers(0, targets.num_slots - 1),
                                        max_size=5), "src_to_dst")
    with Bench(engine) as bench:
        device_model = bench.make("device", device)
        if cpu:
            buffers, kept = cpu_cache(host, is_v1(engine))
            host_cache, host_model = kept, host.model()
        else:
            host_cache, host_model = Named("host"), bench.make("host", host)
        if out:
            bench.call("swap_blocks", Named("device"), host_cache, mapping)
            reference.copy_blocks(host_model, list(mapping.values()), device_model, list(mapping))
        else:
            bench.call("swap_blocks", host_cache, Named("device"), mapping)
            reference.copy_blocks(device_model, list(mapping.values()), host_model, list(mapping))
        bench.check()
        if cpu:
            for buffer, expected in zip(buffers, host_model.contents()):
                assert buffer[3:-3].tobytes() == expected
                assert set(buffer[:3]) | set(buffer[-3:]) == {GUARD}


def cpu_cache(spec, v1):
    """Private memory at odd addresses as a cpu cache."""
    buffers = []
    for content in spec.fill():
        buffer = np.full(len(content) + 6, GUARD, np.uint8)
        buffer[3:-3] = np.frombuffer(content, np.uint8)
        buffers.append(buffer)
    addrs = [buffer.ctypes.data + 3 for buffer in buffers]
    return buffers, (KvCache if v1 else Cache).create_cpu_cache(spec.desc, addrs)


# ------------------------------------------------------------------------------------------------------ refusals

SPEC = Spec(2, 3, (16,))
BLOCKS = Spec(2, 4, (16,), is_blocks=True)


def refused(bench, value, method, *args, **kwargs):
    """The call is refused, its text names the value, and no byte moved."""
    with pytest.raises(LLMParamInvalidError) as caught:
        bench.call(method, *args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert str(value) in str(caught.value)
    bench.check()


@pytest.mark.parametrize("value, arguments", [
    (3, {"dst_batch_index": 3}), (7, {"src_batch_index": 7}), (16, {"offset": 16}), (99, {"offset": 99}),
    (17, {"size": 17}), (13, {"offset": 4, "size": 13}), (2**63 - 1, {"size": 2**63 - 1}), (0, {"size": 0}),
    (-2, {"size": -2}), (2**63, {"offset": 2**63}),
])
def test_copy_cache_refuses(engine, value, arguments):
    with Bench(engine) as bench:
        bench.make("src", SPEC)
        bench.make("dst", SPEC._replace(seed=1))
        refused(bench, value, "copy_cache", Named("dst"), Named("src"), **arguments)


def test_copy_cache_refuses_other_caches(engine):
    with Bench(engine) as bench:
        bench.make("src", SPEC)
        bench.make("narrow", SPEC._replace(slot_shape=(15,), seed=1))
        bench.make("more", SPEC._replace(num_tensors=3, seed=2))
        bench.make("blocks", BLOCKS)
        refused(bench, 15, "copy_cache", Named("narrow"), Named("src"))
        refused(bench, 3, "copy_cache", Named("more"), Named("src"))
        if not is_v1(engine):
            refused(bench, "contiguous", "copy_cache", Named("blocks"), Named("src"))
            refused(bench, "contiguous", "copy_cache", Named("src"), Named("blocks"))


def test_copy_cache_of_a_freed_one(engine):
    with Bench(engine) as bench:
        bench.make("src", SPEC)
        bench.make("dst", SPEC._replace(seed=1))
        engine.call(free, "src")
        with pytest.raises(LLMNotFoundError) as caught:
            bench.call("copy_cache", Named("dst"), Named("src"))
        assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
        bench.models.pop("src")
        bench.check()


def free(node, name):
    node.cache_manager.deallocate_cache(node.kept[name].cache)
    node.kept[name].guards.clear()


@pytest.mark.parametrize("value, info", [
    (4, {4: [0]}), (4, {0: [1, 4]}), (2**62, {0: [1], 1: [2**62]}),
])
def test_copy_blocks_refuses(engine, value, info):
    """Checked before the first block moves, also where an earlier pair is right."""
    with Bench(engine) as bench:
        bench.make("cache", BLOCKS)
        refused(bench, value, "copy_blocks", Named("cache"), info)


def test_copy_blocks_refuses_negative(engine):
    with Bench(engine) as bench:
        bench.make("cache", BLOCKS)
        for info in ({-1: [0]}, {0: [1, -1]}):
            with pytest.raises((LLMParamInvalidError, ValueError)) as caught:
                bench.call("copy_blocks", Named("cache"), info)
            assert "-1" in str(caught.value)
            bench.check()


def test_swap_blocks_refuses(engine):
    with Bench(engine) as bench:
        bench.make("device", BLOCKS)
        host = BLOCKS._replace(on_host=True, num_slots=6, seed=1)
        buffers, cache = cpu_cache(host, is_v1(engine))
        _, narrow = cpu_cache(host._replace(slot_shape=(15,)), is_v1(engine))
        _, more = cpu_cache(host._replace(num_tensors=3), is_v1(engine))
        refused(bench, 4, "swap_blocks", cache, Named("device"), {0: 0, 5: 4})
        refused(bench, 6, "swap_blocks", cache, Named("device"), {0: 0, 6: 1})
        refused(bench, -1, "swap_blocks", cache, Named("device"), {0: -1})
        refused(bench, 6, "swap_blocks", Named("device"), cache, {0: 6})
        refused(bench, 15, "swap_blocks", narrow, Named("device"), {0: 0})
        refused(bench, 3, "swap_blocks", more, Named("device"), {0: 0})
        refused(bench, str(Placement.HOST), "swap_blocks", cache, cache, {0: 0})
        bench.make("other", BLOCKS._replace(seed=2))
        refused(bench, str(Placement.DEVICE), "swap_blocks", Named("device"), Named("other"), {0: 0})
        assert [buffer[3:-3].tobytes() for buffer in buffers] == host.fill()


def test_swap_blocks_of_a_freed_cache(engine):
    with Bench(engine) as bench:
        bench.make("device", BLOCKS)
        buffers, cache = cpu_cache(BLOCKS._replace(on_host=True, seed=1), is_v1(engine))
        engine.call(drop_cache_only, "device")
        assert engine.call(addresses, "device") == []
        with pytest.raises(LLMNotFoundError):
            bench.call("swap_blocks", Named("device"), cache, {0: 0})
        assert [buffer[3:-3].tobytes() for buffer in buffers] == BLOCKS._replace(seed=1).fill()


def drop_cache_only(node, name):
    held = node.kept[name]
    held.guards.clear()
    getattr(node.cache_manager, "deallocate_blocks_cache", node.cache_manager.deallocate_cache)(held.cache)


def addresses(node, name):
    return addrs_of(node.kept[name].cache)

"""What may still be used once an engine is finalised, and what an engine that cannot start says."""
import errno

import pytest
from support.denied import need_denial
from support.scripts import output_of


def test_a_view_keeps_the_memory_it_shows():
    """The array reads and writes as before; the memory goes with it, and a new engine is not disturbed."""
    assert output_of("""
        import gc, warnings
        def mappings():
            with open("/proc/self/maps") as maps:
                return sum("memfd:llm_datadist (deleted)" in line for line in maps)     # those of pools

        dist = start(1, host_pool=1 << 20)
        of = lambda placement: CacheDesc(2, [4, 1024], DataType.DT_FLOAT, placement)
        caches = [dist.cache_manager.allocate_cache(of(place)) for place in (Placement.DEVICE, Placement.HOST)]
        arrays = [cache.tensors()[1] for cache in caches]
        for number, array in enumerate(arrays):
            array[:] = number + 1
        warnings.simplefilter("ignore", ResourceWarning)        # its caches are held, on purpose
        dist.finalize()
        print([float(array.sum()) for array in arrays], mappings())
        for cache in caches:
            try:
                cache.tensors()
            except LLMException as error:
                print(error.status_code.name, "finalized" in str(error))
        again = start(2)
        again.finalize()
        arrays[0] += 1
        print(float(arrays[0].sum()))
        del array, arrays, cache
        gc.collect()
        print(mappings())
    """) == ("[4096.0, 8192.0] 2\nLLM_KV_CACHE_NOT_EXIST True\nLLM_KV_CACHE_NOT_EXIST True\n8192.0\n0\n")


@pytest.mark.parametrize("order", ["push first", "engine first"])
def test_a_push_that_is_collected_with_its_engine(order):
    """Both are garbage of one cycle, as with a traceback that names both: whoever goes last finds the provider."""
    assert output_of("""
        import gc, warnings
        from llm_datadist.core.engine.layer_push import LayerPush

        owner = start(1)
        dist = start_other = LLMDataDist.__new__(LLMDataDist)
        dist.__init__(LLMRole.MIX, 2)
        LLMDataDist.llm_engine_instance = None
        dist.init(engine_options())
        assert dist.link_clusters([cluster(1, owner.listen_address)], 5000)[0] == LLMStatusCode.LLM_SUCCESS
        cache = dist.cache_manager.allocate_cache(CacheDesc(1, [1, 64], DataType.DT_UINT8))
        engine = dist._require_engine()
        push = LayerPush(engine, 1, cache.cache_id)
        push.aim_at_key
        warnings.simplefilter("ignore", ResourceWarning)        # its cache is held, on purpose
        dist.finalize()
        class Holder: pass
        holder = Holder()
        holder.items = [push, engine, holder] if sys.argv[1] == "push first" else [engine, push, holder]
        del push, engine, holder, dist, start_other, cache
        gc.collect()
        owner.finalize()
        print("done")
    """, order, env={"MALLOC_PERTURB_": "165"}) == "done\n"


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_an_engine_whose_thread_cannot_be_woken_does_not_start(code):
    """The kernel refuses the first epoll_ctl: `init` says so, and does not wait for ever."""
    need_denial()
    assert output_of("""
        from support.denied import deny
        deny("epoll_ctl", code=int(sys.argv[1]))
        try:
            start(1, listen=False)
        except LLMException as error:
            print(error.status_code.name, "service thread" in str(error), os.strerror(int(sys.argv[1])) in str(error))
    """, code) == "LLM_FAILED True True\n"

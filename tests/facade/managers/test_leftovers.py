"""What ``finalize`` says of keys and caches that nobody gave back; ends of an engine by other means than that call."""
import gc
import weakref

import pytest
from support.engines import CLUSTER, desc
from support.peer import engine_options, engine_options_v1
from support.scripts import output_of, run

import llm_datadist
from llm_datadist import BlocksCacheKey, CacheKey, LLMDataDist, LLMException, LLMRole
from llm_datadist.managers.leftovers import held


def opened(options=engine_options, role=LLMRole.PROMPT):
    dist = LLMDataDist(role, CLUSTER)
    dist.init(options(device_pool=1 << 20, listen=options is engine_options_v1))
    return dist


def test_finalize_says_what_was_left():
    dist = opened()
    manager = dist.cache_manager
    first = manager.allocate_cache(desc(), [CacheKey(CLUSTER, 41), CacheKey(CLUSTER, 2**64 - 1, 5, 42)])
    manager.deallocate_cache(first)
    manager.allocate_blocks_cache(desc(), BlocksCacheKey(CLUSTER, 3))
    manager.register_cache(desc(), [4096] * 4)                      # the caller's own: nothing to give back
    rows = dist.held()
    assert [row["cache_id"] for row in rows] == [row["cache_id"] for row in held(dist._engine)]
    assert 0 <= rows[1]["age_s"] <= rows[0]["age_s"] < 100
    assert [(row["handle"], row["names"]) for row in rows] == [
        (False, ["req_id=41", "prefix_id=42, model_id=5"]), (True, ["BlocksCacheKey, model_id=3"])]
    with pytest.warns(ResourceWarning) as caught:
        dist.finalize()
    (text,) = [str(warning.message) for warning in caught]
    assert "3 keys" in text and "1 caches" in text and "384 bytes" in text
    assert f"cache {first.cache_id} (192 bytes; req_id=41; prefix_id=42, model_id=5)" in text
    assert caught[0].filename == __file__


def test_finalize_of_the_first_generation_says_it_too():
    dist = opened(engine_options_v1)
    cache = dist.kv_cache_manager.allocate_cache(desc(), [CacheKey(CLUSTER, 41)])
    dist.kv_cache_manager.deallocate_cache(cache)
    with pytest.warns(ResourceWarning, match=r"1 keys .*req_id=41"):
        dist.finalize()


def test_nothing_left_is_nothing_said(recwarn):
    with opened() as dist:
        cache = dist.cache_manager.allocate_cache(desc(), [CacheKey(CLUSTER, 41)])
        dist.cache_manager.deallocate_cache(cache)
        dist.cache_manager.remove_cache_key(CacheKey(CLUSTER, 41))
    dist.finalize()
    assert LLMDataDist.llm_engine_instance is None and not recwarn.list


def test_a_with_statement_finalizes_and_says_what_was_left():
    with pytest.warns(ResourceWarning, match="1 caches that were not deallocated") as caught:
        with opened() as dist:
            assert dist.cache_manager.allocate_cache(desc()).cache_id > 0
    assert LLMDataDist.llm_engine_instance is None and caught[0].filename == __file__


def test_an_exception_on_its_way_is_not_replaced():
    with pytest.raises(ArithmeticError):
        with opened() as dist:
            dist.cache_manager.allocate_cache(desc())
            raise ArithmeticError
    assert LLMDataDist.llm_engine_instance is None


def test_a_second_engine_says_what_to_do():
    with opened():
        with pytest.raises(LLMException, match=r"llm_engine_instance\.finalize\(\)") as caught:
            opened()
    assert caught.value.operation == "init"


def test_a_port_in_use_says_what_to_do():
    with opened() as dist:
        dist.switch_role(LLMRole.MIX, {"llm.listenIpInfo": "127.0.0.1:0"})
        ip, port = dist.listen_address
        text = run("""
            config = engine_options(listen=False)
            config["llm.listenIpInfo"] = sys.argv[1]
            try:
                LLMDataDist(LLMRole.MIX, 2).init(config)
            except LLMException as error:
                print(error)
        """, f"{ip}:{port}").stdout
    assert "port 0 lets the system choose" in text


def test_an_engine_that_is_collected_is_finalised():
    dist = opened()
    gone = weakref.ref(dist)
    LLMDataDist.llm_engine_instance = None                          # the class keeps it otherwise
    with pytest.warns(ResourceWarning, match="collected without finalize"):
        del dist
        gc.collect()
    assert gone() is None
    opened().finalize()


def test_the_end_of_a_process_says_nothing():
    assert output_of("""
        engine = start(1)
        engine.cache_manager.allocate_cache(CacheDesc(1, [1, 16], DataType.DT_INT8), [CacheKey(1, 2)])
        print("done")
    """) == "done\n"


def test_the_version_and_every_exception_are_at_the_root():
    assert llm_datadist.__version__[0].isdigit()
    for name in ("LLMTimeoutError", "LLMParamInvalidError", "LLMNotFoundError", "LLMMemoryError", "LLMLinkError",
                 "LLMNotEnabledError", "LLMDeviceError", "LLMChecksumError"):
        assert issubclass(getattr(llm_datadist, name), LLMException)

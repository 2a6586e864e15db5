"""What the engine itself promises below the managers: bounded calls, closing, forks."""
import os
import threading

import pytest
from support.peer import engine_options, engine_options_v1
from support.scripts import output_of

from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from llm_datadist_probes.table import hold_table


@pytest.fixture(params=[2, 1], ids=["v2", "v1"])
def dist(request):
    options = {2: engine_options, 1: engine_options_v1}[request.param](timeout_ms=50)
    dist = LLMDataDist(LLMRole.PROMPT, 1)
    dist.init(options)
    yield dist
    dist.finalize()


def manager_of(dist):
    return dist.cache_manager if dist._engine.options.generation == 2 else dist.kv_cache_manager


def timeout_code(dist):
    return LLMStatusCode.LLM_TIMEOUT if dist._engine.options.generation == 2 else LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT


@pytest.mark.parametrize("call", ["deallocate", "remove_key", "allocate"])
def test_a_call_that_cannot_get_the_table_ends_with_the_timeout_status(dist, call):
    desc = CacheDesc(2, [1, 64], DataType.DT_FLOAT)
    manager = manager_of(dist)
    cache = manager.allocate_cache(desc)
    before = dist.stats()
    calls = {
        "deallocate": lambda: manager.deallocate_cache(cache),
        "remove_key": lambda: dist._engine.remove_key(0, 7, 0),
        "allocate": lambda: manager.allocate_cache(desc),
    }
    with hold_table(dist._engine):
        with pytest.raises(LLMException) as caught:
            calls[call]()
    assert caught.value.status_code == timeout_code(dist)
    assert isinstance(caught.value, TimeoutError)
    assert dist.stats() == before                   # nothing changed, and the handle is still good
    manager.deallocate_cache(cache)
    assert dist.stats()["caches"] == 0


@pytest.mark.parametrize("call", ["stats", "caches", "deallocate", "remove_key"])
def test_who_waits_for_the_table_holds_up_no_other_thread(call):
    """In a program of its own: otherwise this thread never gets to give the table back."""
    assert output_of("""
        from llm_datadist_probes.table import hold_table
        engine = start(1, timeout_ms=60000)
        calls = {"stats": (), "caches": (), "deallocate": (1,), "remove_key": (0, 7, 0)}
        arguments = calls[sys.argv[1]]
        with hold_table(engine._engine):
            waiting = threading.Thread(target=getattr(engine._engine, sys.argv[1]), args=arguments)
            waiting.start()
            waiting.join(0.2)
            print("waits" if waiting.is_alive() else "is back")
        waiting.join()
        engine.finalize()
    """, call).strip() == "waits"


def test_deallocating_is_a_no_op_the_second_time(dist):
    manager = manager_of(dist)
    cache = manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_FLOAT))
    manager.deallocate_cache(cache)
    before = dist.stats()
    manager.deallocate_cache(cache)
    assert dist.stats() == before


def test_a_waiting_call_goes_on_when_the_table_is_free_again(dist):
    manager = manager_of(dist)
    cache = manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_FLOAT))
    outcome = []
    held, release = threading.Event(), threading.Event()

    def hold():
        with hold_table(dist._engine):
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    waiter = threading.Thread(target=lambda: outcome.append(_attempt(lambda: manager.deallocate_cache(cache))))
    waiter.start()
    release.set()
    holder.join()
    waiter.join()
    assert outcome in ([None], [timeout_code(dist)])    # either way it came back
    manager.deallocate_cache(cache)
    assert dist.stats()["caches"] == 0


def _attempt(call):
    try:
        call()
    except LLMException as error:
        return error.status_code
    return None


def test_a_forked_child_is_told_so_and_frees_nothing(dist):
    manager = manager_of(dist)
    cache = manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_FLOAT))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "no error"
        try:
            manager.deallocate_cache(cache)
        except LLMException as error:
            text = str(error)
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    text = os.read(read, 4096).decode()
    os.close(read)
    assert os.waitpid(child, 0)[1] == 0
    assert "forked child" in text
    assert dist.stats()["caches"] == 1
    manager.deallocate_cache(cache)

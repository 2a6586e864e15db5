"""Ends of whole processes: with and without `finalize`, from any thread, and those of forked children."""
from __future__ import annotations

import os
import warnings

import pytest
from support.link_steps import TCP_ONLY, fetch, link, offer, until, wait_links, withdraw
from support.scripts import output_of

from llm_datadist import LLMStatusCode

S = LLMStatusCode


@pytest.fixture(scope="module")
def owner(module_peers):
    """A process that the programs link to, and that offers something."""
    child = module_peers.start(1)
    child.call(offer)
    yield child
    child.call(withdraw)


@pytest.fixture(autouse=True)
def owner_is_left_alone(owner):
    """Nothing of a program stays in the owner, and it goes on as before."""
    yield
    assert owner.call(wait_links, []) == []
    assert until(lambda: owner.stats()["pins"] == 0)


# ----------------------------------------------------------------------------------------------- without finalize

ENDINGS = {
    "by itself": "",
    "sys.exit": "sys.exit(0)",
    "in a thread": "t = threading.Thread(target=sys.exit); t.start(); t.join()",
    "with the engine deleted": "del engine, cache",
    "with a cycle around the engine": "loop = [engine]; loop.append(loop); del engine",
    "after another exit handler": "import atexit, support.peer as p; atexit.register(engine.finalize); "
                                  "atexit.register(p.finalize, engine)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_exit_without_finalize(owner, ending):
    assert output_of(f"""
        engine = start(2)
        print(engine.link_clusters([cluster(1, ("127.0.0.1", int(sys.argv[1])))])[0].name)
        desc = CacheDesc(2, [4, 256], DataType.DT_FLOAT)
        cache = engine.cache_manager.allocate_blocks_cache(desc)
        engine.cache_manager.pull_blocks(BlocksCacheKey(1), cache, [0, 1], [2, 3])
        {ENDINGS[ending]}
    """, owner.address[1]) == "LLM_SUCCESS\n"


def test_an_exit_while_a_link_by_rank_table_is_waited_for(owner):
    output_of("""
        import json
        from support.link_steps import rank_table, server
        table = json.dumps(rank_table([server("0", (0, 0), (1, 1)), server("198.51.100.1", (0, 2))]))
        engine = start(2, listen=False)
        for i in range(20):
            engine.link(f"exit {i}", {2: 0, 3: 1, 4: 2}, table)
            engine.link(f"exit from below {i}", {3: 1, 2: 2}, table)
        time.sleep(0.1)
    """)


@pytest.mark.parametrize("env", [{}, TCP_ONLY], ids=["any path", "tcp"])
def test_an_exit_while_other_threads_pull(owner, env):
    output_of("""
        engine = start(2)
        engine.link_clusters([cluster(1, ("127.0.0.1", int(sys.argv[1])))])
        manager, started = engine.cache_manager, threading.Barrier(5)
        def pull():
            cache = manager.allocate_blocks_cache(CacheDesc(2, [4, 256], DataType.DT_FLOAT))
            started.wait()
            try:
                while True:
                    manager.pull_blocks(BlocksCacheKey(1), cache, [0, 1], [2, 3])
            except LLMException:
                pass
        for _ in range(4):
            threading.Thread(target=pull, daemon=True).start()
        started.wait()
    """, owner.address[1], env=env)


def test_finalize_and_init_again(owner):
    assert output_of("""
        engine = start(2)
        engine.finalize()
        engine.finalize()
        engine.init(engine_options())
        print(engine.link_clusters([cluster(1, ("127.0.0.1", int(sys.argv[1])))])[0].name)
        engine.finalize()
        other = start(3)
        print(other.link_clusters([cluster(1, ("127.0.0.1", int(sys.argv[1])))])[0].name)
    """, owner.address[1]) == "LLM_SUCCESS\nLLM_SUCCESS\n"


# ------------------------------------------------------------------------------------------------------------ fork

FORK = """
    import json, warnings
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)         # since Python 3.12, of any thread
    from support.link_steps import rank_table, server
    engine = start(2)
    desc = CacheDesc(2, [4, 256], DataType.DT_FLOAT)
    engine.link_clusters([cluster(1, ("127.0.0.1", int(sys.argv[1])))])
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(desc, BlocksCacheKey(2, 7))

    table = json.dumps(rank_table([server("0", (0, 0), (1, 1))]))

    def in_child():
        calls = {
            "allocate": lambda: manager.allocate_blocks_cache(desc),
            "deallocate": lambda: manager.deallocate_blocks_cache(cache),
            "remove": lambda: manager.remove_cache_key(CacheKey(2, 1)),
            "pull": lambda: manager.pull_blocks(BlocksCacheKey(1), cache, [0], [0]),
            "link": lambda: engine.link_clusters([cluster(1, ("127.0.0.1", int(sys.argv[1])))]),
            "unlink": lambda: engine.unlink_clusters([cluster(1)]),
            "stats": engine.stats,
            "query": lambda: engine.query_register_mem_status(1),
            "meet": lambda: engine.link("forked", {2: 0, 3: 1}, table),
            "manager": lambda: engine.cache_manager,
            "address": lambda: engine.listen_address,
            "role": lambda: engine.switch_role(LLMRole.DECODER),
            "init": lambda: LLMDataDist(LLMRole.MIX, 9).init(engine_options()),
        }
        for name, call in calls.items():
            try:
                print(name, call())
            except LLMException as error:
                assert "fork" in str(error), error
                assert error.status_code is LLMStatusCode.LLM_FAILED

    def in_parent():
        manager.pull_blocks(BlocksCacheKey(1), cache, [0, 1], [2, 3])
        print(engine.unlink_clusters([cluster(1)])[0].name)
        print(ctypes.string_at(cache.tensor_addrs[0] + 2 * 1024, 1)[0], engine.stats()["caches"])
"""
IN_PARENT = "LLM_SUCCESS\n2 1\n"
CHILDREN = {
    "that leaves at once": "os._exit(0)",
    "that calls everything": "in_child(); sys.stdout.flush(); os._exit(0)",
    "that exits as usual": "in_child(); sys.exit(0)",
    "that finalizes": "engine.finalize(); sys.exit(0)",
    "that collects": "del engine, manager, cache, in_child, in_parent; import gc; gc.collect(); sys.exit(0)",
}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_forked_child(owner, child):
    assert output_of(FORK + f"""
    pid = os.fork()
    if pid == 0:
        {CHILDREN[child]}
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    in_parent()
    """, owner.address[1]) == "0\n" + IN_PARENT


def test_a_process_of_multiprocessing(owner):
    assert output_of(FORK + """
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=in_child)
    process.start()
    process.join()
    print(process.exitcode)
    in_parent()
    """, owner.address[1]) == "0\n" + IN_PARENT


def test_a_forked_child_while_threads_work(owner):
    """The child is forked in the middle of pulls and of waiting for members; it must not get stuck in any lock."""
    assert output_of(FORK + """
    engine.link("never", {2: 0, 3: 1}, table)
    go_on = True
    def pull():
        mine = manager.allocate_blocks_cache(desc)
        while go_on:
            manager.pull_blocks(BlocksCacheKey(1), mine, [0, 1], [2, 3])
        manager.deallocate_blocks_cache(mine)
    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    codes = set()
    for i in range(20):
        pid = os.fork()
        if pid == 0:
            in_child()
            engine.finalize()
            os._exit(0)
        codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    go_on = False
    for thread in threads:
        thread.join()
    print(*codes)
    in_parent()
    """, owner.address[1]) == "0\n" + IN_PARENT


def test_the_owner_forks(peers):
    """A child of the owner comes and goes; whoever is linked to the owner notices nothing."""
    server, reader = peers.start(5), peers.start(6)
    server.call(offer)
    assert reader.call(link, (5, server.address))[0] is S.LLM_SUCCESS
    for _ in range(5):
        assert server.call(fork_and_wait) == 0
        assert reader.call(fetch, 5)
    server.call(withdraw)


def fork_and_wait(node):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            node.dist.finalize()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

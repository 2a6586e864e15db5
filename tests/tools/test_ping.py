"""``ping`` against an engine in another process, of either mode, and against nobody."""
import json

import pytest
from support.peer import Peers, engine_options, engine_options_v1

from llm_datadist import LLMException, LLMLinkError, LLMRole
from llm_datadist.tools import cli


@pytest.mark.parametrize("mode, options", [
    ("two-sided", engine_options()), ("remote-accessible", engine_options(remote_accessible=True)),
    ("two-sided", engine_options_v1())], ids=["two-sided", "remote-accessible", "first-generation"])
def test_a_cluster_that_answers(peers, capsys, mode, options):
    there = peers.start(7, options, role=LLMRole.PROMPT)
    address = "{}:{}".format(*there.address)
    assert cli.main(["ping", "7", address, "--count", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cluster_id"], found["address"], found["mode"], found["count"]) == (7, address, mode, 5)
    assert 0 < found["min_us"] <= found["median_us"] <= found["p99_us"] <= found["max_us"]
    assert cli.main(["ping", "7", address.replace("127.0.0.1", "localhost")]) == 0
    assert f"cluster 7 at localhost:{there.address[1]}: linked in" in capsys.readouterr().out
    assert there.stats()["links"] == 0


def test_another_cluster(peers, capsys):
    there = peers.start(7)
    assert cli.main(["ping", "8", "{}:{}".format(*there.address)]) == 1
    assert "cluster 8 at" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, said", [
    (["7"], "address"), (["x", "127.0.0.1:1"], "'x' is no integer"), (["7", "127.0.0.1"], "host:port"),
    (["7", "127.0.0.1:x"], "digits for the port"), (["7", "127.0.0.1:70000"], "uint16"),
    (["7", "127.0.0.1:1", "--count", "0"], "argument --count: '0' is no integer of at least 1")])
def test_wrong_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ping", *arguments])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_call_of_an_engine(assert_raises):
    with Peers() as peers:
        there, here = peers.start(7), peers.here(1)
        peers.link(here, there)
        dist = here.node.dist
        assert 0 < dist.ping(7) < 60
        for arguments, kind in [(("7",), "TE"), ((-1,), "VE"), ((7, 0), "PI"), ((7, "1"), "TE"),
                                ((8,), "NOT_YET_LINK")]:
            assert_raises(kind, dist.ping, *arguments)
        with pytest.raises(LLMException) as caught:
            dist.ping(8)
        assert isinstance(caught.value, LLMLinkError) and (caught.value.peer, caught.value.stage) == (8, "ping")
        assert caught.value.operation == "ping" and str(caught.value).startswith("ping failed")

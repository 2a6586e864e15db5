"""What transfers of the host provider survive: dying, stopped and dropped peers, cancellation, forks."""
import contextlib
import ctypes
import os
import resource
import signal
import socket
import threading
import time

import pytest
import support.hixl_peer as hixl
from support.denied import in_child, need_limited_address_space
from support.hixl_peer import fails

# Forking with the provider's threads running is what some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

MIB = 1 << 20
SIZE = 64 * MIB
TOKEN = "00112233445566778899aabbccddeeff"


@pytest.fixture(scope="module")
def api():
    return hixl.Api()


@pytest.fixture
def peer():
    with hixl.Peer() as running:
        running.addr = running.call("pool", SIZE)
        running.handle = running.call("register", running.addr, SIZE)
        yield running


@pytest.fixture(scope="module")
def local(api):
    addr = api.alloc(SIZE)
    ctypes.memset(addr, 0, SIZE)
    yield addr
    api.free(addr)


@pytest.fixture(params=["shm", "cma", "tcp"])
def path(request, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", request.param)
    return request.param


@pytest.fixture
def tcp(monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", "tcp")


def assert_poisoned(client, peer, local):
    for put in (False, True):
        with fails(hixl.FAILED):
            client.start([(peer.addr, local, 1)], put=put)
        with fails(hixl.FAILED):
            (client.put if put else client.get)([(peer.addr, local, 1)])


def assert_unchanged(addr, size, seconds=0.3):
    before = ctypes.string_at(addr, size)
    time.sleep(seconds)
    assert ctypes.string_at(addr, size) == before


def test_pid_of_a_dead_server_is_taken_by_another(api, peer, local, monkeypatch):
    """Reading by pid alone would now read a stranger."""
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", "cma")
    pid = peer.process.pid
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, 4096)])
        ctypes.memset(local, 0xEE, 4096)
        peer.kill()
        child = 0
        for _ in range(50):
            try:
                with open("/proc/sys/kernel/ns_last_pid", "w") as last:
                    last.write(str(pid - 1))
            except OSError:
                pytest.skip("pids cannot be chosen here")
            child = os.fork()
            if child == 0:
                while True:
                    signal.pause()
            if child == pid:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        else:
            pytest.skip("the pid was not to be had")
        try:
            with fails(hixl.NOT_CONNECTED):
                client.get([(peer.addr, local, 4096)])
            assert ctypes.string_at(local, 4096) == b"\xee" * 4096
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_killed_idle_server(api, peer, local, path):
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, 4096)])
        peer.kill()
        with fails(hixl.NOT_CONNECTED):
            client.get([(peer.addr, local, 4096)])
        assert_poisoned(client, peer, local)


def test_server_killed_under_a_batch(api, peer, local, tcp):
    with api.client(peer.port) as client:
        client.connect()
        peer.stop()
        batch = client.start([(peer.addr, local, SIZE)])
        assert client.wait(batch, 20_000_000)[:2] == (hixl.SUCCESS, hixl.WAITING)
        peer.kill()
        code, status, text = client.wait(batch)
        assert (code, status) == (hixl.NOT_CONNECTED, hixl.STATUS_FAILED)
        assert text
        assert_poisoned(client, peer, local)


def test_server_killed_while_batches_run(api, peer, local, path):
    """Whatever the moment, the client gets an error of a kind and lives."""
    with api.client(peer.port) as client:
        client.connect()
        timer = threading.Timer(0.05, peer.kill)
        timer.start()
        with fails(hixl.NOT_CONNECTED, hixl.FAILED) as info:
            while True:
                client.get([(peer.addr, local, SIZE // 2)])
        timer.join()
        assert info.value.status == hixl.NOT_CONNECTED
        assert_poisoned(client, peer, local)


def test_stopped_server_means_timeout_and_no_late_bytes(api, peer, local, tcp):
    peer.call("fill", peer.addr, SIZE, 1)
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, MIB)])
        ctypes.memset(local, 0, SIZE)
        peer.stop()
        with fails(hixl.TIMEOUT):
            client.get([(peer.addr, local, SIZE)], timeout_ms=150)
        peer.resume()
        assert_unchanged(local, SIZE)
        assert_poisoned(client, peer, local)
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, SIZE)])
        assert ctypes.string_at(local, SIZE) == hixl.pattern(SIZE, 1)


def test_put_that_timed_out_does_not_land_later(api, peer, local, tcp):
    peer.call("fill", peer.addr, SIZE, 2)
    ctypes.memmove(local, hixl.pattern(SIZE, 3), SIZE)
    with api.client(peer.port) as client:
        client.connect().put([(peer.addr + SIZE - 1, local + SIZE - 1, 1)])
        peer.call("fill", peer.addr, SIZE, 2)
        peer.stop()
        with fails(hixl.TIMEOUT):
            client.put([(peer.addr, local, SIZE)], timeout_ms=150)
        peer.resume()
        time.sleep(0.3)
        assert peer.call("matches", peer.addr, SIZE, 2)


def test_wait_that_runs_out_keeps_the_handle(api, peer, local, tcp):
    peer.call("fill", peer.addr, SIZE, 4)
    with api.client(peer.port) as client:
        client.connect()
        peer.stop()
        batch = client.start([(peer.addr, local, SIZE)])
        assert client.wait(batch, 0)[:2] == (hixl.SUCCESS, hixl.WAITING)
        assert client.wait(batch, 30_000_000)[:2] == (hixl.SUCCESS, hixl.WAITING)
        assert client.query(batch) == hixl.WAITING
        peer.resume()
        assert client.wait(batch)[:2] == (hixl.SUCCESS, hixl.COMPLETED)
    assert ctypes.string_at(local, SIZE) == hixl.pattern(SIZE, 4)


def test_cancelled_batch_writes_no_more(api, peer, local, path):
    peer.call("fill", peer.addr, SIZE, 5)
    with api.client(peer.port) as client:
        client.connect()
        ctypes.memset(local, 0, SIZE)
        batch = client.start([(peer.addr, local, SIZE)])
        client.cancel(batch)
        assert_unchanged(local, SIZE, 0.1)
        with fails(hixl.PARAM_INVALID):
            client.query(batch)
        assert_poisoned(client, peer, local)


@pytest.mark.parametrize("path", ["shm", "cma"], indirect=True)
def test_cancelling_an_ended_batch_poisons_nothing(api, peer, local, path):
    with api.client(peer.port) as client:
        client.connect()
        client.get([(peer.addr, local, 100)])
        if client.paths() != path:
            pytest.skip(f"no {path} here, and over others a small batch has not ended when it starts")
        client.cancel(client.start([(peer.addr, local, 100)]))
        client.get([(peer.addr, local, 100)])


def test_cancel_from_another_thread_ends_the_wait(api, peer, local, tcp):
    with api.client(peer.port) as client:
        client.connect()
        peer.stop()
        batch = client.start([(peer.addr, local, SIZE)])
        outcome = []
        waiter = threading.Thread(target=lambda: outcome.append(client.wait(batch)))
        waiter.start()
        time.sleep(0.05)
        client.cancel(batch)
        waiter.join(5)
        assert not waiter.is_alive()
        assert outcome[0][1] == hixl.STATUS_FAILED or outcome[0][0] == hixl.PARAM_INVALID
        peer.resume()


@pytest.mark.parametrize("streams", ["2", "5"])
def test_cancel_while_several_threads_receive(api, peer, local, tcp, monkeypatch, streams):
    """At any moment of a batch in which bytes flow: the waiter returns, and no byte lands after the cancellation."""
    monkeypatch.setenv("LLM_DATADIST_TCP_STREAMS", streams)
    monkeypatch.setenv("LLM_DATADIST_COPY_THREADS", "4")
    peer.call("fill", peer.addr, SIZE, 6)
    last = ctypes.c_uint8.from_address(local + SIZE // int(streams) - 1)
    for number in range(12):
        with api.client(peer.port) as client:
            client.connect()
            ctypes.memset(local, 0, SIZE)
            batch, behind = client.start([(peer.addr, local, SIZE)]), client.start([(peer.addr, local, 100)])
            outcome = []
            waiters = [threading.Thread(target=lambda which, outcome=outcome: outcome.append(client.wait(which)),
                                        args=(which,)) for which in (batch, batch, behind)]
            for waiter in waiters:
                waiter.start()
            seen = ctypes.c_uint8.from_address(local + (SIZE // int(streams)) * number // 13)
            while not seen.value and not last.value and waiters[0].is_alive():
                pass
            with contextlib.suppress(hixl.HixlError):       # it may just have ended
                client.cancel(batch)
            assert_unchanged(local, SIZE, 0.02)
            for waiter in waiters:
                waiter.join(10)
                assert not waiter.is_alive()
            assert {code for code, *_ in outcome} <= {hixl.SUCCESS, hixl.FAILED, hixl.PARAM_INVALID}, outcome


@pytest.mark.parametrize("streams", ["2", "3", "16"])
def test_several_threads_receive_and_send(api, peer, local, tcp, monkeypatch, streams):
    """Large batches of either direction in a queue, with small ones between them and waiters for each."""
    monkeypatch.setenv("LLM_DATADIST_TCP_STREAMS", streams)
    monkeypatch.setenv("LLM_DATADIST_COPY_THREADS", "4")
    peer.call("fill", peer.addr, SIZE, 7)
    half = SIZE // 2
    with api.client(peer.port) as client:
        client.connect()
        ctypes.memmove(local + half, hixl.pattern(half, 8), half)
        batches = [client.start([(peer.addr, local, half)]), client.start([(peer.addr, local, 10)]),
                   client.start([(peer.addr + half, local + half, half)], put=True),
                   client.start([(peer.addr + half, local, half)])]
        outcome = []
        waiters = [threading.Thread(target=lambda which=which: outcome.append(client.wait(which)[:2]))
                   for which in batches]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join(30)
        assert outcome == [(hixl.SUCCESS, hixl.COMPLETED)] * len(batches)
    assert ctypes.string_at(local, half) == hixl.pattern(half, 8)
    assert peer.call("matches", peer.addr + half, half, 8)


def test_destroy_with_batches_in_flight(api, peer, local, path):
    with api.client(peer.port) as client:
        client.connect()
        for _ in range(3):
            client.start([(peer.addr, local, SIZE)])
    assert_unchanged(local, SIZE, 0.1)


def test_dropped_client_is_cut_off_and_others_are_not(api, peer, local, path):
    config = b'{"x": 1, "ldd_token" : "%s"}' % TOKEN.encode()
    with api.client(peer.port, config) as client, api.client(peer.port) as other:
        client.connect().get([(peer.addr, local, 4096)])
        other.connect()
        peer.call("drop", TOKEN)
        time.sleep(0.01)
        with fails(hixl.NOT_CONNECTED):
            client.get([(peer.addr, local, 4096)])
        other.get([(peer.addr, local, 4096)])
    with api.client(peer.port, config) as again:  # a new client may bring the same token
        again.connect().get([(peer.addr, local, 4096)])
    peer.call("drop", "ff" * 16)  # nobody


def test_drop_returns_when_nothing_moves_any_more(api, peer, local, tcp):
    """Puts run against the peer until it drops the client: from then on its memory stays as it is."""
    with api.client(peer.port, b'{"ldd_token":"%s"}' % TOKEN.encode()) as client:
        client.connect()
        stopped = threading.Event()

        def push():
            with contextlib.suppress(hixl.HixlError):
                for seed in range(10_000):
                    ctypes.memset(local, seed % 251, 8 * MIB)
                    client.put([(peer.addr, local, 8 * MIB)])
            stopped.set()

        thread = threading.Thread(target=push)
        thread.start()
        time.sleep(0.2)
        peer.call("drop", TOKEN)
        before = peer.call("digest", peer.addr, 8 * MIB)
        assert stopped.wait(5)
        thread.join()
        assert peer.call("digest", peer.addr, 8 * MIB) == before


def test_drop_of_a_client_that_does_not_read(api, peer, local, tcp):
    with api.client(peer.port, b'{"ldd_token":"%s"}' % TOKEN.encode()) as client:
        client.connect()
        batch = client.start([(peer.addr, local, SIZE)])
        time.sleep(0.05)
        peer.call("drop", TOKEN)
        assert client.wait(batch)[:2] == (hixl.NOT_CONNECTED, hixl.STATUS_FAILED)


def test_unregistering_under_a_reader_that_has_stalled(api, peer, local, tcp):
    with api.client(peer.port) as client:
        client.connect()
        batch = client.start([(peer.addr, local, SIZE)])
        time.sleep(0.05)
        peer.call("unregister", peer.handle)
        with fails(hixl.PARAM_INVALID):
            peer.call("unregister", peer.handle)
        assert client.wait(batch)[1] == hixl.STATUS_FAILED


def test_region_that_went_is_refused_by_the_server(api, peer, local, tcp):
    """The client still lists it; the server checks the generation, also after the slot has a new region."""
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, 10)])
        peer.call("unregister", peer.handle)
        peer.call("register", peer.addr, SIZE)
        with fails(hixl.FAILED) as info:
            client.get([(peer.addr, local, 10)])
        assert "not registered" in info.value.text


def test_restarted_server(api, peer, local, path):
    with api.client(peer.port) as client:
        client.connect()
        peer.kill()
        with hixl.Peer(port=peer.port) as second:
            addr = second.call("pool", MIB)
            second.call("register", addr, MIB)
            with fails(hixl.NOT_CONNECTED):
                client.get([(peer.addr, local, 10)])
            with api.client(peer.port) as fresh:
                fresh.connect().get([(addr, local, MIB)])


def test_destroyed_server(api, peer, local, path):
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, 10)])
        peer.call("destroy")
        time.sleep(0.01)
        with fails(hixl.NOT_CONNECTED):
            client.get([(peer.addr, local, 10)])


def test_forked_child_of_a_server_keeps_nothing_open(api, peer, local, tcp):
    """The parent's death is seen at once and its port is free, though a child of it lives on."""
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, 10)])
        child = peer.call("fork")
        try:
            peer.kill()
            with fails(hixl.NOT_CONNECTED):
                client.get([(peer.addr, local, 10)])
            with hixl.Peer(port=peer.port):
                pass
        finally:
            os.kill(child, 9)


def test_forked_child_is_told_and_disturbs_nothing(api, peer, local, path):
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, 4 * MIB)])
        child = os.fork()
        if child == 0:
            codes = []
            for call in (lambda: client.get([(peer.addr, local, 10)]), client.connect, client.remote_mem,
                         client.destroy):
                try:
                    call()
                    codes.append(0)
                except hixl.HixlError as error:
                    codes.append(error.status)
            fine = codes == [hixl.FAILED] * 4
            with contextlib.suppress(Exception):
                with api.client(peer.port) as own:  # the child may have clients of its own
                    own.connect().get([(peer.addr, local, 4 * MIB)])
                    os._exit(0 if fine else 1)
            os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        client.get([(peer.addr, local, 4 * MIB)])


def test_port_in_use(api, peer):
    server = api.server(peer.port)
    with fails(hixl.FAILED) as info:
        api.check(api.lib.HixlCSServerListen(server, 1))
    assert str(peer.port) in info.value.text
    api.check(api.lib.HixlCSServerDestroy(server))


def test_port_zero_does_not_listen(api):
    server = api.server(0)
    api.check(api.lib.HixlCSServerListen(server, 1))
    api.check(api.lib.HixlCSServerDestroy(server))


def test_connect_failures(api, peer):
    with api.client(hixl.free_port()) as client:
        with fails(hixl.NOT_CONNECTED):
            client.connect()
        with fails(hixl.NOT_CONNECTED):
            client.get([(4096, 4096, 1)])
    with socket.create_server(("127.0.0.1", 0)) as silent, api.client(silent.getsockname()[1]) as client:
        with fails(hixl.TIMEOUT):
            client.connect(50)
    with api.client(peer.port) as client:
        peer.stop()
        with fails(hixl.TIMEOUT):
            client.connect(50)
        peer.resume()
        client.connect()  # the failed attempt left nothing behind
        with fails(hixl.ALREADY_CONNECTED):
            client.connect()


def test_something_else_listens(api):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            conn, _ = listener.accept()
            with conn:
                conn.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 10)
                conn.recv(1000)
        thread = threading.Thread(target=serve)
        thread.start()
        with api.client(listener.getsockname()[1]) as client, fails(hixl.NOT_CONNECTED) as info:
            client.connect()
        thread.join()
    assert "not a transfer server" in info.value.text


def test_list_from_a_stopped_server(api, peer, local, path):
    """A list call that runs out of time fails alone: the late answer is skipped by the next."""
    with api.client(peer.port) as client:
        client.connect()
        peer.stop()
        with fails(hixl.TIMEOUT):
            client.remote_mem(30)
        with fails(hixl.TIMEOUT):
            client.remote_mem(30)
        peer.resume()
        assert [region[0] for region in client.remote_mem()] == [peer.addr]
        client.get([(peer.addr, local, 10)])


def test_signals_leave_waits_alone(api, peer, local, tcp):
    """No SIGPIPE on a dead connection: the process would end here."""
    with api.client(peer.port) as client:
        client.connect().put([(peer.addr, local, 10)])
        peer.kill()
        for _ in range(3):
            with fails(hixl.NOT_CONNECTED, hixl.FAILED):
                client.put([(peer.addr, local, 10)])


def test_no_address_space_for_a_mapping(api, peer, monkeypatch):
    """The region then travels the next path."""
    need_limited_address_space()
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", "shm,cma")
    peer.call("fill", peer.addr, SIZE, 6)

    def work():
        buffer = ctypes.create_string_buffer(MIB)
        with api.client(peer.port) as client:
            with open("/proc/self/statm") as statm:
                used = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + SIZE // 2, resource.RLIM_INFINITY))
            client.connect().get([(peer.addr, ctypes.addressof(buffer), MIB)])
            assert client.paths() == "cma", client.paths()
            assert buffer.raw == hixl.pattern(MIB, 6)

    assert in_child(work) == ""


def test_client_out_of_descriptors(api, peer, local, tcp):
    def work():
        with api.client(peer.port) as client:
            limit = max(map(int, os.listdir("/proc/self/fd"))) + 8  # room to hold and give back, holes or not
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            held = []
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            with fails(hixl.RESOURCE_EXHAUSTED):
                client.connect()
            os.close(held.pop())
            client.connect()
            with fails(hixl.RESOURCE_EXHAUSTED):  # a data connection wants another
                client.get([(peer.addr, local, 1)])
            os.close(held.pop())
        with api.client(peer.port) as client:  # as many connections as there are descriptors for
            client.connect().get([(peer.addr, local, SIZE)])

    assert in_child(work) == ""


def test_server_out_of_descriptors_recovers(api, peer, local, tcp):
    peer.call("limit_descriptors", 4)
    crowd = [socket.create_connection(("127.0.0.1", peer.port)) for _ in range(20)]
    time.sleep(0.2)
    for sock in crowd:
        sock.close()
    with api.client(peer.port) as client:
        client.connect().get([(peer.addr, local, 4096)])


def test_ipv6(api, local):
    port = hixl.free_port()
    server = api.server(port, "::1")
    try:
        api.check(api.lib.HixlCSServerListen(server, 4))
    except hixl.HixlError as error:
        pytest.skip(f"no IPv6 here: {error.text}")
    else:
        with api.client(port, ip="::1") as client:
            assert client.connect().remote_mem() == []
    finally:
        api.check(api.lib.HixlCSServerDestroy(server))


def test_a_signal_is_no_death(api, peer, local, monkeypatch):
    """A handler of the application's that runs during gets by attach does not make the server a dead one."""
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", "cma")
    calls = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        with api.client(peer.port) as client:
            client.connect()
            signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
            for _ in range(4000):
                client.get([(peer.addr, local, 4096)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(calls) > 10

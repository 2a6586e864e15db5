"""The runtime of the host provider, two allocations of it, and a stream that waits."""
import pytest
import support.acl_library as acl
from support.acl_library import num_threads, own_descriptors, pattern, wait_until


@pytest.fixture
def rt():
    """A runtime with device 0 set in this thread; what a test leaves behind fails it."""
    runtime = acl.Runtime()
    before, threads_before = own_descriptors(), num_threads()
    runtime.ok("aclrtSetDevice", 0)
    yield runtime
    runtime.ok("aclrtResetDevice", 0)
    assert own_descriptors() == before, "an allocation was left behind"
    wait_until(lambda: num_threads() <= threads_before, "a stream left its thread behind")


@pytest.fixture
def pair(rt):
    """Two device allocations of 64 KiB: one with known bytes, one with zeros."""
    size = 64 << 10
    src, dst = rt.malloc(size), rt.malloc(size)
    data = pattern(size, 1)
    rt.fill(src, data)
    rt.ok("aclrtMemset", dst, size, 0, size)
    yield src, dst, size, data
    for address in (src, dst):
        rt.lib.aclrtFree(address)          # a test may have freed it


@pytest.fixture
def blocked(rt):
    """A stream that stands still until `gate` is recorded, and another one to record it in."""
    stream, opener, gate = rt.stream(), rt.stream(), rt.event()
    rt.ok("aclrtStreamWaitEvent", stream, gate)
    yield stream, opener, gate
    rt.lib.aclrtDestroyStreamForce(stream)
    rt.ok("aclrtDestroyStream", opener)
    rt.ok("aclrtDestroyEvent", gate)

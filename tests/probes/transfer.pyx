"""Waits, block lists, plans and local copies with Python numbers, over providers whose functions are replaced.

Planners and copies get memory of nobody: only `CopyProbe.copy` follows addresses.
"""
cimport cython
from libc.stdint cimport INT64_MAX, int64_t, uint64_t, uintptr_t
from libc.string cimport memset

from llm_datadist.core.base.provider cimport Provider, aclrtMemcpyKind, ldd_provider
from llm_datadist.core.base.status cimport check, ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_now_ns
from llm_datadist.core.base.wait cimport ldd_map_acl, ldd_map_hixl, ldd_wait_complete, ldd_wait_interruptible
from llm_datadist.core.plan.block_plan cimport (
    ldd_desc_list, ldd_desc_list_clear, ldd_desc_list_free, ldd_plan_blocks, ldd_plan_contiguous, ldd_plan_reserve,
    ldd_plan_slot_to_blocks,
)
from llm_datadist.core.plan.index_list cimport IndexList
from llm_datadist.core.transfer.local_copy cimport (
    ldd_local_copy, ldd_local_op, ldd_op_list, ldd_op_list_clear, ldd_op_list_free, ldd_plan_copy_blocks,
    ldd_plan_copy_cache, ldd_plan_swap_blocks, ldd_slots,
)


def map_code(str kind, code):
    """Return the internal status of an "acl" or "hixl" number."""
    return ldd_map_acl(code) if kind == "acl" else ldd_map_hixl(code)


@cython.final
cdef class TableProbe:
    """A function table: that of a provider, with single slots replaced.

    Parameters
    ----------
    provider : Provider, optional
        Whose table to copy; default: every slot is empty.
    caps : int, optional
        Capability bits to claim; default: those of `provider`.
    **slots : int
        Address of the C function for a slot, 0 to empty it.
    """

    cdef ldd_provider table
    cdef object owner

    def __init__(self, Provider provider=None, caps=None, **slots):
        cdef uintptr_t address
        self.owner = provider
        if provider is None:
            memset(&self.table, 0, sizeof(self.table))
        else:
            self.table = provider.table[0]
        if caps is not None:
            self.table.caps = caps
        for name, value in slots.items():
            address = value
            if name == "query":
                (<void**>&self.table.hixl.HixlCSClientQueryCompleteStatus)[0] = <void*>address
            elif name == "wait":
                (<void**>&self.table.ext.LddClientWait)[0] = <void*>address
            elif name == "cancel":
                (<void**>&self.table.ext.LddClientCancel)[0] = <void*>address
            elif name == "hixl_text":
                (<void**>&self.table.ext.LddLastError)[0] = <void*>address
            elif name == "acl_text":
                (<void**>&self.table.acl.aclGetRecentErrMsg)[0] = <void*>address
            elif name == "memcpy":
                (<void**>&self.table.acl.aclrtMemcpy)[0] = <void*>address
            elif name == "memcpy_async":
                (<void**>&self.table.acl.aclrtMemcpyAsync)[0] = <void*>address
            elif name == "synchronize":
                (<void**>&self.table.acl.aclrtSynchronizeStreamWithTimeout)[0] = <void*>address
            elif name == "abort":
                (<void**>&self.table.acl.aclrtStreamAbort)[0] = <void*>address
            else:
                raise TypeError(f"unknown slot {name!r}")

    def wait(self, uintptr_t client, uintptr_t handle, timeout_ns=None, bint interruptible=False):
        """Wait for a batch as the transfer code does; `timeout_ns` None waits without limit."""
        cdef int64_t deadline_ns = INT64_MAX if timeout_ns is None else ldd_now_ns() + <int64_t>timeout_ns
        cdef ldd_detail detail
        cdef ldd_status status
        detail.provider_code = 0
        detail.text[0] = 0
        with nogil:
            if interruptible:
                status = ldd_wait_interruptible(&self.table, <void*>client, <void*>handle, deadline_ns, &detail)
            else:
                status = ldd_wait_complete(&self.table, <void*>client, <void*>handle, deadline_ns, &detail)
            check(status, &detail, b"wait for transfer")


def parse_indices(values, str name):
    """Return what `IndexList.parse` reads, and whether it reads the caller's buffer in place."""
    cdef IndexList indices = IndexList.parse(values, name)
    return [indices.data[i] for i in range(indices.length)], indices._has_view


@cython.final
cdef class PlanProbe:
    """A reusable descriptor list, and every planner that fills one.

    Each call plans from scratch and returns the descriptors as ``(remote, local, len)``. Addresses are
    numbers that are never followed.
    """
    cdef ldd_desc_list _list

    def __dealloc__(self):
        ldd_desc_list_free(&self._list)

    def contiguous(self, remote_addrs, remote_offset, local_addrs, local_offset, nbytes):
        cdef IndexList remote = IndexList.parse(remote_addrs, "remote_addrs")
        cdef IndexList local = IndexList.parse(local_addrs, "local_addrs")
        cdef ldd_detail detail
        detail.provider_code = 0
        ldd_desc_list_clear(&self._list)
        return self._result(ldd_plan_contiguous(
            &self._list, <const uint64_t*>remote.data, remote_offset, <const uint64_t*>local.data, local_offset,
            remote.length, nbytes, &detail), &detail)

    def blocks(self, remote_addrs, remote_blocks, num_remote, local_addrs, local_blocks, num_local, block_bytes, put):
        cdef IndexList remote = IndexList.parse(remote_addrs, "remote_addrs")
        cdef IndexList local = IndexList.parse(local_addrs, "local_addrs")
        cdef IndexList remote_list = IndexList.parse(remote_blocks, "remote_blocks")
        cdef IndexList local_list = IndexList.parse(local_blocks, "local_blocks")
        cdef ldd_detail detail
        detail.provider_code = 0
        ldd_desc_list_clear(&self._list)
        return self._result(ldd_plan_blocks(
            &self._list, <const uint64_t*>remote.data, remote_list.data, num_remote,
            <const uint64_t*>local.data, local_list.data, num_local,
            remote.length, block_bytes, remote_list.length, put, &detail), &detail)

    def slot_to_blocks(self, slot_addrs, slot_offset, slot_bytes, block_addrs, blocks, num_blocks, block_bytes, put):
        cdef IndexList slot = IndexList.parse(slot_addrs, "slot_addrs")
        cdef IndexList pool = IndexList.parse(block_addrs, "block_addrs")
        cdef IndexList block_list = IndexList.parse(blocks, "blocks")
        cdef ldd_detail detail
        detail.provider_code = 0
        ldd_desc_list_clear(&self._list)
        return self._result(ldd_plan_slot_to_blocks(
            &self._list, <const uint64_t*>slot.data, slot_offset, slot_bytes,
            <const uint64_t*>pool.data, block_list.data, num_blocks,
            slot.length, block_bytes, block_list.length, put, &detail), &detail)

    cdef list _result(self, ldd_status status, const ldd_detail* detail):
        cdef size_t i
        check(status, detail, b"plan")
        items = [(<uint64_t>self._list.items[i].remote_buf, <uint64_t>self._list.items[i].local_buf,
                  self._list.items[i].len) for i in range(self._list.count)]
        if self._list.bytes != sum(item[2] for item in items):
            raise RuntimeError("the byte count of a plan differs from the sum of its descriptors")
        return items


@cython.final
cdef class CopyProbe:
    """Plans and copies within one process. Each call plans from scratch.

    Plans are returned as ``(dst, src, bytes)``; their addresses are followed by `copy` alone.
    """
    cdef ldd_op_list _list

    def __dealloc__(self):
        ldd_op_list_free(&self._list)

    def copy_cache(self, dst_addrs, dst_shape, dst_slot, src_addrs, src_shape, src_slot, offset, nbytes):
        """Plan copy_cache; shapes are ``(num_slots, stride)``."""
        cdef IndexList dst_list = IndexList.parse(dst_addrs, "dst_addrs")
        cdef IndexList src_list = IndexList.parse(src_addrs, "src_addrs")
        cdef ldd_slots dst, src
        cdef ldd_detail detail
        dst.addrs, dst.num_tensors = <const uint64_t*>dst_list.data, dst_list.length
        dst.num_slots, dst.stride = dst_shape
        src.addrs, src.num_tensors = <const uint64_t*>src_list.data, src_list.length
        src.num_slots, src.stride = src_shape
        detail.provider_code = 0
        ldd_op_list_clear(&self._list)
        return self._result(ldd_plan_copy_cache(
            &self._list, &dst, dst_slot, &src, src_slot, offset, nbytes, &detail), &detail)

    def copy_blocks(self, addrs, num_blocks, block_bytes, src_blocks, dst_blocks):
        """Plan copy_blocks."""
        cdef IndexList bases = IndexList.parse(addrs, "addrs")
        cdef IndexList src = IndexList.parse(src_blocks, "src_blocks")
        cdef IndexList dst = IndexList.parse(dst_blocks, "dst_blocks")
        cdef ldd_detail detail
        detail.provider_code = 0
        ldd_op_list_clear(&self._list)
        return self._result(ldd_plan_copy_blocks(
            &self._list, <const uint64_t*>bases.data, bases.length, num_blocks, block_bytes, src.data, dst.data,
            src.length, &detail), &detail)

    def swap_blocks(self, src_addrs, src_blocks, num_src, dst_addrs, dst_blocks, num_dst, block_bytes):
        """Plan swap_blocks."""
        cdef IndexList src_list = IndexList.parse(src_addrs, "src_addrs")
        cdef IndexList dst_list = IndexList.parse(dst_addrs, "dst_addrs")
        cdef IndexList src = IndexList.parse(src_blocks, "src_blocks")
        cdef IndexList dst = IndexList.parse(dst_blocks, "dst_blocks")
        cdef ldd_detail detail
        detail.provider_code = 0
        ldd_op_list_clear(&self._list)
        return self._result(ldd_plan_swap_blocks(
            &self._list, <const uint64_t*>src_list.data, src.data, num_src, <const uint64_t*>dst_list.data, dst.data,
            num_dst, src_list.length, block_bytes, src.length, &detail), &detail)

    def copy(self, TableProbe provider, uintptr_t stream, ops, int kind, timeout_ns=None):
        """Carry out ``(dst, src, bytes)`` operations; `timeout_ns` None sets no limit."""
        cdef int64_t deadline_ns = INT64_MAX if timeout_ns is None else ldd_now_ns() + <int64_t>timeout_ns
        cdef ldd_detail detail
        cdef ldd_status status
        cdef ldd_local_op* op
        detail.provider_code = 0
        detail.text[0] = 0
        ldd_op_list_clear(&self._list)
        check(ldd_plan_reserve(<void**>&self._list.items, &self._list.capacity, 0, len(ops), sizeof(ldd_local_op),
                               &detail), &detail, b"copy")
        for dst, src, nbytes in ops:
            op = &self._list.items[self._list.count]
            op.dst = <void*><uintptr_t>dst
            op.src = <const void*><uintptr_t>src
            op.bytes = nbytes
            self._list.count += 1
        with nogil:
            status = ldd_local_copy(&provider.table, <void*>stream, self._list.items, self._list.count,
                                    <aclrtMemcpyKind>kind, deadline_ns, &detail)
            check(status, &detail, b"copy")

    cdef list _result(self, ldd_status status, const ldd_detail* detail):
        cdef size_t i
        check(status, detail, b"plan")
        items = [(<uintptr_t>self._list.items[i].dst, <uintptr_t>self._list.items[i].src, self._list.items[i].bytes)
                 for i in range(self._list.count)]
        if self._list.bytes != sum(item[2] for item in items):
            raise RuntimeError("the byte count of a plan differs from the sum of its copies")
        return items

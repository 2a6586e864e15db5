"""Read block lists: what users give as indices becomes contiguous int64, or an error naming the element.

Every entry point that takes block lists parses them here, with the GIL, before it plans without it. A list,
tuple or range is copied in one pass; a buffer of int64 or uint64 is read in place, and other integer buffers
are widened. Up to INLINE_INDICES values need no allocation.

A buffer read in place belongs to the user, who may write to it at any time. So the check made here only
serves good messages: whoever uses the values loads each of them once, checks it, and uses the very value it
checked (`ldd_load_index`).
"""
cimport cython
from cpython.buffer cimport PyBUF_RECORDS_RO, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index
from cpython.object cimport PyObject
from libc.stdint cimport INT64_MAX, UINT64_MAX, int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from llm_datadist.core.base.status cimport LDD_E_PARAM, ldd_detail, ldd_fail, ldd_status

cdef extern from "Python.h":
    # Borrowed references and raw results: the exact-int path of a list touches no reference count.
    PyObject* _list_item "PyList_GET_ITEM"(PyObject* values, Py_ssize_t i) noexcept
    Py_ssize_t _list_size "PyList_GET_SIZE"(PyObject* values) noexcept
    PyObject* _tuple_item "PyTuple_GET_ITEM"(PyObject* values, Py_ssize_t i) noexcept
    bint _is_exact_int "PyLong_CheckExact"(PyObject* value) noexcept
    long long _int_value "PyLong_AsLongLongAndOverflow"(PyObject* value, int* overflow) noexcept

cdef extern from *:
    """
    static inline int64_t ldd_sign_of_all(const int64_t *data, size_t n) {
        int64_t all = 0;
        for (size_t i = 0; i < n; i++) all |= data[i];
        return all;
    }
    """
    int64_t ldd_sign_of_all(const int64_t* data, size_t n) noexcept nogil

ctypedef fused narrow_int:
    int8_t
    int16_t
    int32_t
    uint8_t
    uint16_t
    uint32_t
    int64_t                         # strided or unaligned ones; uint64 has the same bits


@cython.final
@cython.no_gc                       # reaches only the exporter of a buffer, and lives for one call
@cython.freelist(16)
cdef class IndexList:
    """Block indices of one argument, contiguous and non-negative.

    Made by `parse` alone; one thread at a time. Keeps the buffer it reads in place exported, so that the
    memory can neither move nor vanish while a transfer is being planned.
    """

    def __cinit__(self):
        self.data = self._inline
        self.length = 0
        self._heap = NULL
        self._has_view = False

    def __init__(self):
        raise TypeError("IndexList is made by IndexList.parse")

    def __dealloc__(self):
        free(self._heap)
        if self._has_view:
            PyBuffer_Release(&self._view)

    @staticmethod
    cdef IndexList parse(object values, str name):
        """Read `values`; TypeError for what is no integer, ValueError for what is no index, naming both."""
        cdef IndexList indices = IndexList.__new__(IndexList)
        if type(values) is list:
            indices._read_list(values, name)
        elif type(values) is tuple:
            indices._read_tuple(values, 0, name)
        elif type(values) is range:
            indices._read_range(values, name)
        elif isinstance(values, (str, bytes, bytearray)):
            raise TypeError(f"{name} must be a sequence of int, got {type(values).__name__}")
        elif PyObject_CheckBuffer(values):
            indices._read_buffer(values, name)
        else:
            try:
                snapshot = tuple(values)
            except TypeError:
                raise TypeError(f"{name} must be a sequence of int, got {type(values).__name__}") from None
            indices._read_tuple(snapshot, 0, name)
        return indices

    cdef int64_t* _room(self, size_t n) except NULL:
        """Return writable space for n values and make it the data."""
        if n <= INLINE_INDICES:
            self.data = self._inline
            return self._inline
        if self._heap == NULL:
            if n <= <size_t>(UINT64_MAX // 8):
                self._heap = <int64_t*>malloc(n * sizeof(int64_t))
            if self._heap == NULL:
                raise MemoryError(f"no memory for {n} block indices")
        self.data = self._heap
        return self._heap

    cdef int _read_list(self, list values, str name) except -1:
        cdef PyObject* items = <PyObject*>values
        cdef Py_ssize_t i, n = _list_size(items)
        cdef int64_t* out = self._room(n)
        cdef PyObject* item
        cdef int overflow = 0
        cdef int64_t value
        self.length = n
        for i in range(n):
            item = _list_item(items, i)
            if not _is_exact_int(item):
                # Reading it may run foreign code, which may change the list: go on from a snapshot.
                return self._read_tuple(tuple(values), i, name)
            value = _int_value(item, &overflow)
            if value < 0 or overflow:
                raise _bad_index(name, i, <object>item)
            out[i] = value
        return 0

    cdef int _read_tuple(self, tuple values, Py_ssize_t start, str name) except -1:
        """Read a tuple from position `start` on; what is before it has been read already."""
        cdef PyObject* items = <PyObject*>values
        cdef Py_ssize_t i, n = len(values)
        cdef int64_t* out = self._room(n)
        cdef PyObject* item
        cdef int overflow = 0
        cdef int64_t value
        self.length = n
        for i in range(start, n):
            item = _tuple_item(items, i)
            if _is_exact_int(item):
                value = _int_value(item, &overflow)
            else:
                number = _as_int(name, i, <object>item)
                value = _int_value(<PyObject*>number, &overflow)
            if value < 0 or overflow:
                raise _bad_index(name, i, <object>item)
            out[i] = value
        return 0

    cdef int _read_range(self, values, str name) except -1:
        cdef Py_ssize_t i, n
        cdef int64_t* out
        cdef int64_t value, step
        if not values:
            return 0
        # The extremes of a range are its ends, so checking these two covers all.
        first, last = values[0], values[len(values) - 1]
        if max(first, last) > INT64_MAX:
            raise _bad_index(name, 0 if first > last else len(values) - 1, max(first, last))
        if first < 0:
            raise _bad_index(name, 0, first)
        if last < 0:
            raise _bad_index(name, first // -values.step + 1, values[first // -values.step + 1])
        n = len(values)
        out = self._room(n)
        self.length = n
        value = first
        step = values.step if n > 1 else 0      # the step of a short range may be any number
        for i in range(n):
            out[i] = value
            value += step if i + 1 < n else 0
        return 0

    cdef int _read_buffer(self, values, str name) except -1:
        cdef Py_buffer* view = &self._view
        cdef bint in_place = False
        PyObject_GetBuffer(values, view, PyBUF_RECORDS_RO)
        self._has_view = True
        try:
            in_place = self._read_view(view, name)
        finally:
            if not in_place:
                self._has_view = False
                PyBuffer_Release(view)
        return 0

    cdef int _read_view(self, const Py_buffer* view, str name) except -1:
        """Take the values in place (return 1) or copy them (return 0)."""
        cdef char kind = _integer_kind(view)
        cdef bint is_signed = kind == c'i'
        cdef bint in_place = False
        cdef int64_t* out
        cdef Py_ssize_t step
        if view.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, got {view.ndim} dimensions")
        if kind == 0:
            format = view.format.decode("ascii", "replace")
            raise TypeError(f"{name} must hold native integers, got a buffer of format {format!r}")
        self.length = view.shape[0]
        if self.length == 0:
            return 0
        step = view.strides[0]
        if view.itemsize == 8 and step == 8 and <size_t>view.buf % 8 == 0:
            self.data = <const int64_t*>view.buf
            in_place = True
        else:
            out = self._room(self.length)
            if view.itemsize == 8:
                _gather(<const int64_t*>view.buf, step, self.length, out)
            elif view.itemsize == 4:
                if is_signed:
                    _gather(<const int32_t*>view.buf, step, self.length, out)
                else:
                    _gather(<const uint32_t*>view.buf, step, self.length, out)
            elif view.itemsize == 2:
                if is_signed:
                    _gather(<const int16_t*>view.buf, step, self.length, out)
                else:
                    _gather(<const uint16_t*>view.buf, step, self.length, out)
            elif is_signed:
                _gather(<const int8_t*>view.buf, step, self.length, out)
            else:
                _gather(<const uint8_t*>view.buf, step, self.length, out)
        self._refuse_negative(name, is_signed)
        return in_place

    cdef int _refuse_negative(self, str name, bint is_signed) except -1:
        """Raise for the first value with its top bit set: negative, or 2**63 and more in a uint64 buffer."""
        cdef size_t i
        if ldd_sign_of_all(self.data, self.length) >= 0:
            return 0
        for i in range(self.length):
            if self.data[i] < 0:
                raise _bad_index(name, i, self.data[i] if is_signed else <uint64_t>self.data[i])
        return 0


cdef object _bad_index(str name, Py_ssize_t i, value):
    """Return the ValueError for an element that is an integer and yet no index."""
    if value < 0:
        return ValueError(f"{name}[{i}] is {value}, a block index cannot be negative")
    return ValueError(f"{name}[{i}] is {value}, a block index is at most {INT64_MAX}")


cdef object _as_int(str name, Py_ssize_t i, value):
    """Return an int subclass, a bool or a NumPy integer as exact int; TypeError for anything else."""
    try:
        return int(PyNumber_Index(value))
    except TypeError:
        raise TypeError(f"{name}[{i}] must be int, got {value!r} of type {type(value).__name__}") from None


cdef char _integer_kind(const Py_buffer* view) noexcept:
    """Return 'i' or 'u' for native signed or unsigned integers, 0 for everything else."""
    cdef const char* format = view.format
    if format == NULL:
        return c'u'                             # by the buffer protocol: unsigned bytes
    if format[0] == c'@' or format[0] == c'=' or format[0] == c'<':
        format += 1
    if format[0] == 0 or format[1] != 0:
        return 0
    if format[0] in (c'b', c'h', c'i', c'l', c'q', c'n'):
        return c'i'
    if format[0] in (c'B', c'H', c'I', c'L', c'Q', c'N'):
        return c'u'
    return 0


cdef void _gather(const narrow_int* values, Py_ssize_t step_bytes, size_t n, int64_t* out) noexcept nogil:
    """Widen n values that lie `step_bytes` apart, aligned or not."""
    cdef narrow_int value
    cdef size_t i
    for i in range(n):
        memcpy(&value, <const char*>values + <Py_ssize_t>i * step_bytes, sizeof(narrow_int))
        out[i] = value


cdef ldd_status ldd_index_error(
    const char* name, size_t i, int64_t value, uint64_t limit, ldd_detail* detail
) noexcept nogil:
    if limit == 0:
        return ldd_fail(detail, LDD_E_PARAM, b"%s[%zu] is block %lld, but the cache has no blocks",
                        name, i, <long long>value)
    return ldd_fail(detail, LDD_E_PARAM, b"%s[%zu] is block %lld, outside the allowed range 0..%llu",
                    name, i, <long long>value, <unsigned long long>(limit - 1))

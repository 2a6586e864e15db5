"""The cache table as a Python object; see ``cache_object.pyx``."""
from llm_datadist.core.table.cache_table cimport ldd_table


cdef class CacheTable:
    cdef ldd_table* t

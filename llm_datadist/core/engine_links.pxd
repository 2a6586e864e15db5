"""The links of an engine; see ``engine_links.pyx``."""
from .engine_core cimport EngineCore


cdef class EngineLinks(EngineCore):
    pass

"""The links of an engine; see ``linking.pyx``."""
from llm_datadist.core.engine.lifecycle cimport EngineCore


cdef class EngineLinks(EngineCore):
    pass

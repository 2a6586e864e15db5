"""What an engine holds; see ``holdings.pyx``."""
from llm_datadist.core.engine.lifecycle cimport EngineCore


cdef class EngineHoldings(EngineCore):
    pass

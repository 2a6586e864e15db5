"""The links of an engine; see ``linking.pyx``."""
from llm_datadist.core.engine.holdings cimport EngineHoldings


cdef class EngineLinks(EngineHoldings):
    pass

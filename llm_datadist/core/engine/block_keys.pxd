"""The keys of an engine on blocks that are held for one request; see ``block_keys.pyx``."""
from llm_datadist.core.engine.linking cimport EngineLinks


cdef class EngineBlockKeys(EngineLinks):
    pass

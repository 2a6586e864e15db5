"""Answering pulls that are one exchange."""
from llm_datadist.core.link.links cimport ldd_node

# Before the first data server starts.
cdef void ldd_serve_pull(ldd_node* node) noexcept nogil

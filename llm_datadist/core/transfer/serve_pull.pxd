"""The owner's end of a pull in one exchange; see ``serve_pull.pyx``."""
from llm_datadist.core.link.links cimport ldd_node

# Before the first data server starts.
cdef void ldd_serve_pull(ldd_node* node) noexcept nogil

"""The reader's end of a pull in one exchange with the owner; see ``one_pull.pyx``."""
from libc.stdint cimport int64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link
from llm_datadist.core.transfer.fitting cimport ldd_end, ldd_transfer

# Needs link.lock and the local cache pinned. LDD_FETCH_ASK: nothing has moved, go step by step.
cdef ldd_status ldd_one_pull(ldd_link* link, const ldd_transfer* what, const ldd_end* local, int64_t deadline_ns,
                             ldd_detail* detail) noexcept nogil

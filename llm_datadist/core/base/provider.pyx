"""The provider an engine talks to: a function table over CANN or over the embedded host libraries.

The engine opens one when it is initialised, never at import; any thread may then call through the table. Opening
loads shared libraries and may take as long as the loader does; the GIL is released for it. The object frees the
table; the libraries stay loaded until the process ends.
"""
cimport cython

import os

from llm_datadist.core.base.status cimport check, ldd_detail, ldd_status

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HOST_LIBRARY = os.path.join(_PACKAGE, "host", "libldd_host.so")
CAPABILITIES = {
    "late_registration": LDD_CAP_LATE_REGISTRATION,
    "any_local": LDD_CAP_ANY_LOCAL,
    "wait": LDD_CAP_WAIT,
    "cancel": LDD_CAP_CANCEL,
    "drop_peer": LDD_CAP_DROP_PEER,
    "fetch": LDD_CAP_FETCH,
    "shared_memory": LDD_CAP_SHARED_MEMORY,
    "admit": LDD_CAP_ADMIT,
}


@cython.final
cdef class Provider:
    """An open provider. Made by `open`.

    Attributes
    ----------
    why_not_cann : str
        With ``open("auto")`` and the host provider as answer: why CANN was not taken, naming the library. Otherwise "".
    """

    def __cinit__(self):
        self.table = NULL
        self.why_not_cann = ""

    def __init__(self):
        raise TypeError("Provider cannot be constructed; use Provider.open(which)")

    def __dealloc__(self):
        ldd_provider_close(self.table)

    @staticmethod
    def open(str which not None="auto"):
        """Open a provider and look up its symbols.

        Parameters
        ----------
        which : {"auto", "host", "cann"}
            "auto" takes CANN when its libraries open and it has a device, otherwise the host provider.

        Returns
        -------
        Provider

        Raises
        ------
        LLMNotEnabledError
            A library or a required symbol is missing; the text names it, with version and the loader's reason.
        LLMParamInvalidError
            `which` is none of the three.
        """
        cdef Provider provider = Provider.__new__(Provider)
        cdef ldd_detail detail
        cdef ldd_status status
        cdef bytes name = which.encode("utf-8", "surrogateescape"), path = os.fsencode(HOST_LIBRARY)
        cdef const char* c_name = name
        cdef const char* c_path = path
        detail.provider_code = 0
        detail.text[0] = 0
        with nogil:
            status = ldd_provider_open(c_name, c_path, &provider.table, &detail)
            check(status, &detail, b"open provider")
        if which == "auto" and provider.name == "host":
            provider.why_not_cann = detail.text.decode("utf-8", "replace")
        return provider

    @property
    def name(self):
        """Which one answers: "host" or "cann"."""
        return self.table.name.decode()

    @property
    def capabilities(self):
        """Names of the optional abilities it has, a frozenset of the keys of `CAPABILITIES`."""
        return frozenset(name for name, bit in CAPABILITIES.items() if self.table.caps & <unsigned int>bit)

    @property
    def libraries(self):
        """Paths of the opened libraries by part, ``{"acl": path, "hixl": path}``."""
        return {
            "acl": os.fsdecode(<bytes>self.table.acl_path),
            "hixl": os.fsdecode(<bytes>self.table.hixl_path),
        }

    @property
    def version(self):
        """Version text of the runtime, "" when it does not tell."""
        return self.table.version.decode()

    def __repr__(self):
        return f"Provider({self.name!r}, version={self.version!r}, acl={self.libraries['acl']!r})"

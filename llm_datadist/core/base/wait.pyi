from typing import Optional, final

from llm_datadist.core.base.provider import Provider

def map_code(kind: str, code: int) -> int: ...
@final
class TableProbe:
    def __init__(self, provider: Optional[Provider] = None, caps: Optional[int] = None, **slots: int) -> None: ...
    def wait(
        self, client: int, handle: int, timeout_ns: Optional[int] = None, interruptible: bool = False,
    ) -> None: ...

from contextvars import ContextVar
from typing import Dict, Optional, Tuple

trace_context: ContextVar[Optional[Tuple[int, int, int]]]

def layout() -> Dict[str, int]: ...
def bucket(duration_ns: int) -> int: ...

from typing import Dict, FrozenSet, final

HOST_LIBRARY: str
CAPABILITIES: Dict[str, int]

@final
class Provider:
    why_not_cann: str

    def __init__(self) -> None: ...
    @staticmethod
    def open(which: str = "auto") -> Provider: ...
    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> FrozenSet[str]: ...
    @property
    def libraries(self) -> Dict[str, str]: ...
    @property
    def version(self) -> str: ...

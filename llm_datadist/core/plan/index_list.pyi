from typing import final

@final
class IndexList:
    def __init__(self) -> None: ...

from typing import Dict, Tuple, Type

from llm_datadist.status import LLMException, LLMStatusCode

STATUS_TABLE: Dict[int, Tuple[str, LLMStatusCode, LLMStatusCode, Type[LLMException]]]

def raise_for_status(status: int, what: str, text: str = "", v1: bool = False) -> None: ...
def public_code(status: int, v1: bool = False) -> LLMStatusCode: ...

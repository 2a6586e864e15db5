"""One rank."""
from types import SimpleNamespace


def get_tp_group():
    return SimpleNamespace(rank_in_group=0)

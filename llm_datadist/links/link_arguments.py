"""What ``link`` is asked for: the name of a communicator, its members, and the rank table that places them."""
from __future__ import annotations

from typing import Dict

from llm_datadist.links.rank_table import Member, parse_rank_table
from llm_datadist.status import LLMParamInvalidError
from llm_datadist.utils.utils import check_dict, check_isinstance, check_uint32, check_uint64

__all__ = ["check_link_arguments", "members_of"]

MAX_COMM_NAME = 128
MAX_MEMBERS = 4
MIN_MEMBERS = 2


def check_link_arguments(comm_name: str, cluster_rank_info: Dict[int, int], rank_table: str) -> None:
    """Check each argument of ``link`` by itself."""
    check_isinstance("comm_name", comm_name, str, allow_none=False)
    if not 0 < len(comm_name) < MAX_COMM_NAME:
        raise LLMParamInvalidError(
            f"comm_name has {len(comm_name)} characters; 1 to {MAX_COMM_NAME - 1} are allowed")
    check_dict("cluster_rank_info", cluster_rank_info, int, int)
    if len(cluster_rank_info) > MAX_MEMBERS:
        raise LLMParamInvalidError(f"cluster_rank_info has {len(cluster_rank_info)} members; {MAX_MEMBERS} at most")
    for cluster, rank in cluster_rank_info.items():
        check_uint64("cluster_rank_info key", cluster)
        check_uint32(f"cluster_rank_info[{cluster}]", rank)
    check_isinstance("rank_table", rank_table, str, allow_none=False)
    ranks = list(cluster_rank_info.values())
    if len(ranks) < MIN_MEMBERS or any(a >= b for a, b in zip(ranks, ranks[1:])):
        raise LLMParamInvalidError(f"cluster_rank_info={cluster_rank_info} is not allowed; "
                                   f"it must hold at least {MIN_MEMBERS} members with ascending ranks")


def members_of(cluster_rank_info: Dict[int, int], rank_table: str) -> Dict[int, Member]:
    """Return the members that the rank table describes, by rank; each that is named must be there."""
    members = parse_rank_table(rank_table)
    missing = sorted(set(cluster_rank_info.values()) - set(members))
    if missing:
        raise LLMParamInvalidError(f"rank_table has no device of rank {missing[0]}, which cluster_rank_info names")
    return members

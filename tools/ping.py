"""``llm-datadist ping``: whether a cluster answers at an address, in which mode, how soon it links and replies.

Makes an engine without memory, links to the cluster, asks for signs of life, and unlinks. Nothing is transferred.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

from llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMException, LLMRole, LLMStatusCode

_MODES = {False: "two-sided", True: "remote-accessible"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("cluster_id", type=_number(0), help="id of the cluster that listens there")
    parser.add_argument("address", type=_address, help="host:port; an IPv6 address in brackets")
    parser.add_argument("--count", type=_number(1), default=100, metavar="N", help="signs of life (default 100)")
    parser.add_argument("--timeout", type=_number(1), default=3000, metavar="MS",
                        help="limit for the link and for each sign of life, in ms (default 3000)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """Print what was found.

    Returns
    -------
    int
        0 when the cluster answered, 1 when not: the reason is on standard error.
    """
    for remote_accessible in _MODES:
        code, found = _try(args, remote_accessible)
        if code is not LLMStatusCode.LLM_PARAM_INVALID:         # the two sides do not disagree on the mode
            break
    if found is None:
        host, port = args.address
        print(f"cluster {args.cluster_id} at {host}:{port} is not reached: {code}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"cluster {found['cluster_id']} at {found['address']}: linked in {found['link_ms']:.1f} ms, "
              f"{found['mode']} mode")
        print(f"round trip of {found['count']}: min {found['min_us']:.0f}, median {found['median_us']:.0f}, "
              f"p99 {found['p99_us']:.0f}, max {found['max_us']:.0f} us")
    return 0


def _try(args: argparse.Namespace, remote_accessible: bool) -> tuple[LLMStatusCode, dict | None]:
    """Link in one mode and ask; the code of the link, and the findings where it was made."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = remote_accessible
    peer = LLMClusterInfo()
    peer.remote_cluster_id = args.cluster_id
    peer.append_local_ip_info("0.0.0.0", 0)
    peer.append_remote_ip_info(*args.address)
    with LLMDataDist(LLMRole.MIX, 2**63 + os.getpid()) as engine:
        engine.init(config.generate_options())
        start = time.perf_counter()
        code, _ = engine.link_clusters([peer], args.timeout)
        link_ms = (time.perf_counter() - start) * 1e3
        if code is not LLMStatusCode.LLM_SUCCESS:
            return code, None
        try:
            trips_us = sorted(engine.ping(args.cluster_id, args.timeout) * 1e6 for _ in range(args.count))
        except LLMException as error:
            print(error, file=sys.stderr)
            return error.status_code, None
        engine.unlink_clusters([peer], args.timeout)
    host, port = args.address
    return code, {
        "cluster_id": args.cluster_id, "address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "mode": _MODES[remote_accessible], "link_ms": link_ms, "count": args.count, "min_us": trips_us[0],
        "median_us": statistics.median(trips_us), "p99_us": trips_us[max(-(-99 * args.count // 100) - 1, 0)],
        "max_us": trips_us[-1],
    }


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not host:port, with digits for the port")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        LLMClusterInfo().append_remote_ip_info(host, int(port))
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return host, int(port)


def _number(low: int):
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() else -1
        if not low <= number < 2**64:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least {low}")
        return number

    return parse

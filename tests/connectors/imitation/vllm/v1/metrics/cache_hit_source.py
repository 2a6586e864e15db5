"""Where tokens came from."""
import enum


class CacheHitSource(str, enum.Enum):
    P2P = "external_p2p"

"""Tools that watch engines of this user on this host from outside: ``top``, ``leaks``, ``metrics`` and ``trace``."""

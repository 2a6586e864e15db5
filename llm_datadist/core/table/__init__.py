"""The caches of one engine: memory pool, keys, life of a cache, and the table as peers on this host read it."""

"""From lists of blocks to the descriptors of a transfer: no memory is touched here and nothing waits."""

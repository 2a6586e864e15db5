"""What the facade calls: the engine's life cycle, its links, its transfers, and layer-wise pushes."""

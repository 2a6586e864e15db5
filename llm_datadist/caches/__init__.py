"""What managers hand out and take: descriptors, keys, handles of caches, and views of their tensors."""

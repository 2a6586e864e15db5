"""The two cache managers, what they share, and layer-wise transfer tasks."""

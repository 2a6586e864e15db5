"""Links to peers: opening and accepting them, the service thread that answers, requests, and reading a peer's table."""

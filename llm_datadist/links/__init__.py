"""Linking engines: by cluster addresses, or by a rank table and a rendezvous."""

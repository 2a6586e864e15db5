"""What everything stands on: statuses, deadlines and locks, sockets, and the function table of the provider."""

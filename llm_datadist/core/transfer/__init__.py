"""Moving bytes: the steps of a pull or push, pulls in one exchange, batches, and copies within the process."""

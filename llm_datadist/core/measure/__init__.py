"""What only benchmarks use."""

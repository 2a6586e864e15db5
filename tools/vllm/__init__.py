"""vLLM with this package's connector: a demonstration, a benchmark, and what both of them need."""

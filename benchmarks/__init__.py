"""Benchmarks of safefreeze_kernels: `python -m benchmarks`, or `pytest benchmarks --benchmark-only`."""

"""Benchmarks by name, for tools/benchmark.py."""

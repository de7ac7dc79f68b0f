"""The pieces of tools/benchmarks/gpu.py, each run in a process of its own."""

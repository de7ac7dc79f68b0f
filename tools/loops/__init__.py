"""The parts of tools/loop_search.py."""

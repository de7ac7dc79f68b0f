"""Exact evaluation: every sample once."""

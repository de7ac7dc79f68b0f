"""Baselines that results are compared with."""

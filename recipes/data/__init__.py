"""Data sets: they know neither the trainer nor a recipe."""

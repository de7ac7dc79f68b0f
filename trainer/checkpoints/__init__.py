"""Checkpoints: their format, when and how they are written, which stay, and how a run resumes."""

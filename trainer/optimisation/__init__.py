"""Optimizers by name, learning-rate schedules, and steps whose gradient is not finite."""

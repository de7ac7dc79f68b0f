"""The training loop and what it needs; it knows no model and no data set."""

"""The objective (network and loss as one module), and evaluation in which every sample counts once."""

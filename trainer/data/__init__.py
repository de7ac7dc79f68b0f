"""The numbered stream of samples, its order, and the loader."""

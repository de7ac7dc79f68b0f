"""Networks: plain modules that know neither the trainer nor a recipe."""

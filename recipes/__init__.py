"""Training recipes: one file per guide, and the models, data sets and studies they plug together."""

"""Training recipes: one file per model; the networks, data sets, commands, baselines and experiments they use lie below."""

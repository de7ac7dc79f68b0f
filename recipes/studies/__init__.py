"""What a guide does beyond training one model: baselines, sweeps, pictures."""

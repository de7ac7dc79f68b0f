"""Processes: the launch, what they tell each other, hosts, signals, stopping, and what happens when one fails."""

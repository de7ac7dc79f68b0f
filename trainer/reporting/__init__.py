"""What people see of a run: console, metrics, trackers, plots, alerts, the run directory."""

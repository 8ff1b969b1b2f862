"""Models that a run starts from and that it leaves: open, export, inspect, sample."""

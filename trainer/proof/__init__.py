"""Complete runs of the miniature and what they prove: the demo, measurements against criteria, ablations."""

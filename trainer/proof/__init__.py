"""Whole runs of the miniature and what they show: demo, measurements against stated criteria, ablations."""

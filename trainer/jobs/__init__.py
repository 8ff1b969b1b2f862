"""Run one stage: plan it, check it, find its files, train, and report the result."""

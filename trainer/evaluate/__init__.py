"""Compare models: the same prompts and seeds, metrics against real clips, and a page that shows them side by
side.
"""

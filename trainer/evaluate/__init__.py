"""Several models at the same prompts and seeds, measured against real clips and shown side by side."""

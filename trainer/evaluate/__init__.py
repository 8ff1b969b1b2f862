"""What several models make of the same prompts and seeds, measured against real clips and shown side by side."""

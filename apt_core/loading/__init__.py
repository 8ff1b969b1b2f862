"""Networks from files and files from networks: checkpoints, and the parts of a pipeline."""

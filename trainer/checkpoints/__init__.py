"""Open the models that a run starts from and produces; export, inspect and sample them."""

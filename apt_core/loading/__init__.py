"""Networks from files and files from networks: the checkpoint contract, and what a pipeline is made of."""

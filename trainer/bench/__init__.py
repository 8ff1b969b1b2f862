"""What the engine and the trainer reach on this machine, beside what it could reach; with random weights of
the true shapes.
"""

"""Look inside the networks: what the generator's blocks hold (probe), how samples change between two noises
(walk), and where the discriminator looks (attention).
"""

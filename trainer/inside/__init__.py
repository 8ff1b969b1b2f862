"""A look inside: what the generator's blocks hold (probe), where samples go between two noises (walk), where
the discriminator looks (attention).
"""

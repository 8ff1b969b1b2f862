"""Sampling and decoding at speed within the memory that there is."""

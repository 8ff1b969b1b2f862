"""Processes, devices, and where weights and activations lie."""

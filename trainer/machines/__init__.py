"""Processes and devices, where weights and activations are stored, and what a run costs in memory and
time.
"""

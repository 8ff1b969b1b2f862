"""Measure the speed of the engine and the trainer on this machine, beside what the machine could reach.

The models have their true shapes and random weights.
"""

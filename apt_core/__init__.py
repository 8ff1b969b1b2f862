"""Adversarial Post-Training (APT, arXiv 2501.08316): the method as a plain torch library."""

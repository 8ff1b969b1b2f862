"""Training, sampling and measuring APT models: `python -m trainer COMMAND`."""

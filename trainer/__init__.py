"""Training, sampling and measuring APT models: `python -m trainer COMMAND`."""

import os

# Read when torch is loaded: else its C++ answers a lost connection with the addresses of all its callers.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

"""Training, sampling and measuring APT models: `python -m trainer COMMAND`."""

import os

# Must be set before torch is loaded. Otherwise its C++ prints a stack trace when a connection is lost.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

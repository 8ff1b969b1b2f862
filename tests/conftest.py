"""Two threads at most, and no network: everything that the tests need is in the repository."""

import os
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

CACHE = tempfile.TemporaryDirectory(prefix="apt-cache-")
os.environ["APT_CACHE"] = CACHE.name  # what pipelines keep for later

"""Two threads at most, one kind of terminal, and no network: everything that the tests need is in the
repository.
"""

import os
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# A pipe of 80 columns, whatever the terminal or the CI wants to see: typer and rich colour and break their
# lines by these.
for name in (
    "GITHUB_ACTIONS",
    "FORCE_COLOR",
    "PY_COLORS",
    "CLICOLOR_FORCE",
    "NO_COLOR",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "LINES",
):
    os.environ.pop(name, None)
os.environ |= {"COLUMNS": "80", "TERM": "dumb"}

CACHE = tempfile.TemporaryDirectory(prefix="apt-cache-")
os.environ["APT_CACHE"] = CACHE.name  # what pipelines keep for later

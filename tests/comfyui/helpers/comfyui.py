"""Start ComfyUI's library inside a helper process. Arguments: ComfyUI's folder, a scratch folder, the job as
JSON.
"""

import json
import logging
import os
import sys


class Complaints(logging.Handler):
    """Keeps what ComfyUI says about weights that it misses or does not know, which it only logs."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        line = record.getMessage()
        if any(word in line.lower() for word in ("missing", "unexpected", "leftover")):
            self.lines.append(line)


def start() -> tuple[dict, Complaints]:
    """The job's paths by name and the log's complaints; from then on `import comfy...` works."""
    _, folder, scratch, job = sys.argv
    os.makedirs(scratch, exist_ok=True)
    sys.path.insert(0, folder)
    sys.argv = ["comfyui", "--cpu", "--base-directory", scratch]
    import comfy.options

    comfy.options.enable_args_parsing()
    complaints = Complaints()
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger().addHandler(complaints)
    return json.loads(job), complaints

"""Load the custom node folder `pack` with ComfyUI's own loader, after stock nodes, and print what that said,
found and took.
"""

import asyncio
import contextlib
import io
import json
import logging
import time
from pathlib import Path

from comfyui import start

paths, _ = start()


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


import folder_paths

import nodes

asyncio.run(nodes.init_builtin_extra_nodes())
warnings = Warnings()
logging.getLogger().addHandler(warnings)
before = set(nodes.NODE_CLASS_MAPPINGS)
saved_to = {
    kind: folder_paths.get_folder_paths(kind)[0] for kind in ("diffusion_models", "vae", "text_encoders")
}
printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    # Seconds of this process, for a busy machine would count in those of the clock.
    began = time.process_time()
    loaded = asyncio.run(nodes.load_custom_node(paths["pack"]))
    seconds = time.process_time() - began
result = {
    "loaded": loaded,
    "warnings": warnings.lines,
    "printed": printed.getvalue(),
    "nodes": sorted(set(nodes.NODE_CLASS_MAPPINGS) - before),
    "seconds": seconds,
    "listed": {
        kind: [name for name in folder_paths.get_filename_list(kind) if "apt" in name]
        for kind in ("diffusion_models", "vae")
    },
    "saved to the same place": saved_to
    == {kind: folder_paths.get_folder_paths(kind)[0] for kind in saved_to},
    "models/apt": {
        path.rpartition("/")[2]: Path(path).is_dir() for path in folder_paths.get_folder_paths("apt")
    },
}
print(json.dumps(result))

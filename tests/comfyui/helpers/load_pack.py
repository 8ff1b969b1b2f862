"""Load the custom node folder `pack` with ComfyUI's own loader and print what that said and found."""

import asyncio
import json
import logging

from comfyui import start

paths, _ = start()


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


import nodes

warnings = Warnings()
logging.getLogger().addHandler(warnings)
before = set(nodes.NODE_CLASS_MAPPINGS)
loaded = asyncio.run(nodes.load_custom_node(paths["pack"]))
added = sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)
print(json.dumps({"loaded": loaded, "warnings": warnings.lines, "nodes": added}))

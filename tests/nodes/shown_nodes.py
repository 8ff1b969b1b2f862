"""What ComfyUI says of the pack's nodes, from the snapshot of its /object_info."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALL_NODES = json.loads((ROOT / "tests/workflows/object_info.json").read_text(encoding="utf-8"))
NODES = {name: info for name, info in ALL_NODES.items() if name.startswith("APT")}

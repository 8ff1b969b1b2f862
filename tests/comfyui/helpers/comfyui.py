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


def one_step(patcher, paths: dict) -> None:
    """KSampler's own function for one step of a loaded model, from `inputs` (noise, text) into `out`."""
    import comfy.sample
    import torch
    from safetensors.torch import load_file, save_file

    inputs = load_file(paths["inputs"])
    cond = [[inputs["text"], {}]]
    sample = comfy.sample.sample(
        patcher,
        inputs["noise"],
        1,
        1.0,
        "euler",
        "simple",
        cond,
        cond,
        torch.zeros_like(inputs["noise"]),
        denoise=1.0,
        seed=0,
    )
    save_file({"latents": sample.float().contiguous()}, paths["out"])

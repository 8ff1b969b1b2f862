"""Load APT Checkpoint on every file in `files`: what it says, what it makes, and one step of each good one
into `out`.
"""

import json
import logging
import os

from comfyui import start

paths, _ = start()

import comfy.model_management
import comfy.sd
import torch
from apt_nodes import load_nodes, offer, sentence, show_on_nodes
from comfy_extras.nodes_model_merging import ModelMergeSimple
from safetensors.torch import load_file, save_file

apt = load_nodes(paths["pack"])
offer(paths["files"], "diffusion_models")
names = sorted(os.listdir(paths["files"]))
cond = [[load_file(paths["inputs"])["text"], {}]]


class Warnings(logging.Handler):
    lines = []

    def emit(self, record):
        if record.levelno == logging.WARNING:
            self.lines.append(record.getMessage())


logging.getLogger().addHandler(Warnings())
on_node = show_on_nodes(apt)


def sample(model) -> torch.Tensor:
    return apt.APTSampler.execute(model, cond, {"samples": torch.zeros(1, 16, 2, 6, 4)}, 0, 1).args[0][
        "samples"
    ]


def dtype_of_weights(model) -> str:
    return str(model.model.diffusion_model.blocks[0].ffn[0].weight.dtype)


def load(name: str, weight_dtype: str = "default"):
    return apt.APTLoadCheckpoint.execute(name, weight_dtype).args[0]


with torch.inference_mode():
    sentences, shown, logged, latents = {}, {}, {}, {}
    for name in names:
        Warnings.lines = []
        on_node.clear()
        said = sentence(lambda: latents.update({name: apt.APTLoadCheckpoint.execute(name, "default")}))
        if name not in latents:
            sentences[name] = said.replace(paths["files"] + os.sep, "")
            continue
        output = latents[name]
        latents[name] = sample(output.args[0])
        shown[name], logged[name] = output.ui and [output.ui.as_dict()["text"][0], *on_node], Warnings.lines
    model = load("fp32.safetensors")
    for weight_dtype in ("bf16", "fp16", "fp8_e4m3fn"):
        latents[f"as {weight_dtype}"] = sample(load("fp32.safetensors", weight_dtype))
    latents["mix"] = sample(ModelMergeSimple().merge(model, load("another.safetensors"), 0.25)[0])
    again, arguments = model.cached_patcher_init
    clones = [again(*arguments), again(*arguments, disable_dynamic=True)]
    latents |= {f"clone {i}": sample(clone) for i, clone in enumerate(clones)}
    save_file({name: value.contiguous() for name, value in latents.items()}, paths["out"])

    # As on a card that can do both; ComfyUI itself prefers fp16.
    comfy.model_management.should_use_fp16 = comfy.model_management.should_use_bf16 = lambda *_, **__: True
    files = [f"{dtype}.safetensors" for dtype in ("fp32", "bf16", "fp16")]
    result = {
        "sentences": sentences,
        "shown": shown,
        "logged": logged,
        "attachments": [clone.get_attachment("apt") for clone in (model, *clones)],
        "held": {name: dtype_of_weights(load(name)) for name in files},
        "chosen": {
            choice: dtype_of_weights(load("fp32.safetensors", choice))
            for choice in ("bf16", "fp16", "fp8_e4m3fn")
        },
        "stock": dtype_of_weights(
            comfy.sd.load_diffusion_model(os.path.join(paths["files"], "bf16.safetensors"))
        ),
        "not there": sentence(load, "nowhere.safetensors"),
        "listed": apt.APTLoadCheckpoint.GET_NODE_INFO_V1()["input"]["required"]["checkpoint"][1],
    }
print(json.dumps(result))

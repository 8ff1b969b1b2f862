"""Print names and shapes of ComfyUI's own Wan modules, built on the meta device at their released (or small)
sizes.
"""

import json

from comfyui import start

start()

import comfy.ops
import torch
from comfy.ldm.wan.model import WanModel
from comfy.ldm.wan.vae import WanVAE
from comfy.ldm.wan.vae2_2 import WanVAE as WanVAE22

fixed = dict(dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True])
with torch.device("meta"):
    models = {
        "t2v": WanModel(dim=256, num_heads=2, num_layers=2, ffn_dim=64, operations=comfy.ops.manual_cast),
        "i2v": WanModel(
            "i2v",
            dim=256,
            num_heads=2,
            num_layers=2,
            ffn_dim=64,
            in_dim=36,
            flf_pos_embed_token_number=514,
            operations=comfy.ops.manual_cast,
        ),
        "vae 2.1": WanVAE(dim=96, z_dim=16, **fixed),
        "vae 2.2": WanVAE22(dim=160, z_dim=48, **fixed),
    }
print(
    json.dumps(
        {
            name: {key: list(value.shape) for key, value in model.state_dict().items()}
            for name, model in models.items()
        }
    )
)

"""Generator and discriminator as LoRAs on ONE frozen base, and the generator's saved for ComfyUI. `python
examples/lora_on_one_base.py [FOLDER]`
"""

import sys
from pathlib import Path

import torch

from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.sources import SHIPPED
from apt_core.method.discriminator import Discriminator
from apt_core.method.objectives import Objective, generator_backward
from apt_core.method.optim import make_rmsprop
from apt_core.models.lora import add_adapters, role, save_lora

out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out")
torch.manual_seed(0)
base = load_transformer(SHIPPED["base"]).requires_grad_(False)
add_adapters(base, ["generator", "discriminator"], rank=4)
generator = role(base, "generator")  # called like the model; its parameters are its own adapters
discriminator = Discriminator(role(base, "discriminator"))
optimizer = make_rmsprop(generator.parameters(), lr=1e-4)

z, text = torch.randn(4, 16, 1, 6, 6), torch.randn(4, 32, 96)
for _ in range(3):
    metrics = generator_backward(generator, discriminator, Objective(), z, text, torch.rand(4))
    optimizer.step()
    optimizer.zero_grad()
    print(f"G {metrics['g_loss']:.4f}")

out.mkdir(parents=True, exist_ok=True)
save_lora(
    out / "apt-lora.safetensors", base, "generator", {"kind": "lora", "base": "mini", "second_time": 0.7}
)
print(f"Load LoRA opens {out / 'apt-lora.safetensors'}")

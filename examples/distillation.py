"""Stage 1 by hand (3.2 of the paper): consistency distillation of a guided teacher, on one batch. `python
examples/distillation.py`

`trainer/stages/distill.py` is the same loop with real data, fresh noise and times, many processes, states and
logs.
"""

import copy

import torch

from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.sources import SHIPPED
from apt_core.method.consistency import ConsistencySettings, consistency_backward
from apt_core.method.ema import Ema

torch.manual_seed(0)
teacher = load_transformer(SHIPPED["base"]).requires_grad_(False)
student, target = load_transformer(SHIPPED["base"]), copy.deepcopy(teacher)
following = Ema(student, decay=0.95)  # what the target network holds
# the paper has a guidance of 7.5 and leaves the steps open
settings = ConsistencySettings(steps=12, guidance=2.0)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

x, z, text, negative = (
    torch.randn(8, 16, 1, 6, 6),
    torch.randn(8, 16, 1, 6, 6),
    torch.randn(8, 32, 96),
    torch.zeros(1, 32, 96),
)
for update in range(10):
    metrics = consistency_backward(
        student, teacher, settings, x, z, text, negative, u=(torch.arange(8) + 0.5) / 8, target=target
    )
    optimizer.step()
    optimizer.zero_grad()
    following.update(student)
    following.copy_to(target)
    print(f"update {update + 1}: {metrics['cd_loss']:.4f}")

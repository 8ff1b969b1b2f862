"""Stage 2 by hand (3.3 to 3.5 of the paper), on the miniature: ten updates of both networks. `python
examples/adversarial_training.py`

`trainer/stages/adversarial.py` is the same loop with real data, many processes, states and logs.
"""

import torch

from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.sources import SHIPPED
from apt_core.method.discriminator import Discriminator
from apt_core.method.ema import Ema
from apt_core.method.flow import shift
from apt_core.method.generator import one_step
from apt_core.method.objectives import Objective, discriminator_backward, generator_backward
from apt_core.method.optim import make_rmsprop

torch.manual_seed(0)
generator = load_transformer(SHIPPED["base"])
# the whole backbone, heads after 4/9, 13/18 and all of its blocks
discriminator = Discriminator(load_transformer(SHIPPED["base"]))
objective = Objective(r1_weight=100.0, r1_sigma=0.2)
optimizers = make_rmsprop(generator.parameters(), lr=1e-5), make_rmsprop(discriminator.parameters(), lr=3e-5)
average = Ema(generator, decay=0.9)

real = torch.randn(8, 16, 1, 6, 6)  # clean latents; here noise stands in for them
text = torch.randn(8, 32, 96)
for update in range(10):
    t = shift(torch.rand(8), 1.0)  # eq. 6 and 7: one time a sample, s = 1 for images
    with torch.no_grad():
        fake = one_step(generator, torch.randn_like(real), text)
    of_d = discriminator_backward(
        discriminator, objective, real, fake, text, t, real_noise=torch.randn_like(real)
    )
    optimizers[1].step()
    optimizers[1].zero_grad()

    of_g = generator_backward(
        generator, discriminator, objective, torch.randn_like(real), text, shift(torch.rand(8), 1.0)
    )
    optimizers[0].step()
    optimizers[0].zero_grad()
    average.update(generator)
    print(
        f"update {update + 1}: D {of_d['d_adversarial']:.3f} + aR1 {of_d['r1_loss']:.3f}, "
        f"real right {of_d['right_real']:.2f}, G {of_g['g_loss']:.3f}"
    )

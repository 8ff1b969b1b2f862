"""Linear layers in 8 bits: weights and inputs in float8 e4m3, products on the card's fp8 matrix units, sums
in fp32.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ..errors import AptError
from ..models.backbone import as_backbone

FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max  # 448
STEP = 16  # the fp8 units need a layer's sides to be multiples of this


_scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - it has no public name


def quantise(x: Tensor, rowwise: bool = True) -> tuple[Tensor, Tensor]:
    """Turn `x` [n, m] into (fp8 [n, m], scale fp32 [n, 1], or [] when one scale serves all), so that
    `fp8 * scale` differs from x by less than a 16th of each value.
    """
    largest = x.abs().amax(1, keepdim=True) if rowwise else x.abs().amax()
    scale = largest.float().clamp(min=1e-12) / MOST
    return (x.float() / scale).clamp(-MOST, MOST).to(FP8), scale


class Fp8Linear(nn.Module):
    """Computes the same as an nn.Linear, with its weight in fp8; the input is converted to fp8 for the
    product.

    rowwise: one scale for each token and each output channel; otherwise one for each tensor, as older cards
    need.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, rowwise: bool = True) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight.detach(), rowwise)
        self.in_features, self.out_features, self.rowwise = linear.in_features, linear.out_features, rowwise
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous() if rowwise else scale)  # [1, out]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out] in the dtype of x."""
        rows, scale = quantise(x.reshape(-1, self.in_features), self.rowwise)
        # the only dtype that every build of torch supports with row scales
        out = torch.bfloat16 if x.is_cuda and self.rowwise else x.dtype
        # the fp8 units only add a bias to 16-bit results
        bias = self.bias if out == x.dtype == torch.bfloat16 else None
        y = _scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=bias,
            out_dtype=out,
            use_fast_accum=x.is_cuda,
        )
        y = y.to(x.dtype)
        y = y if bias is not None or self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def check_fp8(device: torch.device) -> bool:
    """Whether `device` supports a scale for each row. Raises AptError for a card without fp8 units. A CPU
    computes it too, slowly.
    """
    if device.type == "cpu":
        return _rows_on_a_cpu()
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise AptError(f"{name} has no fp8 matrix units (Ada, Hopper and Blackwell have): leave fp8 out.")
    return torch.cuda.get_device_capability(device)[0] in (9, 10)  # Hopper, data centres' Blackwell


def _rows_on_a_cpu() -> bool:
    """Whether this version of torch can do it on a CPU; newer ones can."""
    x, scale = torch.zeros(STEP, STEP, dtype=FP8), torch.ones(STEP, 1)
    try:
        _scaled_mm(x, x.t(), scale_a=scale, scale_b=scale.t().contiguous(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def to_fp8(model: nn.Module, rowwise: bool = True, device: torch.device | None = None) -> nn.Module:
    """Replace each linear layer of the blocks by an Fp8Linear, except those of the time, which see only one
    row; return the model.

    device: where the new layers go; None means where the old ones are. The wide weights move there one by
    one.
    """
    blocks = as_backbone(model).blocks
    names = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        linear = cast(nn.Linear, blocks.get_submodule(name))
        if "modulation" not in name and linear.in_features % STEP == 0 and linear.out_features % STEP == 0:
            blocks.set_submodule(name, Fp8Linear(linear.to(device), rowwise))
    return model

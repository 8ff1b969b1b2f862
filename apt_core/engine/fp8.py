"""Linear layers in 8 bits: weights and inputs in float8 e4m3, products by the card's fp8 matrix units, sums
in fp32.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ..errors import AptError
from ..models.backbone import as_backbone

FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max  # 448
STEP = 16  # what the fp8 units want a layer's sides to be multiples of


_scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - it has no public name


def quantise(x: Tensor, rowwise: bool = True) -> tuple[Tensor, Tensor]:
    """`x` [n, m] as (fp8 [n, m], scale fp32 [n, 1], or [] for one scale for all), so that `fp8 * scale` is x
    within a 16th of each value.
    """
    largest = x.abs().amax(1, keepdim=True) if rowwise else x.abs().amax()
    scale = largest.float().clamp(min=1e-12) / MOST
    return (x.float() / scale).clamp(-MOST, MOST).to(FP8), scale


class Fp8Linear(nn.Module):
    """What an nn.Linear computes, with its weight in fp8 and its input turned to fp8 on the way.

    rowwise: a scale for each token and each output channel, else one for each tensor, which older cards want.
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
        # all that every build of torch has for rows
        out = torch.bfloat16 if x.is_cuda and self.rowwise else x.dtype
        # the fp8 units add a bias to 16 bits only
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
    """Whether `device` takes a scale for each row. Raises AptError for a card without fp8 units; a CPU
    computes it all the same, slowly.
    """
    if device.type == "cpu":
        return _rows_on_a_cpu()
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise AptError(f"{name} has no fp8 matrix units (Ada, Hopper and Blackwell have): leave fp8 away.")
    return torch.cuda.get_device_capability(device)[0] in (9, 10)  # Hopper, data centres' Blackwell


def _rows_on_a_cpu() -> bool:
    """Newer versions of torch have that."""
    x, scale = torch.zeros(STEP, STEP, dtype=FP8), torch.ones(STEP, 1)
    try:
        _scaled_mm(x, x.t(), scale_a=scale, scale_b=scale.t().contiguous(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def to_fp8(model: nn.Module, rowwise: bool = True, device: torch.device | None = None) -> nn.Module:
    """Puts an Fp8Linear in the place of each linear layer of the blocks, except those of time, which see one
    row; returns the model.

    device: where the new layers are to be, None: where the old ones are. The wide weights go there one by
    one.
    """
    blocks = as_backbone(model).blocks
    names = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        linear = cast(nn.Linear, blocks.get_submodule(name))
        if "modulation" not in name and linear.in_features % STEP == 0 and linear.out_features % STEP == 0:
            blocks.set_submodule(name, Fp8Linear(linear.to(device), rowwise))
    return model

"""Latents to one row per token and back: the input of a patch embedding and the output of an output head."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor


def to_patches(latents: Tensor, patch: Sequence[int]) -> Tensor:
    """Latents [B, C, F, H, W] to the values of each token, [B, S, C * patch volume], with tokens in the order
    (frame, row, column).
    """
    pf, ph, pw = patch
    return rearrange(latents, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)


def from_patches(
    patches: Tensor, patch: Sequence[int], shape: Sequence[int], *, channels_last: bool = False
) -> Tensor:
    """The inverse of `to_patches`; shape: (F, H, W) of the latents.

    channels_last: the values of a token are in the order (position in the patch, channel), as in Wan's head.
    """
    (f, h, w), (pf, ph, pw) = (n // p for n, p in zip(shape, patch)), patch
    token = "(pf ph pw c)" if channels_last else "(c pf ph pw)"
    return rearrange(
        patches,
        f"b (f h w) {token} -> b c (f pf) (h ph) (w pw)",
        f=f,
        h=h,
        w=w,
        pf=pf,
        ph=ph,
        pw=pw,
    )

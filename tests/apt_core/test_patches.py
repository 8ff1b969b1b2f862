"""Latents as tokens: the order of tokens, and of what belongs to each."""

import pytest
import torch

from apt_core.models.patches import from_patches, to_patches


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 3, 1)])
def test_each_value_is_where_it_belongs(patch):
    (pf, ph, pw), (f, h, w), c = patch, (2, 3, 2), 4
    x = torch.arange(2.0 * c * f * pf * h * ph * w * pw).reshape(2, c, f * pf, h * ph, w * pw)
    patches = to_patches(x, patch)
    assert patches.shape == (2, f * h * w, c * pf * ph * pw)
    for i, j, k in [(0, 0, 0), (1, 0, 1), (1, 2, 0), (0, 1, 1)]:
        piece = x[:, :, i * pf : (i + 1) * pf, j * ph : (j + 1) * ph, k * pw : (k + 1) * pw]
        assert torch.equal(patches[:, (i * h + j) * w + k], piece.flatten(1))
    assert torch.equal(from_patches(patches, patch, x.shape[2:]), x)
    last = patches.unflatten(2, (c, -1)).transpose(2, 3).flatten(2)  # [pf ph pw, C]
    assert torch.equal(from_patches(last, patch, x.shape[2:], channels_last=True), x)


def test_a_compiler_takes_them_whole():
    x = torch.randn(1, 2, 2, 4, 4)
    there = torch.compile(to_patches, backend="eager", fullgraph=True)
    back = torch.compile(from_patches, backend="eager", fullgraph=True)
    assert torch.equal(back(there(x, (1, 2, 2)), (1, 2, 2), x.shape[2:]), x)

"""The public tiny decoders taew2_1 and taew2_2 (madebyollin/taehv): a fast, approximate stand-in for the Wan
VAE's decoder.

The pictures are close to the VAE's but not equal: use it for previews, and where speed matters more than
detail. It takes the same normalised latents, of 16 channels (Wan 2.1) or 48 (Wan 2.2).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AptError
from ..files.tensorfile import Header, check_floats, check_shapes, read_header, read_tensors

WIDTHS = 256, 128, 64
STEPS = 1, 2, 2
"""How many frames each of the three stages makes of one. The first frames of the clip are dropped, so that 1,
2, 3, ... latent frames give 1, 5, 9, ... frames.
"""
NAMES = {16: "taew2_1", 48: "taew2_2"}


def load_tiny_decoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> "TinyDecoder":
    """Read taew2_1 or taew2_2 from a safetensors file. The shapes tell which one it is, and an encoder in the
    file is ignored.

    Raises AptError for anything else: see `tensorfile.read_tensors` (a .pth file is a pickle); missing, extra
    or wrongly shaped keys.
    """
    model = read_tiny_decoder(path)
    tensors, _ = read_tensors(path)
    model.load_state_dict(
        {key: tensors[key].to(device, dtype, copy=True) for key in model.state_dict()}, assign=True
    )
    model.eval().requires_grad_(False)
    # torch's type stubs lack this form of `to`.
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def read_tiny_decoder(path: str | Path) -> "TinyDecoder":
    """The decoder on device "meta": makes all checks of `load_tiny_decoder` and reads no weight."""
    header = read_header(path)
    if other := other_tiny_decoder(header):
        raise AptError(
            f"{path} is {other}, and only the layers of taew2_1 and taew2_2 can be read: "
            "give one of these, or the VAE."
        )
    if not is_tiny_decoder(header):
        raise AptError(
            f"{path} is not a tiny decoder for Wan: give taew2_1.safetensors (16 latent channels) or "
            "taew2_2.safetensors (48)."
        )
    check_floats(path, header)
    z_dim = header.shapes["decoder.1.weight"][1]
    with torch.device("meta"):
        model = TinyDecoder(z_dim)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    check_shapes(
        path,
        {key: shape for key, shape in header.shapes.items() if not key.startswith("encoder.")},
        expected,
        NAMES[z_dim],
    )
    return model


def is_tiny_decoder(header: Header) -> bool:
    """Whether the file looks like a tiny decoder for Wan."""
    first = header.shapes.get("decoder.1.weight", ())
    return len(first) == 4 and first[1] in NAMES


def other_tiny_decoder(header: Header) -> str:
    """The name of a tiny decoder with another layout, told from its widths and kernels; "" for taew2_1 and
    taew2_2 and for any other file.
    """
    first = header.shapes.get("decoder.1.weight", ())
    if len(first) != 4:
        return ""
    depthwise = any(shape[1:] == (1, 7, 7) for shape in header.shapes.values() if len(shape) == 4)
    if depthwise or (first[0] != WIDTHS[0] and first[1] in NAMES):
        name = "taew2_2_super" if first[0] == 2 * WIDTHS[0] and first[1] == 48 else "another tiny decoder"
        return f"{name} (width {first[0]}{', 7x7 depthwise convolutions' if depthwise else ''})"
    return ""


class TinyDecoder(nn.Module):
    """The interface of `decoder.Decoder`, with approximate pictures and one latent frame per call. The
    parameters have the names of the public files.
    """

    approximate = True

    def __init__(self, z_dim: int):
        super().__init__()
        self.z_dim, self.patch = z_dim, 2 if z_dim == 48 else 1
        self.steps_taken: list[str] = []
        layers = [Squash(), nn.Conv2d(z_dim, WIDTHS[0], 3, padding=1), nn.ReLU()]
        for width, steps, after in zip(WIDTHS, STEPS, (*WIDTHS[1:], WIDTHS[-1])):
            layers += [Past(width) for _ in range(3)]
            layers += [
                nn.Upsample(scale_factor=2),
                Grow(width, steps),
                nn.Conv2d(width, after, 3, padding=1, bias=False),
            ]
        self.decoder = nn.Sequential(
            *layers, nn.ReLU(), nn.Conv2d(WIDTHS[-1], 3 * self.patch**2, 3, padding=1)
        )

    @torch.inference_mode()
    def stream(
        self, latents: Tensor, *, uint8: bool = False, report: Callable[[str], None] | None = None
    ) -> Iterator[Tensor]:
        """Normalised latents `[B, z, f, h, w]` -> slices `[B, n, H, W, 3]` in time order, first of 1 frame
        and then of 4 frames: fp32 in [-1, 1], or uint8.

        Raises AptError for latents with another number of channels.
        """
        if latents.ndim != 5 or latents.shape[1] != self.z_dim or not latents.numel():
            wanted = f"[batch, {self.z_dim}, frames, height, width]"
            raise AptError(
                f"latents of shape {list(latents.shape)} are not {NAMES[self.z_dim]}'s: give {wanted}."
            )
        weight = cast(nn.Conv2d, self.decoder[1]).weight
        past: dict[int, Tensor] = {}
        for i, frame in enumerate(latents.to(weight).unbind(2)):
            frame = frame.contiguous(memory_format=torch.channels_last)
            for index, layer in enumerate(self.decoder):
                frame = layer(frame, past, index, len(latents)) if isinstance(layer, Past) else layer(frame)
            pixels = (
                F.pixel_shuffle(frame, self.patch)
                .unflatten(0, (len(latents), -1))
                .movedim(2, -1)
                .float()
                .clamp_(0, 1)
            )
            pixels = pixels[:, -1:] if i == 0 else pixels
            yield pixels.mul_(255).round_().to(torch.uint8) if uint8 else pixels.mul_(2).sub_(1)

    def decode(self, latents: Tensor, *, uint8: bool = False) -> Tensor:
        """All slices of `stream` concatenated: `[B, 4(f-1)+1, H, W, 3]`."""
        return torch.cat(list(self.stream(latents, uint8=uint8)), dim=1)


class Squash(nn.Module):
    """Limits latents smoothly to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Past(nn.Module):
    """A residual block that also sees the previous frame; before the first frame it sees zeros."""

    def __init__(self, width: int):
        super().__init__()
        convs = [nn.Conv2d(inputs, width, 3, padding=1) for inputs in (2 * width, width, width)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor, past: dict[int, Tensor], index: int, clips: int) -> Tensor:
        """x: frames `[clips n, C, h, w]`, clip after clip. past[index] holds the last frame of each clip:
        that of the previous call on entry, that of this call on return.
        """
        frames = x.unflatten(0, (clips, -1))
        before = past.get(index, torch.zeros_like(frames[:, -1:]))
        past[index] = frames[:, -1:]
        before = torch.cat((before, frames[:, :-1]), dim=1).flatten(0, 1)
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class Grow(nn.Module):
    """Makes `steps` frames of each frame."""

    def __init__(self, width: int, steps: int):
        super().__init__()
        self.steps = steps
        self.conv = nn.Conv2d(width, width * steps, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.steps, -1)).flatten(0, 1)

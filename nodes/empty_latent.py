"""Empty APT Latent: latents of sizes that the model supports."""

import torch
from comfy import model_management
from comfy_api.latest import io

from nodes import MAX_RESOLUTION

from ..apt_core.errors import AptError
from .wan_model import WanModel, read_model
from .warn import warn

NAME = "Empty APT Latent"
NATIVE, IMAGE, VIDEO, CUSTOM = "native", "image 1024", "video 1280x720, 2 s", "custom"


class APTEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sides = dict(min=16, max=MAX_RESOLUTION, step=16)
        custom = [
            io.Int.Input(
                "width",
                default=832,
                **sides,
                tooltip="Pixels, in steps of 16 (Wan 2.1) or 32 (Wan 2.2 5B). Starts at the model's own.",
            ),
            io.Int.Input(
                "height",
                default=480,
                **sides,
                tooltip="Pixels, in steps of 16 (Wan 2.1) or 32 (Wan 2.2 5B). Starts at the model's own.",
            ),
            io.Int.Input(
                "frames",
                default=49,
                min=1,
                max=MAX_RESOLUTION,
                step=4,
                tooltip="4n + 1: 1 for an image, 49 for 2 s at 24 fps. Starts at the model's own.",
            ),
        ]
        return io.Schema(
            node_id="APTEmptyLatent",
            display_name=NAME,
            category="APT",
            description=(
                "Empty latents in a size that the model takes, for APT One-Step Sampler or any stock "
                "sampler, and the model's frame rate."
            ),
            search_aliases=["empty latent", "latent size", "empty wan latent", "resolution", "apt"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model to make latents for: its channels, strides, "
                        "native size and frame rate count."
                    ),
                ),
                io.DynamicCombo.Input(
                    "size",
                    options=[io.DynamicCombo.Option(key, []) for key in (NATIVE, IMAGE, VIDEO)]
                    + [io.DynamicCombo.Option(CUSTOM, custom)],
                    tooltip=(
                        "Default native, the size that the model was trained for. image 1024: "
                        "one frame of 1024x1024. video 1280x720, 2 s: 1280x704 on Wan 2.2 5B, 49 frames at "
                        "24 fps. custom: width, height and frames, which start at the native ones."
                    ),
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many clips or images to make at once. Default 1.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="Zeros, [batch, channels, latent frames, height, width]."),
                io.Float.Output(
                    "fps",
                    display_name="fps",
                    tooltip=(
                        "The frame rate that the model was trained for, for the node that makes the video."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, size: dict | None = None, batch_size: int = 1) -> io.NodeOutput:
        if size is None:  # ComfyUI's value for an unknown key
            raise AptError(
                f"{NAME}: the size is not one of those in the list: "
                f"choose {NATIVE}, {IMAGE}, {VIDEO} or {CUSTOM}."
            )
        wan = read_model(NAME, model)
        width, height, frames = _check(wan, *_pixels(wan, size))
        shape = (
            batch_size,
            wan.channels,
            (frames - 1) // wan.temporal + 1,
            height // wan.spatial,
            width // wan.spatial,
        )
        # With these two ratios stock nodes can fit the latents to a model of another stride, as they do with
        # stock empty latents.
        latent = {
            "samples": torch.zeros(shape, device=model_management.intermediate_device()),
            "downscale_ratio_spacial": wan.spatial,
            "downscale_ratio_temporal": wan.temporal,
        }
        warnings = []
        if wan.guessed and size["size"] == NATIVE:
            warnings = [
                f"The native size is a guess, {width}x{height} with {frames} frames: "
                "the model's file does not say. Choose custom for another."
            ]
        return io.NodeOutput(latent, float(wan.native["fps"]), ui=warn(NAME, cls.hidden, warnings))


def _pixels(wan: WanModel, size: dict) -> tuple[int, int, int]:
    if size["size"] == CUSTOM:
        return size["width"], size["height"], size["frames"]
    if size["size"] == IMAGE:
        return 1024, 1024, 1
    if size["size"] == VIDEO:
        return 1280, 720 // wan.multiple * wan.multiple, _near(2 * wan.native["fps"], wan.temporal, 1)
    return wan.native["width"], wan.native["height"], wan.native["frames"]


def _check(wan: WanModel, width: int, height: int, frames: int) -> tuple[int, int, int]:
    right = _near(width, wan.multiple), _near(height, wan.multiple), _near(frames, wan.temporal, 1)
    if right != (width, height, frames):
        raise AptError(
            f"{NAME}: {width}x{height} with {frames} frames does not fit this model, "
            f"which takes sides in steps of {wan.multiple} pixels "
            f"and {wan.temporal}n + 1 frames: {right[0]}x{right[1]} with {right[2]} frames is nearest."
        )
    return right


def _near(value: float, step: int, offset: int = 0) -> int:
    """The nearest positive `step * n + offset`."""
    return max(round((value - offset) / step), 0 if offset else 1) * step + offset

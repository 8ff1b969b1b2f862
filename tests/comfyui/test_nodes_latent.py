"""Empty APT Latent in a real ComfyUI: sizes from the model, and the nearest right ones for wrong ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import save_plain

from apt_core.loading.checkpoint import save_generator
from apt_core.models.wan import WanBackbone

PACK = Path(__file__).parents[2]
NAME = "Empty APT Latent:"


@pytest.fixture(scope="module")
def result(comfyui, tmp_path_factory):
    files = tmp_path_factory.mktemp("latents") / "files"
    small = dict(
        num_attention_heads=1, attention_head_dim=128, text_dim=20, freq_dim=32, ffn_dim=16, num_layers=1
    )
    for name, channels, native in (
        ("wan 2.1", 16, {}),
        ("wan 2.2", 48, {}),
        ("trained", 48, {"native": {"width": 640, "height": 352, "frames": 25, "fps": 12.0}}),
    ):
        model = WanBackbone(in_channels=channels, out_channels=channels, **small)
        save_generator(files / f"{name}.safetensors", model, model.config, native)
        if not native:
            save_plain(files / f"{name}.safetensors", files / f"{name}.safetensors")
    # The shape by which one knows Wan's own.
    model = WanBackbone(**small | {"text_dim": 4096, "freq_dim": 256})
    save_generator(files / "released.safetensors", model, model.config, {})
    save_plain(files / "released.safetensors", files / "released.safetensors")
    apt = {"format": 1, "kind": "lora", "native": {"width": 320, "height": 192, "frames": 49, "fps": 24}}
    lora = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (2, 128)), ("B", (128, 2)))
    }
    save_file(lora, files / "lora.safetensors", {"apt": json.dumps(apt)})
    return comfyui("empty_latents", pack=PACK, files=files)


def test_sizes_come_from_the_model(result):
    # native, image 1024, video 1280x720 2 s; then frames per second, pixels and frames to a latent.
    expected = {
        "wan 2.1": ([[1, 16, 21, 60, 104], [1, 16, 1, 128, 128], [1, 16, 9, 90, 160]], 16.0, 8),
        "wan 2.2": ([[1, 48, 31, 44, 80], [1, 48, 1, 64, 64], [1, 48, 13, 44, 80]], 24.0, 16),
        "trained": ([[1, 48, 7, 22, 40], [1, 48, 1, 64, 64], [1, 48, 7, 44, 80]], 12.0, 16),
        "mini": ([[1, 16, 3, 6, 6], [1, 16, 1, 128, 128], [1, 16, 5, 90, 160]], 8.0, 8),
        "released": ([[1, 16, 21, 60, 104], [1, 16, 1, 128, 128], [1, 16, 9, 90, 160]], 16.0, 8),
        "wan 2.1 with LoRA": ([[1, 16, 13, 24, 40], [1, 16, 1, 128, 128], [1, 16, 13, 90, 160]], 24.0, 8),
    }
    # Stock loaders drop the metadata, but their files have it.
    expected["mini with LoRA"] = expected["mini by the stock loader"] = expected["mini"]
    expected["trained by the stock loader"] = expected["trained"]
    assert result["sizes"] == {
        name: [[shape, fps, stride, 4] for shape in shapes]
        for name, (shapes, fps, stride) in expected.items()
    }


def test_a_size_that_is_a_guess_is_told(result):
    said = "The native size is a guess, {}: the model's file does not say. Choose custom for another."
    shown = {
        "wan 2.1": said.format("832x480 with 81 frames"),
        "wan 2.2": said.format("1280x704 with 121 frames"),
    }
    # And taken away at the next size, which is none.
    assert result["shown"] == {
        name: [[text, "APTEmptyLatent"], [" ", "APTEmptyLatent"]] for name, text in shown.items()
    }


def test_sizes_of_ones_own(result):
    assert result["custom"] == {
        "smallest": [[1, 16, 1, 2, 2], 16.0, 8, 4],
        "batch": [[4, 16, 4, 4, 8], 8.0, 8, 4],
        "wan 2.2": [[1, 48, 2, 4, 6], 24.0, 16, 4],
    }


def test_wrong_sizes_are_refused_with_the_nearest_right_ones(result):
    takes = "does not fit this model, which takes sides in steps of {} pixels and 4n + 1 frames:"
    assert result["sentences"] == {
        "width": (
            f"AptError {NAME} 1000x720 with 49 frames {takes.format(16)} 992x720 with 49 frames is nearest."
        ),
        "720 on the 5B": (
            f"AptError {NAME} 1280x720 with 49 frames {takes.format(32)} 1280x704 with 49 frames is nearest."
        ),
        "frames": f"AptError {NAME} 48x48 with 18 frames {takes.format(16)} 48x48 with 17 frames is nearest.",
        "more frames": (
            f"AptError {NAME} 48x48 with 20 frames {takes.format(16)} 48x48 with 21 frames is nearest."
        ),
        "tiny": f"AptError {NAME} 8x32 with 2 frames {takes.format(32)} 32x32 with 1 frames is nearest.",
        "LoRA": (
            f"AptError {NAME} the LoRA: its metadata entry `apt` has native 5, not width, height, "
            "frames and fps: export the file again."
        ),
        "unknown": (
            f"AptError {NAME} the size is not one of those in the list: "
            "choose native, image 1024, video 1280x720, 2 s or custom."
        ),
    }


def test_the_server_refuses_what_it_can_see_at_once(result):
    said = result["validated"]
    assert said.pop("right") == []
    assert said == {
        "width": ["Value 8 smaller than min of 16: size.width"],
        "batch": ["Value 0 smaller than min of 1: batch_size"],
        "seeds": [
            'Custom validation failed for node: seeds - APT Noise Walk: seeds is "1 2", '
            "but it must be two or more whole numbers from 0 with commas in between, such as 1, 2, 3."
        ],
    }

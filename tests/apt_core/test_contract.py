import pytest

from apt_core.errors import AptError
from apt_core.files import contract
from apt_core.loading.sources import TransformerSource

LORA_KEY = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
NATIVE = {"width": 64, "height": 32, "frames": 5, "fps": 8}


@pytest.mark.parametrize(
    "apt, keys, expected",
    [
        ({"kind": "lora"}, ["blocks.0.self_attn.q.weight"], True),  # the object says it
        ({}, [LORA_KEY], True),  # the names show it
        ({"kind": "generator"}, ["blocks.0.self_attn.q.weight"], False),
        ({}, ["blocks.0.self_attn.q.weight"], False),
    ],
)
def test_a_file_is_a_lora_by_its_object_or_by_its_names(apt, keys, expected):
    assert contract.is_lora_file(apt, keys) is expected


@pytest.mark.parametrize(
    "apt, distilled, adversarial",
    [
        ({"kind": "generator", "phase": "distilled"}, True, False),
        ({"kind": "lora", "phase": "distilled"}, True, False),
        ({"kind": "generator", "phase": "video"}, False, True),
        ({"kind": "generator"}, False, True),
        ({"kind": "base"}, False, False),
        ({}, False, False),
    ],
)
def test_the_stage_of_a_file(apt, distilled, adversarial):
    assert (contract.is_distilled(apt), contract.is_adversarial(apt)) == (distilled, adversarial)


@pytest.mark.parametrize(
    "name, value",
    [("native", {**NATIVE, "frames": 0}), ("text_length", 0), ("text_length", "512"), ("second_time", 1.0)],
)
def test_impossible_sizes_are_named(name, value):
    contract.check_sizes("it", {"native": NATIVE, "text_length": 32, "second_time": 0.5})
    contract.check_sizes("it", {})
    with pytest.raises(AptError, match=f"^it: its metadata entry `apt` has {name} "):
        contract.check_sizes("it", {name: value})


def test_a_lora_has_a_rank_and_a_whole_model_has_none():
    lora = contract.as_lora({"kind": "generator", "phase": "video", "native": NATIVE}, 8)
    assert lora == {"kind": "lora", "rank": 8, "phase": "video", "native": NATIVE}
    assert contract.as_whole(lora | {"over": "wan.safetensors"}) == {
        "kind": "generator",
        "phase": "video",
        "native": NATIVE,
    }


@pytest.mark.parametrize("channels, frames", [(16, 81), (48, 121), (12, 81)])
def test_a_file_that_names_no_size_counts_as_released(channels, frames):
    """The pipeline's default; the ComfyUI nodes ask the same function."""
    source = TransformerSource("it", {"in_channels": channels}, {}, 0, print)
    assert source.native == contract.released(channels) and source.native["frames"] == frames
    own = TransformerSource("it", {"in_channels": channels}, {"native": NATIVE}, 0, print)
    assert own.native == NATIVE

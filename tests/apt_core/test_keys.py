"""Key names: exact both ways, and equal to the official files of Wan at their true shapes (meta device, no
memory).
"""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from vae_configs import RELEASED_22

from apt_core.errors import AptError
from apt_core.files import keys

# heads, ffn, layers, in = out channels, parameters, tensors
RELEASED = {
    "2.1-1.3B": (12, 8960, 30, 16, 1_418_996_800, 825),
    "2.1-14B": (40, 13824, 40, 16, 14_288_491_584, 1095),
    "2.2-5B": (24, 14336, 30, 48, 4_999_787_712, 825),
}


def official_names(layers: int, image: bool = False) -> set[str]:
    """The names in the official files, spelled out here once more so that the tested tables are not their own
    witness.
    """
    linear = [
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
    ]
    names = {"head.modulation"}
    if image:
        linear += [f"img_emb.proj.{i}" for i in (0, 1, 3, 4)]
    for n in range(layers):
        block = f"blocks.{n}"
        names.add(f"{block}.modulation")
        linear += [f"{block}.norm3", f"{block}.ffn.0", f"{block}.ffn.2"]
        for attention in ("self_attn", "cross_attn"):
            linear += [f"{block}.{attention}.{x}" for x in "qkvo"]
            names |= {f"{block}.{attention}.norm_q.weight", f"{block}.{attention}.norm_k.weight"}
        if image:
            linear += [f"{block}.cross_attn.k_img", f"{block}.cross_attn.v_img"]
            names.add(f"{block}.cross_attn.norm_k_img.weight")
    return names | {f"{name}.{leaf}" for name in linear for leaf in ("weight", "bias")}


def meta_wan(**kw) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return WanTransformer3DModel(**kw).state_dict()


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_official_names_and_sizes(name):
    heads, ffn, layers, channels, parameters, tensors = RELEASED[name]
    state = meta_wan(
        num_attention_heads=heads, ffn_dim=ffn, num_layers=layers, in_channels=channels, out_channels=channels
    )
    official = [keys.transformer_to_official(key) for key in state]
    assert set(official) == official_names(layers)
    assert len(official) == len(set(official)) == tensors
    assert sum(value.numel() for value in state.values()) == parameters
    assert [keys.transformer_to_diffusers(key) for key in official] == list(state)


def test_image_to_video_extras():
    state = meta_wan(
        num_attention_heads=2,
        num_layers=2,
        ffn_dim=64,
        in_channels=36,
        image_dim=1280,
        added_kv_proj_dim=256,
        pos_embed_seq_len=514,
    )
    official = [keys.transformer_to_official(key) for key in state]
    assert set(official) == official_names(2, image=True) | {"img_emb.emb_pos"}
    assert [keys.transformer_to_diffusers(key) for key in official] == list(state)


@pytest.mark.parametrize(
    "official, diffusers",
    [
        ("blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight"),
        ("blocks.12.self_attn.o.bias", "blocks.12.attn1.to_out.0.bias"),
        ("blocks.3.cross_attn.v.bias", "blocks.3.attn2.to_v.bias"),
        ("blocks.3.cross_attn.norm_k.weight", "blocks.3.attn2.norm_k.weight"),
        ("blocks.3.cross_attn.k_img.weight", "blocks.3.attn2.add_k_proj.weight"),
        ("blocks.3.cross_attn.norm_k_img.weight", "blocks.3.attn2.norm_added_k.weight"),
        ("blocks.7.norm3.weight", "blocks.7.norm2.weight"),
        ("blocks.7.ffn.0.weight", "blocks.7.ffn.net.0.proj.weight"),
        ("blocks.7.ffn.2.bias", "blocks.7.ffn.net.2.bias"),
        ("blocks.29.modulation", "blocks.29.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.weight", "proj_out.weight"),
        ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
        ("time_embedding.0.bias", "condition_embedder.time_embedder.linear_1.bias"),
        ("time_embedding.2.bias", "condition_embedder.time_embedder.linear_2.bias"),
        ("text_embedding.2.weight", "condition_embedder.text_embedder.linear_2.weight"),
        ("img_emb.proj.3.weight", "condition_embedder.image_embedder.ff.net.2.weight"),
        ("patch_embedding.weight", "patch_embedding.weight"),
    ],
)
def test_spot_list(official, diffusers):
    assert keys.transformer_to_official(diffusers) == official
    assert keys.transformer_to_diffusers(official) == diffusers


@pytest.mark.parametrize(
    "key", ["blocks.0.attn1.to_q.weight", "blocks.0.norm1.weight", "vace_blocks.0.norm3.weight", "x"]
)
def test_unknown_official_key_is_named(key):
    with pytest.raises(AptError, match=key):
        keys.transformer_to_diffusers(key)


def test_a_key_with_a_line_break_is_named():
    """A JSON header may hold one."""
    with pytest.raises(AptError, match=r"^blocks\.0\.attn1\\nto_q\.weight is not a weight of Wan's"):
        keys.transformer_to_official("blocks.0.attn1\nto_q.weight")
    with pytest.raises(AptError, match=r"^blocks\.0\.self_attn\\nq\.weight is not a weight of Wan's"):
        keys.transformer_to_diffusers("blocks.0.self_attn\nq.weight")


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "diffusion_model."])
def test_layout_and_prefix(prefix):
    assert keys.detect_layout(prefix + name for name in official_names(2)) == ("official", prefix)


def test_diffusers_layout():
    assert keys.detect_layout(meta_wan(num_attention_heads=1, num_layers=1, ffn_dim=8)) == ("diffusers", "")


def test_layouts_that_are_refused():
    mixed = ["model." + name for name in official_names(1)] + ["first_stage_model.conv1.weight"]
    with pytest.raises(AptError, match="first_stage_model.conv1.weight"):
        keys.detect_layout(mixed)
    with pytest.raises(AptError, match="LoRA"):
        keys.detect_layout(["diffusion_model.blocks.0.self_attn.q.lora_A.weight"])
    with pytest.raises(AptError, match="double_blocks.0.img_mod.lin.weight"):
        keys.detect_layout(["double_blocks.0.img_mod.lin.weight"])
    with pytest.raises(AptError, match="not a Wan transformer"):
        keys.detect_layout([])


def official_vae_names(version: str) -> set[str]:
    """Official VAE names, counted out by hand from the released architecture."""
    conv, gamma = {"conv1", "conv2"}, set()

    def residual(name: str, shortcut: bool = False) -> None:
        gamma.update({f"{name}.residual.0", f"{name}.residual.3"})
        conv.update(
            {f"{name}.residual.2", f"{name}.residual.6"} | ({f"{name}.shortcut"} if shortcut else set())
        )

    for half in ("encoder", "decoder"):
        conv.update({f"{half}.conv1", f"{half}.head.2", f"{half}.middle.1.to_qkv", f"{half}.middle.1.proj"})
        gamma.update({f"{half}.head.0", f"{half}.middle.1.norm"})
        residual(f"{half}.middle.0")
        residual(f"{half}.middle.2")
    if version == "2.1":
        for i in (0, 1, 3, 4, 6, 7, 9, 10):
            residual(f"encoder.downsamples.{i}", shortcut=i in (3, 6))
        conv.update(f"encoder.downsamples.{i}.resample.1" for i in (2, 5, 8))
        conv.update(f"encoder.downsamples.{i}.time_conv" for i in (5, 8))
        for i in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14):
            residual(f"decoder.upsamples.{i}", shortcut=i == 4)
        conv.update(f"decoder.upsamples.{i}.resample.1" for i in (3, 7, 11))
        conv.update(f"decoder.upsamples.{i}.time_conv" for i in (3, 7))
    else:
        for stage in range(4):
            for i in range(2):
                residual(f"encoder.downsamples.{stage}.downsamples.{i}", shortcut=i == 0 and stage in (1, 2))
            for i in range(3):
                residual(f"decoder.upsamples.{stage}.upsamples.{i}", shortcut=i == 0 and stage in (2, 3))
        conv.update(f"encoder.downsamples.{stage}.downsamples.2.resample.1" for stage in (0, 1, 2))
        conv.update(f"encoder.downsamples.{stage}.downsamples.2.time_conv" for stage in (1, 2))
        conv.update(f"decoder.upsamples.{stage}.upsamples.3.resample.1" for stage in (0, 1, 2))
        conv.update(f"decoder.upsamples.{stage}.upsamples.3.time_conv" for stage in (0, 1))
    return {f"{name}.gamma" for name in gamma} | {
        f"{name}.{leaf}" for name in conv for leaf in ("weight", "bias")
    }


VAES = {
    "2.1": {"base_dim": 12},
    "2.2": RELEASED_22,
}


@pytest.mark.parametrize("version", VAES)
def test_vae_has_the_official_names(version):
    with torch.device("meta"):
        state = AutoencoderKLWan(**VAES[version]).state_dict()
    official = [keys.vae_to_official(key, version) for key in state]
    assert set(official) == official_vae_names(version)
    assert [keys.vae_to_diffusers(key, version) for key in official] == list(state)
    assert keys.detect_vae_layout(official) == ("official", version)
    assert keys.detect_vae_layout(state) == ("diffusers", version)


def test_vae_shapes_follow_the_renaming():
    # A residual block's second norm sits after the channels have changed: a swap of the two would show here.
    with torch.device("meta"):
        state = {
            keys.vae_to_official(k, "2.1"): tuple(v.shape)
            for k, v in AutoencoderKLWan(base_dim=12).state_dict().items()
        }
    assert state["encoder.downsamples.3.residual.0.gamma"] == (12, 1, 1, 1)
    assert state["encoder.downsamples.3.residual.3.gamma"] == (24, 1, 1, 1)
    assert state["encoder.downsamples.3.shortcut.weight"] == (24, 12, 1, 1, 1)
    assert state["decoder.upsamples.4.shortcut.weight"] == (48, 24, 1, 1, 1)
    assert state["conv1.weight"] == (32, 32, 1, 1, 1)
    assert state["conv2.weight"] == (16, 16, 1, 1, 1)
    assert state["decoder.head.0.gamma"] == (12, 1, 1, 1)


def test_vae_errors():
    with pytest.raises(AptError, match="encoder.downsamples.3.residual.0.gamma"):
        keys.vae_to_diffusers("encoder.downsamples.3.residual.0.gamma", "2.2")
    with pytest.raises(AptError, match="not a Wan VAE"):
        keys.detect_vae_layout(["decoder.conv_in.weight"])

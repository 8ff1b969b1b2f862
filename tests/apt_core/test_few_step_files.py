"""Few-step weights of other projects, by the names and shapes of their tensors: what each is called, whether
it loads, and as what start of stage 2.

Names and shapes are those of Wan 2.1 1.3B (14B for the LoRA) as each project writes them; the files are
sparse, or hold a tiny Wan's weights.
"""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from test_public_files import sparse

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_checkpoint
from apt_core.files.keys import transformer_to_official
from apt_core.files.origins import convolution_shapes, origin
from apt_core.files.tensorfile import read_tensors
from apt_core.loading.checkpoint import load_transformer
from trainer.checkpoints.inspect import inspect
from trainer.checkpoints.starting_models import times_note
from trainer.config import load_preset
from trainer.jobs.starts import open_start

SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096, "in_channels": 16}


@pytest.fixture(scope="module")
def wan_13b():
    """Official names and shapes of Wan 2.1 1.3B."""
    with torch.device("meta"):
        state = WanTransformer3DModel(**SMALL, attention_head_dim=128, out_channels=16).state_dict()
    return {transformer_to_official(key): list(value.shape) for key, value in state.items()}


def linear(shapes):
    return {
        key: [shape[0], shape[1] * 4] if key == "patch_embedding.weight" else shape
        for key, shape in shapes.items()
    }


def with_layers(shapes, *names):
    return shapes | {f"blocks.{i}.{name}": shape for i in range(30) for name, shape in names}


def lightx2v(rank=64, width=5120, ffn=13824, blocks=40):
    """A step-distilled LoRA: factors of each block's linear layers with the differences of their biases,
    those of norms, and of the modulation."""
    keys = {}
    for i in range(blocks):
        block = f"diffusion_model.blocks.{i}"
        sizes = {f"{a}_attn.{x}": (width, width) for a in ("self", "cross") for x in "qkvo"}
        for layer, (below, above) in (sizes | {"ffn.0": (width, ffn), "ffn.2": (ffn, width)}).items():
            keys[f"{block}.{layer}.lora_down.weight"] = [rank, below]
            keys[f"{block}.{layer}.lora_up.weight"] = [above, rank]
            keys[f"{block}.{layer}.diff_b"] = [above]
        for norm in (
            "self_attn.norm_q",
            "self_attn.norm_k",
            "cross_attn.norm_q",
            "cross_attn.norm_k",
            "norm3",
        ):
            keys[f"{block}.{norm}.diff"] = [width]
        keys |= {f"{block}.norm3.diff_b": [width], f"{block}.diff_m": [1, 6, width]}
    return keys


def test_rcm_turbodiffusion_and_self_forcing_are_wan_transformers(wan_13b, tmp_path):
    for name, shapes, of in (
        ("rcm", {f"net.{key}": shape for key, shape in linear(wan_13b).items()}, "rCM, by its names"),
        ("turbo", linear(wan_13b), "TurboDiffusion or rCM, by its names"),
        ("self-forcing", {f"model.{key}": shape for key, shape in wan_13b.items()}, None),
    ):
        facts = inspect(sparse(tmp_path / f"{name}.safetensors", shapes))
        assert facts["what"] == "Wan transformer, official keys" and facts.get("of") == of, name
        assert facts["loads"].startswith("yes"), facts["loads"]
        assert facts["as a start"].startswith(
            "with mode=full; with mode=lora give it as base too, to train a LoRA over it"
        )
        assert facts["shape"].startswith(
            "30 blocks, 12 heads x 128 = width 1536, ffn 8960, 16 latent channels"
        )


@pytest.mark.parametrize(
    "name, layer, shape, of",
    [
        ("turbo", "self_attn.attn_op.local_attn.proj_l.weight", [128, 128], "TurboDiffusion"),
        ("fastwan", "to_gate_compress.weight", [1536, 1536], "FastWan"),
    ],
)
def test_another_attention_is_named_and_refused(wan_13b, tmp_path, name, layer, shape, of):
    path = sparse(tmp_path / f"{name}.safetensors", with_layers(wan_13b, (layer, shape)))
    facts = inspect(path)
    assert facts["of"] == f"{of}, by its names" and "as a start" not in facts
    assert (
        facts["loads"].startswith(f"no: {path} was trained with {of}'s ")
        and f"(blocks.0.{layer})" in facts["loads"]
    )
    with pytest.raises(
        AptError,
        match=r"full attention has no place for its weights \(.*\): give a model or a LoRA that was trained",
    ):
        load_transformer(path)


def test_a_linear_patch_embedding_is_the_same_convolution(wan, tmp_path):
    """Bit for bit, and the convolution of the shipped layout computes what the linear layer does."""
    model = wan()
    state = {transformer_to_official(key): value for key, value in model.state_dict().items()}
    kernel = state["patch_embedding.weight"]
    rcm = {f"net.{key}": value.contiguous() for key, value in state.items()}
    rcm["net.patch_embedding.weight"] = kernel.flatten(1)
    heads = {"config": json.dumps({"transformer": {"num_heads": model.config.num_attention_heads}})}
    save_file(rcm, tmp_path / "rcm.safetensors", heads)
    loaded = load_transformer(tmp_path / "rcm.safetensors").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())
    x = torch.randn(1, kernel.shape[1], 3, 4, 6)
    patches = x.unfold(2, 1, 1).unfold(3, 2, 2).unfold(4, 2, 2)  # [1, c, t, h, w, 1, 2, 2]
    rows = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)
    by_hand = (rows @ kernel.flatten(1).T + state["patch_embedding.bias"]).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(model.patch_embedding(x), by_hand)
    shapes = {"a.patch_embedding.weight": (8, 64), "a.head.head.bias": (64,), "b": (2, 3)}
    assert convolution_shapes(shapes) == shapes | {"a.patch_embedding.weight": (8, 16, 1, 2, 2)}
    damaged = shapes | {"a.head.head.bias": (16,)}
    assert convolution_shapes(damaged) == damaged


def test_loras_say_what_start_they_are(tmp_path):
    whole = inspect(sparse(tmp_path / "lightx2v.safetensors", lightx2v()))
    assert (
        whole["of"] == "LightX2V, by its names"
        and whole["rank"] == "64"
        and whole["loads"].startswith("needs its base")
    )
    assert whole["as a start"].startswith(
        "with mode=lora and lora_rank=64 or more (680 other changes stay as they are), "
        "or mode=full; stage 2 calls"
    )
    factors = {key: shape for key, shape in lightx2v(32).items() if "lora_" in key}
    plain = inspect(sparse(tmp_path / "plain.safetensors", factors))
    assert "of" not in plain and origin(factors) is None
    assert plain["as a start"] == (
        "with mode=lora and lora_rank=32 or more, or mode=full; stage 2 calls it once, at timestep 1000, "
        "whatever times it was trained for"
    )


def test_times_are_told_and_those_of_another_call_are_refused(wan, tmp_path):
    from apt_core.loading.checkpoint import save_generator

    model = wan()
    save_generator(tmp_path / "ours.safetensors", model, model.config, {})
    assert times_note(read_checkpoint(tmp_path / "ours.safetensors")) is None
    save_generator(tmp_path / "late.safetensors", model, model.config, {"timestep": 750})
    with pytest.raises(
        AptError, match=r"late\.safetensors is for timestep 750, but one step from noise is a call at 1000: "
    ):
        times_note(read_checkpoint(tmp_path / "late.safetensors"))
    assert inspect(tmp_path / "ours.safetensors")["as a start"].endswith("to train a LoRA over it")
    assert inspect(tmp_path / "late.safetensors")["as a start"].startswith("no: ")
    tensors, header = read_tensors(tmp_path / "ours.safetensors")
    coarse = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
    save_file(coarse, tmp_path / "coarse.safetensors", header.metadata)
    assert inspect(tmp_path / "coarse.safetensors")["as a start"].endswith("is too coarse to train from")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    note = times_note(read_checkpoint(tmp_path / "other.safetensors"))
    assert note and "at timestep 1000. A list like 1000, 750, 500, 250 begins there under any shift" in note
    with pytest.raises(AptError, match=r"--start-from .*gone\.safetensors does not exist"):
        open_start(tmp_path / "gone.safetensors", load_preset("mini"), None)

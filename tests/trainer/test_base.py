"""Weights from where people have them: ComfyUI's single files, folders of diffusers and transformers; and
what does not fit.
"""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from apt_core.errors import AptError
from apt_core.loading.backbones import load_backbone
from apt_core.models.text import TOKENIZER_KEY, train_tokenizer
from trainer.checkpoints.starting_models import (
    check_base,
    find_base,
    open_text_encoder,
    open_vae,
    write_random_base,
)
from trainer.config import Files, load_preset

TEXTS = ["a red circle moving left", "a blue square on a green background"] * 20


@pytest.fixture(scope="module")
def umt5():
    torch.manual_seed(0)
    spiece = train_tokenizer(TEXTS, 280)
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=320,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return model.eval(), spiece


def comfy_tensors(model, spiece, dtype):
    tensors = {
        key: value.to(dtype).clone()
        for key, value in model.state_dict().items()
        if key != "encoder.embed_tokens.weight"
    }
    return tensors | {TOKENIZER_KEY: torch.tensor(list(spiece), dtype=torch.uint8)}


def embed(encoder):
    return encoder.encode(["a red circle moving left"])[0]


def test_the_text_encoder_in_every_form(umt5, tmp_path):
    model, spiece = umt5
    save_file(comfy_tensors(model, spiece, torch.float32), tmp_path / "32.safetensors")
    save_file(comfy_tensors(model, spiece, torch.float16), tmp_path / "16.safetensors")
    packed = {}
    for key, value in comfy_tensors(model, spiece, torch.float32).items():
        if value.ndim == 2 and "encoder.block" in key and "relative" not in key:
            scale = value.abs().max() / 448
            packed[key], packed[key.replace("weight", "scale_weight")] = (
                (value / scale).to(torch.float8_e4m3fn),
                scale,
            )
        else:
            packed[key] = value.half() if value.is_floating_point() else value
    save_file(packed | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "8.safetensors")
    model.save_pretrained(tmp_path / "pipeline" / "text_encoder")
    (tmp_path / "pipeline" / "tokenizer").mkdir()
    (tmp_path / "pipeline" / "tokenizer" / "spiece.model").write_bytes(spiece)

    exact = embed(open_text_encoder(Files(text_encoder=str(tmp_path / "32.safetensors")), 64))
    ids = torch.tensor(
        [
            open_text_encoder(Files(text_encoder=str(tmp_path / "32.safetensors")), 64).tokenize(
                ["a red circle moving left"]
            )[0]
        ]
    )
    with torch.no_grad():
        torch.testing.assert_close(
            exact, model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        )
    torch.testing.assert_close(
        embed(open_text_encoder(Files(text_encoder=str(tmp_path / "pipeline")), 64)), exact
    )
    torch.testing.assert_close(
        embed(open_text_encoder(Files(text_encoder=str(tmp_path / "pipeline" / "text_encoder")), 64)), exact
    )
    for name, error in (("16", 0.02), ("8", 0.1)):
        encoder = open_text_encoder(Files(text_encoder=str(tmp_path / f"{name}.safetensors")), 64)
        assert encoder.model.dtype == torch.bfloat16
        assert (embed(encoder) - exact).norm() / exact.norm() < error


def test_a_text_encoder_without_its_tokenizer_or_its_weights(umt5, tmp_path):
    model, spiece = umt5
    tensors = comfy_tensors(model, spiece, torch.float32)
    del tensors[TOKENIZER_KEY]
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(
        AptError, match=r"carries no tokenizer: add tokenizer=PATH of its folder, or of its spiece.model.$"
    ):
        open_text_encoder(Files(text_encoder=str(tmp_path / "bare.safetensors")), 64)
    (tmp_path / "spiece.model").write_bytes(spiece)
    for tokenizer in (tmp_path, tmp_path / "spiece.model"):
        assert (
            open_text_encoder(
                Files(text_encoder=str(tmp_path / "bare.safetensors"), tokenizer=str(tokenizer)), 64
            ).dim
            == 32
        )
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(AptError, match="SelfAttention.q.weight missing"):
        open_text_encoder(Files(text_encoder=str(tmp_path / "part.safetensors")), 64)
    with pytest.raises(AptError, match="text_encoder .* does not exist: give the path of the UMT5 encoder"):
        open_text_encoder(Files(text_encoder=str(tmp_path / "gone")), 64)


def test_vae_and_base_from_a_diffusers_folder(tmp_path):
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8).save_pretrained(tmp_path / "vae")
    assert open_vae(Files(vae=str(tmp_path))).config.base_dim == 8
    mini = load_preset("mini").model
    shape = dict(num_attention_heads=4, attention_head_dim=32, text_dim=96, ffn_dim=512, freq_dim=256)
    WanTransformer3DModel(**shape, num_layers=6).save_pretrained(
        tmp_path / "transformer", max_shard_size="2MB"
    )
    check_base(tmp_path, mini, "mini")
    assert find_base(load_preset("mini", [f"files.base={tmp_path}"])) == tmp_path
    WanTransformer3DModel(**shape, num_layers=5).half().save_pretrained(tmp_path / "other")
    with pytest.raises(
        AptError,
        match=(
            r"is not the model of preset mini \(blocks 5 instead of 6\): give that model, or the preset of"
            r" this one.$"
        ),
    ):
        check_base(tmp_path / "other", mini, "mini")


def test_an_mmdit_starts_from_noise_and_is_known_by_its_file(tmp_path):
    small = ["layers=3", "heads=2", "head_dim=26", "ffn=208", "text_dim=24"]
    preset = load_preset("seaweed-8b", small, ["model"])
    write_random_base(tmp_path / "a.safetensors", preset)
    write_random_base(tmp_path / "b.safetensors", preset)
    check_base(tmp_path / "a.safetensors", preset.model, "seaweed-8b")
    a, b = (load_backbone(tmp_path / f"{name}.safetensors").state_dict() for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(AptError, match="is an MMDiT, but preset mini is for another kind of model"):
        check_base(tmp_path / "a.safetensors", load_preset("mini").model, "mini")
    with pytest.raises(
        AptError, match="base=random is for backbones without public weights, and mini is a Wan transformer"
    ):
        write_random_base(tmp_path / "c.safetensors", load_preset("mini"))

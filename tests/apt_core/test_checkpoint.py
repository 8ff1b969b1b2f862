"""The checkpoint contract: what is written, what is read back, and one sentence for every file that cannot be
used.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from apt_core.errors import AptError, NotFinite
from apt_core.files.checkpoint_header import read_header, read_metadata
from apt_core.files.tensorfile import write_tensors
from apt_core.loading import wan_config
from apt_core.loading.checkpoint import load_transformer, save_diffusers_folder, save_generator
from apt_core.loading.wan_config import transformer_config_from
from apt_core.models.wan import WanBackbone

Q = "blocks.1.self_attn.q.weight"


@pytest.fixture
def model(wan):
    return wan()


@pytest.fixture
def file(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_generator(path, model, model.config, {"base": "mini", "phase": "image"})
    return path


def velocity(model):
    """Of a model in fp64."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(1, 4, 2, 4, 6, generator=generator), torch.randn(1, 5, 10, generator=generator)
    return model(x.double(), torch.tensor([1000.0]).double(), text.double(), return_dict=False)[0]


def rewrite(path, change=None, metadata=None):
    """Write a checkpoint again with changed tensors or metadata, straight through safetensors."""
    tensors, strings = load_file(path), dict(read_header(path).metadata)
    if change:
        change(tensors)
    save_file(tensors, path, metadata={**strings, **(metadata or {})})


def refuse(path, *words, load=load_transformer, error=AptError):
    with pytest.raises(error) as caught:
        load(path)
    message = str(caught.value)
    assert all(word in message for word in (str(path), *words)), message
    assert message.endswith(".") and "\n" not in message, message
    assert message.count(str(path)) == 1, "one sentence inside another"


def test_what_is_written(file, model):
    header = read_header(file)
    assert json.loads(header.metadata["apt"]) == {
        "format": 1,
        "kind": "generator",
        "timestep": 1000,
        "base": "mini",
        "phase": "image",
    }
    assert json.loads(header.metadata["config"]) == {
        "transformer": {"num_heads": 2, "text_dim": 10, "freq_dim": 16}
    }
    assert header.shapes[Q] == (24, 24) and header.shapes["blocks.2.norm3.weight"] == (24,)
    assert set(header.dtypes.values()) == {"F32"}
    assert len(header.shapes) == len(model.state_dict())
    assert read_metadata(file)["phase"] == "image"


def test_metadata_extends_the_contract(model, tmp_path):
    path = tmp_path / "new" / "folder" / "m.safetensors"
    native = {"height": 48, "width": 48, "frames": 9, "fps": 8}
    save_generator(
        path,
        model.state_dict(),
        dict(model.config),
        {"kind": "base", "native": native, "modelspec.title": "Mini"},
        torch.bfloat16,
    )
    header = read_header(path)
    assert header.metadata["modelspec.title"] == "Mini" and set(header.dtypes.values()) == {"BF16"}
    assert read_metadata(path) == {"format": 1, "kind": "base", "timestep": 1000, "native": native}


def test_released_shapes_need_no_config():
    assert wan_config.comfy_config({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}) == {}
    assert wan_config.comfy_config({"num_attention_heads": 24, "in_channels": 48, "out_channels": 48}) == {}


def test_config_names_only_what_comfyui_would_guess_wrong():
    assert wan_config.comfy_config({"num_attention_heads": 1, "attention_head_dim": 192}) == {"num_heads": 1}
    assert wan_config.comfy_config({"num_attention_heads": 4, "attention_head_dim": 64}) == {"num_heads": 4}
    assert wan_config.comfy_config({"num_attention_heads": 2, "text_dim": 64}) == {"text_dim": 64}
    patches = {"num_attention_heads": 2, "patch_size": (1, 1, 1), "eps": 1e-5}
    assert wan_config.comfy_config(patches) == {"patch_size": [1, 1, 1], "eps": 1e-5, "out_dim": 16}


def test_round_trip_is_exact(file, model, count_built, same):
    again = load_transformer(file)
    assert count_built == [1]
    assert type(again) is WanBackbone and all(p.requires_grad for p in again.parameters())
    same(again, model, velocity)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    } | {"rope_max_seq_len": 1024}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_dtypes(model, tmp_path, dtype):
    path = tmp_path / "m.safetensors"
    save_generator(path, model, model.config, {}, dtype)
    again = load_transformer(path, cls=WanTransformer3DModel)
    assert type(again) is WanTransformer3DModel
    assert all(torch.equal(p, model.get_parameter(n).to(dtype).float()) for n, p in again.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_16_bits_leave_fp32_what_diffusers_does(model, tmp_path, dtype, device):
    save_diffusers_folder(tmp_path / "folder", model, {})
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "folder" / "transformer", torch_dtype=dtype)
    ours = load_transformer(tmp_path / "folder", dtype=dtype, device=device)
    assert {name: p.dtype for name, p in ours.named_parameters()} == {
        name: p.dtype for name, p in stock.named_parameters()
    }
    assert (
        {p.dtype for p in ours.condition_embedder.time_embedder.parameters()}
        == {torch.float32}
        != {p.dtype for p in ours.parameters()}
    )
    if device == "cpu":
        assert all(torch.equal(p, stock.get_parameter(name)) for name, p in ours.named_parameters())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model."])
def test_prefixed_file(file, model, same, prefix):
    tensors = {prefix + key: value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata=read_header(file).metadata)
    same(load_transformer(file), model, velocity)


def test_file_in_diffusers_keys(file, model, same):
    save_file(model.state_dict(), file, metadata=read_header(file).metadata)
    same(load_transformer(file), model, velocity)
    save_generator(file, load_file(file), model.config, {})
    assert Q in read_header(file).shapes


def test_state_dict_in_official_keys_is_taken(file, model, same, tmp_path):
    save_generator(tmp_path / "again.safetensors", load_file(file), model.config, {})
    same(load_transformer(tmp_path / "again.safetensors"), model, velocity)


def test_image_to_video_round_trip(tmp_path):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=1,
        ffn_dim=16,
        num_layers=1,
        in_channels=8,
        out_channels=4,
        text_dim=16,
        image_dim=20,
        added_kv_proj_dim=128,
        pos_embed_seq_len=6,
    )
    path = tmp_path / "i2v.safetensors"
    save_generator(path, model, model.config, {})
    again = load_transformer(path)
    assert (again.config.image_dim, again.config.added_kv_proj_dim, again.config.pos_embed_seq_len) == (
        20,
        128,
        6,
    )
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_config_of_the_released_shapes():
    for heads, ffn, layers, channels in ((12, 8960, 30, 16), (40, 13824, 40, 16), (24, 14336, 30, 48)):
        with torch.device("meta"):
            model = WanTransformer3DModel(
                num_attention_heads=heads,
                ffn_dim=ffn,
                num_layers=layers,
                in_channels=channels,
                out_channels=channels,
            )
        config = transformer_config_from(
            {key: tuple(value.shape) for key, value in model.state_dict().items()}, {}
        )
        assert {key: model.config[key] for key in config} == config


def test_diffusers_folder(model, same, tmp_path):
    folder = tmp_path / "export"
    for updates in (1, 2):
        save_diffusers_folder(folder, model, {"updates": updates})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
    stock = WanTransformer3DModel.from_pretrained(folder / "transformer")
    for found in (stock, load_transformer(folder), load_transformer(folder / "transformer")):
        same(found, model, velocity)
    assert read_metadata(folder / "transformer" / "diffusion_pytorch_model.safetensors")["updates"] == 2
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1)
    assert scheduler.config.shift == 5.0 and scheduler.timesteps.tolist() == [1000.0]
    assert json.loads((folder / "apt.json").read_text(encoding="utf-8"))["updates"] == 2
    model.scale_shift_table.data[0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="scale_shift_table"):
        save_diffusers_folder(folder, model, {"updates": 3})
    assert (
        json.loads((folder / "apt.json").read_text(encoding="utf-8"))["updates"] == 2
        and len(list(tmp_path.iterdir())) == 1
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(AptError, match="mine"):
        save_diffusers_folder(tmp_path / "mine", model, {})
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_sharded_diffusers_folder(model, same, tmp_path):
    WanTransformer3DModel.save_pretrained(model, tmp_path / "t", max_shard_size="20KB")
    assert len(list((tmp_path / "t").glob("*.safetensors"))) > 2
    same(load_transformer(tmp_path / "t"), model, velocity)
    next((tmp_path / "t").glob("*00002-of*.safetensors")).unlink()
    with pytest.raises(AptError, match="00002-of.* is missing"):
        load_transformer(tmp_path / "t")


# ---- files that cannot be used
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def count_built(monkeypatch):
    """No refused file may get as far as loading weights into a model."""
    built = []
    monkeypatch.setattr(
        WanBackbone,
        "load_state_dict",
        lambda self, *a, **k: built.append(1) or super(WanBackbone, self).load_state_dict(*a, **k),
    )
    return built


def test_missing_key(file, count_built):
    rewrite(file, lambda t: t.pop(Q))
    refuse(file, Q, "missing")
    assert not count_built


def test_missing_defining_key(file):
    rewrite(file, lambda t: t.pop("text_embedding.0.weight"))
    refuse(file, "text_embedding.0.weight", "missing")


def test_missing_block(file):
    rewrite(file, lambda t: [t.pop(k) for k in list(t) if k.startswith("blocks.1.")])
    refuse(file, "blocks.1.", "missing")


def test_extra_key(file, count_built):
    rewrite(file, lambda t: t.update({"vace_blocks.0.norm3.weight": torch.ones(24)}))
    refuse(file, "vace_blocks.0.norm3.weight")
    assert not count_built


def test_wrong_shape(file, count_built):
    rewrite(file, lambda t: t.update({Q: torch.ones(24, 25)}))
    refuse(file, Q, "(24, 25)", "(24, 24)")
    assert not count_built


def test_wrong_rank(file):
    rewrite(file, lambda t: t.update({"patch_embedding.weight": torch.ones(24, 4)}))
    refuse(file, "patch_embedding.weight", "(24, 4)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(file, count_built, value):
    rewrite(file, lambda t: t[Q].view(-1).__setitem__(7, value))
    refuse(file, Q, "NaN", error=NotFinite)
    assert not count_built


def test_integers_are_no_weights(file):
    rewrite(file, lambda t: t.update({Q: t[Q].to(torch.uint8)}))
    refuse(file, Q, "U8")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated(file, keep):
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    refuse(file, "truncated")
    refuse(file, "truncated", load=read_header)


def test_truncated_in_its_header(file):
    file.write_bytes(file.read_bytes()[:100])
    refuse(file, "truncated")


def test_empty_file(file):
    file.write_bytes(b"")
    refuse(file, "empty")


@pytest.mark.parametrize("new_zip", [True, False])
def test_pickle(file, model, new_zip):
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=new_zip)
    refuse(file, "pickle", "safetensors")


def test_header_that_begins_like_a_pickle(tmp_path):
    # 640 = 0x0280: the first two bytes of the file are those of a pickle of protocol 2.
    text = json.dumps({"__metadata__": {"x": "y"}}).ljust(640).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 640) + text)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_header(path).metadata == {"x": "y"}


@pytest.mark.parametrize(
    "content, word",
    [
        (b"<html>not found</html>", "not a safetensors file"),
        (b"abc", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (struct.pack("<Q", 12) + b'{"a": [1, 2]', "broken"),
        (struct.pack("<Q", 19) + b'{"a": {"shape": 1}}', "broken"),
        (struct.pack("<Q", 22) + b'{"__metadata__": null}', "broken"),
        (struct.pack("<Q", 26) + b'{"__metadata__": {"a": 1}}', "broken"),
        (struct.pack("<Q", 60_000) + b'{"a":' * 12_000, "broken"),
        (struct.pack("<Q", 2) + b"{}", "not a Wan transformer"),
    ],
)
def test_something_else(tmp_path, content, word):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refuse(path, word)


def test_another_model(tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4)}, path)
    refuse(path, "model.diffusion_model.input_blocks.0.0.weight", "not a Wan transformer")


def test_no_file_and_no_folder(tmp_path):
    refuse(tmp_path / "none.safetensors", "does not exist")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "config.json")
    (tmp_path / "folder" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    refuse(tmp_path / "folder", "Wan transformer")


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"apt": "{not json"}, ("`apt`", "JSON")),
        ({"apt": "[1]"}, ("`apt`", "JSON")),
        ({"apt": '{"format": 2, "kind": "generator"}'}, ("format 2", "update")),
        ({"apt": '{"kind": "generator"}'}, ("format",)),
        ({"apt": '{"format": 1, "kind": "teapot"}'}, ("teapot", "generator")),
        (
            {"apt": '{"format": 1, "kind": "generator", "second_time": 700}'},
            ("second_time 700", "between 0 and 1", "export"),
        ),
        ({"apt": '{"format": 1, "kind": "lora"}'}, ("LoRA",)),
        ({"config": "nope"}, ("`config`", "JSON")),
        ({"config": '{"transformer": 3}'}, ("num_heads",)),
        ({"config": "{}"}, ("24", "num_heads")),
        ({"config": '{"transformer": {"num_heads": 5}}'}, ("num_heads",)),
        ({"config": '{"transformer": {"num_heads": 2, "eps": "small"}}'}, ("eps",)),
    ],
)
def test_metadata_that_cannot_be_used(file, count_built, metadata, words):
    rewrite(file, metadata=metadata)
    refuse(file, *words)
    assert not count_built


def test_lora_without_metadata(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}, path)
    refuse(path, "LoRA")


# ---- writing


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "nan", "kind", "json"])
def test_nothing_bad_is_written(model, tmp_path, what):
    state, metadata = dict(model.state_dict()), {}
    key = "blocks.0.attn1.to_q.weight"
    if what == "missing":
        del state[key]
    elif what == "extra":
        state["heads.0.weight"] = torch.ones(2)
    elif what == "shape":
        state[key] = torch.ones(3, 3)
    elif what == "nan":
        state[key] = torch.full((24, 24), float("nan"))
    elif what == "kind":
        metadata = {"kind": "checkpoint"}
    elif what == "json":
        metadata = {"loss": float("nan")}
    with pytest.raises(AptError):
        save_generator(tmp_path / "m.safetensors", state, model.config, metadata)
    assert not list(tmp_path.iterdir())


def test_fp16_overflow_is_not_called_a_divergence(file, model):
    with torch.no_grad():
        model.blocks[0].attn1.to_q.weight[0, 0] = 1e6
    save_generator(file, model, model.config, {})
    with pytest.raises(NotFinite, match="blocks.0.self_attn.q.weight .*fp16"):
        save_generator(file, model, model.config, {}, torch.float16)
    with pytest.raises(NotFinite, match="blocks.0.attn1.to_q.weight .*fp16"):
        load_transformer(file, dtype=torch.float16)


@pytest.mark.parametrize("step", ["save", "sync", "replace"])
def test_a_failing_write_leaves_the_old_file(file, wan, monkeypatch, step):
    before = file.read_bytes()

    def fail(*args, **kwargs):
        if step == "save":
            args[1].write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    target = {
        "save": ("safetensors.torch.save_file", fail),
        "sync": ("os.fsync", fail),
        "replace": ("os.replace", fail),
    }[step]
    monkeypatch.setattr(*target)
    other = wan(seed=9)
    with pytest.raises(AptError, match="No space left"):
        save_generator(file, other, other.config, {})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_interrupted_write_leaves_the_old_file(file, model, monkeypatch):
    before = file.read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_generator(file, model, model.config, {})
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


def test_the_file_is_as_readable_as_any_other(file):
    plain = file.with_name("plain")
    plain.touch()
    assert os.stat(file).st_mode == os.stat(plain).st_mode


def test_a_place_that_cannot_be_written(file, model):
    with pytest.raises(AptError, match="could not be written"):
        save_generator(file / "inside.safetensors", model, model.config, {})


def test_tied_tensors_and_views_are_written_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "t.safetensors", {"a": base, "b": base, "row": base[1], "turned": base.T}, {})
    again = load_file(tmp_path / "t.safetensors")
    assert (
        torch.equal(again["a"], again["b"])
        and torch.equal(again["row"], base[1])
        and torch.equal(again["turned"], base.T)
    )


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_a_failing_folder_export_leaves_the_old_one(model, tmp_path, monkeypatch, error):
    save_diffusers_folder(tmp_path / "e", model, {"updates": 1})
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(AptError if isinstance(error, OSError) else KeyboardInterrupt):
        save_diffusers_folder(tmp_path / "e", model, {"updates": 2})
    assert json.loads((tmp_path / "e" / "apt.json").read_text(encoding="utf-8"))["updates"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_importing_is_light():
    # ComfyUI's start imports these modules.
    code = (
        "import sys, apt_core.loading.checkpoint, apt_core.models.vae, apt_core.models.text, "
        "apt_core.files.keys;"
        "print([m for m in ('diffusers', 'transformers', 'sentencepiece', "
        "'apt_core.models.wan') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_file_of_another_kind_gets_its_own_sentence_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    for start, says in [
        (b"version https://git-lfs", "is a git-lfs pointer, not the file itself: run `git lfs pull`."),
        (b"", "is empty: copy or download it again."),
        (b"<html>not found</html>", "is not a safetensors file: give one, or download it again."),
    ]:
        path.write_bytes(start)
        with pytest.raises(AptError) as error:
            read_header(path)
        assert str(error.value) == f"{path} {says}"

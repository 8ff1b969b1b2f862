"""A long day in some minutes: three hundred prompts of mixed sizes and models on one server, some of them
cancelled, some bad.
"""

import random
import shutil
import time

import torch
from prompts import MINI, custom, mini_image, mini_video
from safetensors.torch import save_file
from server import Rejected, Server, failure

from trainer.mini import ASSETS, GENERATOR

SIZES = [(32, 32, 1), (48, 48, 1), (48, 48, 5), (48, 48, 9), (64, 48, 9), (80, 64, 13), (96, 96, 5)]
MODELS = [MINI, "base.safetensors", "second.safetensors"]
WARM_UP, PROMPTS = 28, 300
GROWTH = 1.05


def test_hundreds_of_prompts_leave_the_server_as_it_was(comfyui_dir, tmp_path, monkeypatch):
    # What is freed goes back to the system at once, so that resident memory is what the server holds. By
    # default glibc keeps freed blocks of up to 32 MB, how many depends on what lies above them: over 300 of
    # these prompts the resident memory went up and down between 977 and 1077 MB (200 with stock nodes alone:
    # 996 and 1107), while malloc had 239 MB in use at every look. So it goes from 934 to 943.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    rng = random.Random(0)
    models = tmp_path / "models" / "diffusion_models"
    models.mkdir(parents=True)
    shutil.copy(ASSETS / "transformer.safetensors", models / "base.safetensors")
    shutil.copy(GENERATOR, models / "second.safetensors")
    save_file({"blocks.0.modulation": torch.zeros(1, 6, 8)}, models / "broken.safetensors")
    # Without the cache of outputs, which is meant to grow until memory is short.
    with Server(comfyui_dir, tmp_path, "--cache-none") as server:
        for i in range(WARM_UP):  # every size three times to its end and once cancelled
            finish(server, rng, SIZES[i % len(SIZES)], seed=i, cancel=i % 4 == 3, model=MODELS[i % 3])
            bad(server, i)
        before, cancelled = server.memory(), 0
        for i in range(PROMPTS):
            if i % 10 == 9:
                bad(server, i // 10)
                continue
            cancelled += finish(
                server,
                rng,
                rng.choice(SIZES),
                seed=1000 + i,
                cancel=rng.random() < 0.25,
                model=rng.choice(MODELS),
            )
        after = server.memory()
        print(f"from {before / 1e6:.0f} to {after / 1e6:.0f} MB, {cancelled} cancelled")
        assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
        # And it still makes the same thing of the same prompt.
        first, again = (
            server.run(mini_image("a red circle on a blue background", 5, custom(48, 48, 1)))["save"]
            for _ in range(2)
        )
        assert first != again and [path.read_bytes() for path in first] == [
            path.read_bytes() for path in again
        ]
    assert after <= GROWTH * before, f"from {before / 1e6:.0f} to {after / 1e6:.0f} MB"
    assert 5 <= cancelled < PROMPTS / 2, f"{cancelled} prompts were cancelled in time"


def bad(server: Server, number: int) -> None:
    """One of three prompts that cannot be: of a file that is not there, of one that is no model, of sizes
    that the model does not take.
    """
    prompt = mini_image("a red circle on a blue background", number, custom(48, 48, 1))
    if number % 3 == 0:
        prompt["model"]["inputs"]["checkpoint"] = "gone.safetensors"
        try:
            server.queue(prompt)
        except Rejected as rejected:
            assert "gone.safetensors" in str(rejected)
            return
        raise AssertionError("a file that is not there was taken")
    if number % 3 == 1:
        prompt["model"]["inputs"]["checkpoint"] = "broken.safetensors"
        node = "APTLoadCheckpoint"
    else:
        prompt["latent"] = {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 48, "height": 40, "length": 1, "batch_size": 1},
        }
        node = "APTSampler"
    entry = server.wait(server.queue(prompt))
    assert failure(entry).startswith(f"{node}: "), failure(entry)


def finish(
    server: Server, rng: random.Random, size: tuple[int, int, int], seed: int, cancel: bool, model: str
) -> bool:
    """Run one prompt to its end; with `cancel`, interrupt it somewhere on the way. True when that came in
    time.
    """
    make = mini_video if size[2] > 1 else mini_image
    prompt_id = server.queue(
        make(
            f"a {rng.choice(['red', 'blue'])} circle on a green background",
            seed,
            custom(*size),
            checkpoint=model,
        )
    )
    if cancel:
        time.sleep(rng.uniform(0, 0.3))
        server.interrupt(prompt_id)
    entry = server.wait(prompt_id)
    interrupted = any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert interrupted or entry["status"]["status_str"] == "success", failure(entry)
    assert cancel or not interrupted
    return interrupted

"""A sentence to a clip in one network call, and in two. `python examples/one_step.py [FOLDER]`"""

import sys
from pathlib import Path

import apt_core

out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out")
pipe = apt_core.OneStepPipeline.from_checkpoint("mini")  # or a file of yours, with vae= and text_encoder=

prompt = "a red circle moving left on a green background"
one = pipe(prompt, seed=1)
two = pipe(prompt, seed=1, steps=2)  # the same noise; the second step adds some again and removes it
one.save(out / "one-step.mp4")
two.save(out / "two-steps.mp4")
print(f"{one.frames.shape[0]} frames of {one.frames.shape[2]}x{one.frames.shape[1]} in {out}")

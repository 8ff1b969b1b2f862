"""From the sample of one seed to that of another, along the arc between their noises (5.7 of the paper).
`python examples/noise_walk.py [FOLDER]`
"""

import sys
from pathlib import Path

import numpy as np

import apt_core
from apt_core.files.media_write import write_video
from apt_core.method.noise import draw, walk

out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out")
out.mkdir(parents=True, exist_ok=True)
pipe = apt_core.OneStepPipeline.from_checkpoint("mini")
request = pipe.request("a blue square on a yellow background", frames=1)
text = pipe.embed(request)

ends = [draw("apt", seed, 0, request.latents(pipe.sources)) for seed in (3, 4)]
pictures = [next(pipe.frames(pipe.latents(request, 0, text, walk(ends, item, 24))))[0] for item in range(24)]
write_video(out / "walk.mp4", np.stack(pictures), fps=12)
print(f"24 pictures in {out / 'walk.mp4'}")

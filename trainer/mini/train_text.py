"""Train the miniature's text encoder: a UMT5 with two layers, and a tokenizer of its own for any text.

From the mean of its tokens, the encoder learns to name the colour, shape, background and direction of a
caption that stands among unrelated words. The transformer learns later what the words look like.
"""

import string
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from apt_core.loading.text_files import load_text_encoder
from apt_core.models.text import save_text_encoder, train_tokenizer

from .clips import COLOR_NAMES, DIRECTION_NAMES, NEGATIVE_PROMPT, SHAPES, Scene, scene

VOCABULARY = 704
TEXT_LENGTH = 32
WIDTH = 96

# With this text, the tokenizer gets whole pieces for words that are likely in captions of real clips.
COMMON_WORDS = """
the of and to in is on with at from by for an as are it its this that two three four five one some many
several small large big little tall short long wide narrow old young new bright dark light black white gray
grey brown orange pink golden silver colorful clear blurry sunny cloudy rainy snowy foggy wet dry hot cold
warm soft hard round flat open closed empty full fast slow quiet loud happy sad beautiful man woman person
people child children boy girl baby dog cat bird horse cow sheep fish bear lion tiger elephant monkey rabbit
mouse insect butterfly bee flower tree grass leaf forest garden park field farm hill mountain rock stone river
lake sea ocean beach wave island desert sand snow ice rain cloud sky sun moon star night day morning evening
sunset sunrise city town village street road bridge building house home room kitchen table chair bed door
window wall floor roof stairs car bus truck train plane boat ship bicycle motorcycle road wheel engine
computer phone screen keyboard camera book paper pen letter box bag bottle cup glass plate bowl knife fork
spoon food bread cake fruit apple banana orange lemon grape berry vegetable tomato potato carrot salad soup
rice meat egg cheese milk coffee tea water wine beer fire smoke steam dust wind storm hand head face eye nose
mouth ear hair arm leg foot finger body shirt dress coat hat shoe glove scarf ball game toy music guitar piano
drum dance song art painting drawing picture photo video film scene view close up shot angle slow motion time
lapse background foreground left right center top bottom front back side above below under over near behind
between around across through along into out off standing sitting walking running jumping swimming flying
driving riding eating drinking sleeping looking watching holding playing talking smiling laughing crying
reading writing cooking cutting washing working moving turning falling rising growing shining burning flowing
floating spinning opening closing wearing carrying pulling pushing throwing catching climbing crossing waiting
camera pans zooms tracks follows shows style cinematic realistic animated cartoon high low quality detailed
sharp natural lighting shadow reflection texture color pattern shape line circle square triangle star heart
fresh green leaves surface deep shallow traffic crowd market shop store office school hospital
""".split()


def caption_texts(count: int = 2000) -> list[str]:
    """`count` captions of drawn images and clips."""
    return [scene(7, i, moving=i % 2 == 0).caption for i in range(count)]


def train_text_encoder(
    out: Path, *, updates: int = 1200, batch: int = 64, lr: float = 2e-3, seed: int = 0, report=print
):
    """Train tokenizer and encoder on the CPU (about a minute) and write `out`."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    corpus = caption_texts() + [NEGATIVE_PROMPT] * 50 + [w for w in COMMON_WORDS for _ in range(20)]
    corpus += [
        character
        for character in string.ascii_letters + string.digits + string.punctuation
        for _ in range(20)
    ]
    corpus += [" ".join(rng.choice(COMMON_WORDS, size=8)) for _ in range(4000)]
    pieces = train_tokenizer(corpus, VOCABULARY)
    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=24,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = UMT5EncoderModel(config)
    save_text_encoder(out, model, pieces, TEXT_LENGTH)
    tokenize = load_text_encoder(out).tokenize

    heads = nn.ModuleDict(
        {
            "color": nn.Linear(WIDTH, len(COLOR_NAMES)),
            "background": nn.Linear(WIDTH, len(COLOR_NAMES)),
            "shape": nn.Linear(WIDTH, len(SHAPES)),
            "direction": nn.Linear(WIDTH, len(DIRECTION_NAMES) + 1),
        }
    )
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.1)
    for update in range(updates):
        scenes = [scene(11, int(i), moving=bool(i % 4)) for i in rng.integers(1 << 30, size=batch)]
        ids = tokenize([_surround(s, rng) for s in scenes])
        length = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        mask = (tokens != 0).long()
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state * mask[..., None]
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        losses = [
            F.cross_entropy(head(pooled), torch.tensor([_label(s, name) for s in scenes]))
            for name, head in heads.items()
        ]
        # The transformer reads the tokens as they are, so keep them near unit scale.
        scale = (hidden.pow(2).sum() / mask.sum() / WIDTH - 1).pow(2)
        loss = sum(losses) + 0.1 * scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 100 == 0 or update == updates - 1:
            report(
                f"text {update}: "
                + " ".join(f"{name} {loss.item():.3f}" for name, loss in zip(heads, losses))
                + f" scale {scale.item():.3f}"
            )
    save_text_encoder(out, model.eval(), pieces, TEXT_LENGTH)


def _surround(item: Scene, rng: np.random.Generator) -> str:
    """The scene's caption, with up to four unrelated words before and after it."""
    before, after = (
        " ".join(rng.choice(COMMON_WORDS, size=rng.integers(5))) if rng.random() < 0.3 else ""
        for _ in range(2)
    )
    return f"{before} {item.caption} {after}".strip()


def _label(item: Scene, name: str) -> int:
    if name == "direction":
        return len(DIRECTION_NAMES) if item.direction is None else DIRECTION_NAMES.index(item.direction)
    value = getattr(item, name)
    return SHAPES.index(value) if name == "shape" else COLOR_NAMES.index(value)

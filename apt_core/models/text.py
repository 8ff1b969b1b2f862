"""Captions to embeddings: a UMT5 encoder with its own sentencepiece tokenizer, both in one safetensors file.

The file holds the keys of transformers' UMT5EncoderModel (shared.weight, encoder.block...), which ComfyUI's
T5 shares, the sentencepiece model as the uint8 tensor `spiece_model`, and as metadata `config` (JSON,
UMT5Config's fields) and `text_length`.
"""

import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AptError
from ..files.tensorfile import write_tensors

PAD, EOS, UNK = 0, 1, 2
TOKENIZER_KEY = "spiece_model"
TIED_KEY = "encoder.embed_tokens.weight"  # the same tensor as shared.weight; files may hold both
CONFIG_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "feed_forward_proj",
)


class Tokenizer:
    """A sentencepiece model with pad 0, </s> 1 and unk 2. Raises AptError for bytes that are not one."""

    def __init__(self, spiece: bytes):
        self.pieces = _tokenizer(spiece)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with </s> at the end and without padding."""
        return [[*self.pieces.encode(clean_prompt(text)), EOS] for text in texts]

    def check(self, texts: Sequence[str], most: int) -> None:
        """Raise AptError for the first text of more than `most` tokens."""
        check_tokens(texts, self.rows(texts), most)


def check_tokens(texts: Sequence[str], rows: Sequence[Sequence[int]], most: int) -> None:
    """Raise AptError for the first of `texts` whose row has more than `most` tokens."""
    for text, row in zip(texts, rows):
        if len(row) > most:
            start = clean_prompt(text)
            start = start if len(start) <= 60 else start[:60] + "..."
            raise AptError(
                f'the caption "{start}" has {len(row)} tokens, but at most {most} fit: '
                "shorten it, or truncate."
            )


class TextEncoder:
    """Turns captions into the embeddings that Wan's transformer reads, exactly as diffusers' WanPipeline does
    (without its optional ftfy).

    model: a UMT5EncoderModel; spiece: the bytes of a sentencepiece model with pad 0, </s> 1 and unk 2;
    text_length: the number of rows that the transformer was trained on (512 for Wan). Raises AptError when
    the tokenizer does not fit the encoder.
    """

    def __init__(self, model, spiece: bytes, text_length: int):
        self.model = model.eval()
        self.text_length = text_length
        self.tokenizer = Tokenizer(spiece)
        size = self.tokenizer.pieces.get_piece_size()
        if size > model.config.vocab_size:
            raise AptError(
                f"the tokenizer has {size} pieces, but the text encoder has embeddings for "
                f"{model.config.vocab_size}: "
                "use the tokenizer that it was trained with."
            )

    @property
    def dim(self) -> int:
        """Width of an embedding; equals the transformer's text_dim."""
        return self.model.config.d_model

    def to(self, device) -> "TextEncoder":
        self.model.to(device)
        return self

    def tokenize(self, texts: Sequence[str], truncate: bool = False) -> list[list[int]]:
        """Token ids of each text, with </s> at the end and without padding. With `truncate` a row is cut to
        `text_length` and keeps its </s>; without it a row may have any length.
        """
        return [
            row[: self.text_length - 1] + [EOS] if truncate and len(row) > self.text_length else row
            for row in self.tokenizer.rows(texts)
        ]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], truncate: bool = False, batch: int = 32) -> list[Tensor]:
        """Embeddings `[L_i, d]` in fp32, on the encoder's device, each trimmed to its own number of tokens.

        Raises AptError when a text has more than `text_length` tokens, unless `truncate`.
        """
        rows = self.tokenize(texts, truncate)
        check_tokens(texts, rows, self.text_length)
        device, out = self.model.shared.weight.device, []
        for i in range(0, len(rows), batch):
            part = rows[i : i + batch]
            longest = max(map(len, part))
            ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in part], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part], device=device)
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            out += [h[: len(row)].float() for h, row in zip(hidden, part)]
        return out

    @staticmethod
    def pad(embeddings: Sequence[Tensor], length: int) -> Tensor:
        """`[B, length, d]` from `[L_i, d]`, with zeros after each. Raises AptError when one is longer than
        `length`.
        """
        longest = max(len(e) for e in embeddings)
        if longest > length:
            raise AptError(
                f"a text embedding has {longest} rows, but at most {length} fit: shorten its caption."
            )
        return torch.stack([torch.nn.functional.pad(e, (0, 0, 0, length - len(e))) for e in embeddings])


def clean_prompt(text: str) -> str:
    """WanPipeline's prompt_clean without ftfy: decode HTML entities (twice, as there), and replace each run
    of white space by one blank.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def save_text_encoder(path: str | Path, model, spiece: bytes, text_length: int) -> None:
    """Write a UMT5EncoderModel and its sentencepiece model into one file, in the model's dtype.
    `apt_core.loading.text_files` reads it.

    Raises AptError for weights that are not finite and when the file cannot be written; a file that was at
    `path` then stays.
    """
    tensors = {key: value for key, value in model.state_dict().items() if key != TIED_KEY}
    tensors[TOKENIZER_KEY] = torch.tensor(list(spiece), dtype=torch.uint8)
    config = {name: getattr(model.config, name) for name in CONFIG_FIELDS}
    write_tensors(path, tensors, {"config": json.dumps(config), "text_length": str(text_length)})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece unigram model of exactly `vocab_size` pieces; return its bytes. The same texts in
    the same order give the same bytes.

    256 of the pieces are bytes, so that any text can be split into tokens without unk. Raises AptError when
    `vocab_size` does not suit the texts.
    """
    import sentencepiece

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(clean_prompt(text) for text in texts),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip(" .")
        raise AptError(
            f"no tokenizer of {vocab_size} pieces can be made from these texts ({reason}): "
            "give other texts or another size."
        ) from None
    return out.getvalue()


def _tokenizer(spiece: bytes):
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    except RuntimeError:
        raise AptError(
            f"{TOKENIZER_KEY} is not a sentencepiece model: use the tokenizer that the text "
            "encoder was trained with."
        ) from None
    ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id())
    if ids != (PAD, EOS, UNK):
        raise AptError(
            f"the tokenizer has pad, </s> and unk at {ids}, but T5 has them at {(PAD, EOS, UNK)}: "
            "train it with train_tokenizer."
        )
    return pieces

"""A cache of text embeddings on disk, by encoder and prompt: a known prompt needs no text encoder."""

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import AptError
from ..files.atomic import replacing
from ..files.tensorfile import read_tensors
from ..loading.text_files import TextFacts
from ..models.text import clean_prompt

LIMIT = 2 * 2**30
SAMPLES, SAMPLE = 64, 2**16


def cache_folder() -> Path:
    """The folder for everything that can be made again: $APT_CACHE, else a folder in the user's cache."""
    given = os.environ.get("APT_CACHE")
    try:
        return Path(
            given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfyui-apt"
        ).expanduser()
    except RuntimeError:  # a user in a container, without a home folder
        return _private(
            Path(tempfile.gettempdir()) / f"comfyui-apt-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        )


def _private(folder: Path) -> Path:
    """The folder, if only this user can write to it, else a new one. Compiled code also lies there, and
    anyone who could write to the folder could run code here.
    """
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not hasattr(os, "getuid") or (
            stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
        ):
            return folder
    return Path(tempfile.mkdtemp(prefix="comfyui-apt-"))


class TextCache:
    """A folder with one small file for each prompt.

    encoder: the fingerprint of the text encoder; limit: bytes of the whole folder. Beyond the limit, the
    files that have not been read for the longest time are removed.
    Any number of processes may use one folder: files appear whole, and a damaged file counts as missing and
    is written again.
    """

    def __init__(self, folder: Path, encoder: str, limit: int = LIMIT) -> None:
        self.folder, self.encoder, self.limit = folder, encoder, limit

    def get(self, prompts: Sequence[str], encode: Callable[[list[str]], list[Tensor]]) -> list[Tensor]:
        """Embeddings `[L_i, d]`, fp32, on the CPU. encode: called once with the prompts that are not in the
        cache, or not at all.
        """
        read = {prompt: self._read(self._path(prompt)) for prompt in dict.fromkeys(prompts)}
        found = {prompt: embedding for prompt, embedding in read.items() if embedding is not None}
        if missing := [prompt for prompt in read if prompt not in found]:
            for prompt, embedding in zip(missing, encode(missing)):
                found[prompt] = embedding.float().cpu()
                self._write(self._path(prompt), found[prompt])
            with suppress(OSError):
                self._shrink()
        return [found[prompt] for prompt in prompts]

    def clear(self) -> None:
        """Forget every prompt, of all encoders."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def _path(self, prompt: str) -> Path:
        return (
            self.folder / f"{_digest(self.encoder.encode(), b'/', clean_prompt(prompt).encode())}.safetensors"
        )

    def _read(self, path: Path) -> Tensor | None:
        try:
            tensors, header = read_tensors(path)
            embedding = tensors["embedding"].clone()  # a copy, since the file behind it may go
            if embedding.ndim != 2 or header.metadata.get("digest") != _of(embedding):
                return None
            os.utime(path)
        except (AptError, KeyError, OSError):
            return None
        return embedding.float()

    def _write(self, path: Path, embedding: Tensor) -> None:
        half = embedding.bfloat16()
        # bf16 loses nothing when the encoder itself is in bf16
        embedding = half if torch.equal(half.float(), embedding) else embedding
        # On a full or read-only disk the video is made all the same; only the cache is not written.
        with suppress(AptError), replacing(path) as partial:
            partial.write_bytes(save({"embedding": embedding.contiguous()}, {"digest": _of(embedding)}))

    def _shrink(self) -> None:
        facts = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process removes files too
                facts.append((path.stat().st_mtime, path.stat().st_size, path))
        spare = sum(size for _, size, _ in facts) - self.limit
        for _, size, path in sorted(facts):
            if spare <= 0:
                return
            path.unlink(missing_ok=True)
            spare -= size


def encoder_fingerprint(facts: TextFacts) -> str:
    """A hash of the tokenizer, and of the weight files' sizes, beginnings and 64 samples spread over each. It
    takes milliseconds for 11 GB.
    """
    digest = blake2b(digest_size=16)
    for path in facts.weights:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for number in range(SAMPLES):
                file.seek(number * max(size - SAMPLE, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    if facts.tokenizer is not None and facts.tokenizer not in facts.weights:
        digest.update(facts.tokenizer.read_bytes())
    return digest.hexdigest()


def _of(embedding: Tensor) -> str:
    return _digest(
        str(tuple(embedding.shape)).encode(), embedding.contiguous().view(torch.uint8).numpy().tobytes()
    )


def _digest(*parts: bytes) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

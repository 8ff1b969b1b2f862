"""Find videos and images with their captions: a .txt file beside each, or metadata.jsonl / metadata.csv."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apt_core.errors import AptError
from trainer.data.media import IMAGE_SUFFIXES, KNOWN, VIDEO_SUFFIXES, kind_of

METADATA = ("metadata.jsonl", "metadata.csv")
LISTS = (".jsonl", ".csv")
COLUMNS = ("caption", "text")
SUFFIXES = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}
ALL_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
TEXTS = (".txt", ".json", ".jsonl", ".csv", ".md", ".caption")
# Folders that a NAS or an operating system adds.
NOT_DATA = {
    "@eaDir",
    "#recycle",
    "@Recycle",
    "#snapshot",
    "__MACOSX",
    "$RECYCLE.BIN",
    "System Volume Information",
}


@dataclass(frozen=True)
class Item:
    """A file to train on. kind: "video" or "image"; caption: one line, never empty."""

    path: Path
    kind: str
    caption: str


@dataclass(frozen=True)
class Bad:
    """A file that cannot be used. reason: one sentence that says what is wrong and how to fix it."""

    path: Path
    reason: str


def find_items(
    folder: str | Path, kinds: Sequence[str] = ("image", "video"), *, skip_bad: bool = False
) -> tuple[list[Item], list[Bad]]:
    """Find the captioned files of these kinds below `folder`, sorted by relative path, and the bad ones.

    A caption comes from metadata.jsonl or metadata.csv at the root (columns file_name, and caption or text),
    or else from the UTF-8 .txt file with the same name beside the file. `folder` may also be such a list
    (.jsonl, .csv): then only the files that it names are used, with paths relative to the list.
    Links to subfolders are followed; each folder is visited once. Ignored are hidden files, a NAS's
    thumbnails and recycle bins, and files that are neither media nor captioned.
    Raises AptError for a folder that is missing, empty, or without any caption. Unless `skip_bad` is set,
    also raises it for bad files, once all files have been checked (see `refuse_bad`).
    """
    folder = Path(folder)
    if folder.suffix in LISTS and folder.is_file():
        given, folder, files, dangling = [folder], folder.parent, [], []
    elif folder.is_dir():
        given = [folder / name for name in METADATA if (folder / name).is_file()]
        files, dangling = _files(folder)
    else:
        raise AptError(
            f"{folder} is not a folder or a list (.jsonl, .csv): "
            "give one with videos or images and their captions."
        )
    captions, bad = _metadata(folder, given)
    bad += [
        Bad(path, f"{path} is a link to {os.readlink(path)}, which does not exist: mend or remove it.")
        for path in dangling
    ]
    other = [suffix for kind, suffixes in SUFFIXES.items() if kind not in kinds for suffix in suffixes]
    media = {path for path in files if path.suffix.lower() in ALL_SUFFIXES}
    # Metadata may name files outside the folder, and files of a type that we cannot read.
    media = {path for path in media | captions.keys() if path.suffix.lower() not in other}
    names = " or ".join(f"{kind}s" for kind in kinds)
    if not media and not bad:
        raise AptError(f"{folder} holds no {names}: give a folder of them ({KNOWN}).")
    texts: dict[Path, list[Path]] = {}  # by the path without its suffix
    for path in files:
        if path.suffix.lower() == ".txt":
            texts.setdefault(path.with_suffix(""), []).append(path)
    if not captions and not bad and not any(path.with_suffix("") in texts for path in media):
        hints = filter(None, (_hint(path, files) for path in sorted(media)))
        raise AptError(
            f"{folder} has no captions ({names} in it: {len(media)}{next(hints, '')}): "
            "put a .txt file of the same name beside each, or a metadata.jsonl with "
            "file_name and caption at the root."
        )
    # If a file of an unknown type has a caption, the user meant it to be used: report it.
    strange = {
        path
        for path in files
        if path.suffix.lower() not in ALL_SUFFIXES + TEXTS and path.with_suffix("") in texts
    }

    items = []
    for path in sorted(media | strange, key=lambda path: item_id(folder, path)):
        try:
            items.append(_item(path, captions.get(path), texts.get(path.with_suffix(""), []), files))
        except AptError as error:
            bad.append(Bad(path, str(error)))
    if not skip_bad:
        refuse_bad(bad)
    return items, bad


def refuse_bad(bad: Sequence[Bad]) -> None:
    """Raise one AptError if there are bad files: the first reason, how many more, and how to skip them."""
    if not bad:
        return
    first = bad[0].reason.rstrip(".")
    more = f"; {len(bad) - 1} more cannot be used either" if len(bad) > 1 else ""
    raise AptError(f"{first}{more}; --skip-bad would go on without {'them' if more else 'it'}.")


def item_id(folder: Path, path: Path) -> str:
    """The path relative to `folder`, with forward slashes, so that it does not depend on the machine."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _files(folder: Path) -> tuple[set[Path], list[Path]]:
    """All files that are not hidden, and broken links without a suffix, which were probably folders."""
    found, dangling, seen = set(), [], set()
    folders, linked = [folder], []  # links last, so that a real folder keeps its own path, not a link's
    while folders or linked:
        here = (folders or linked).pop(0)
        try:
            stat = here.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            names = sorted(os.listdir(here))
        except OSError as error:
            raise AptError(
                f"{here} cannot be read ({error.strerror}): check its permissions, or move it elsewhere."
            ) from None
        for path in (here / name for name in names if not name.startswith(".") and name not in NOT_DATA):
            if path.is_dir():
                (linked if path.is_symlink() else folders).append(path)
            elif path.is_symlink() and not path.suffix and not path.exists():
                dangling.append(path)
            else:
                found.add(path)
    return found, dangling


def _hint(path: Path, files: set[Path]) -> str:
    """A hint for the error message if a caption named as other trainers name it lies beside the file."""
    other = next(
        (
            name
            for name in (path.with_suffix(".caption"), path.with_name(path.name + ".txt"))
            if name in files
        ),
        None,
    )
    return (
        f"; {other.name} beside it is not read: rename it to {path.with_suffix('.txt').name}" if other else ""
    )


def _item(path: Path, caption: str | None, texts: Sequence[Path], files: set[Path]) -> Item:
    if path.is_symlink() and not path.exists():
        raise AptError(f"{path} is a link to {os.readlink(path)}, which does not exist: mend or remove it.")
    if not path.is_file():
        if path in files or path.exists():
            raise AptError(f"{path} is not a file that can be read: remove it.")
        raise AptError(
            f"{path} does not exist, but metadata names it: mend its file_name or remove the line."
        )
    kind = kind_of(path)
    if caption is None:
        if len(texts) > 1:
            raise AptError(
                f"{path} has {len(texts)} captions ({', '.join(sorted(text.name for text in texts))}): "
                "keep one of them."
            )
        if not texts:
            raise AptError(
                f"{path} has no "
                f"caption{_hint(path, files) or f': write one into {path.stem}.txt beside it, or remove it'}."
            )
        caption = _read_text(texts[0])
    caption = " ".join(caption.split())
    if not caption:
        raise AptError(f"{path} has an empty caption: write what it shows, or remove it.")
    return Item(path, kind, caption)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise AptError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8, with a zero after each letter
        raise AptError(f"{path} is not UTF-8 text: save it as UTF-8.")
    return text


def _metadata(folder: Path, present: list[Path]) -> tuple[dict[Path, str], list[Bad]]:
    """Captions by path, and one Bad for each line that cannot be used."""
    if len(present) > 1:
        raise AptError(f"{folder} holds both {METADATA[0]} and {METADATA[1]}: keep one of them.")
    captions, bad = {}, []
    for file in present:
        text = _read_text(file)
        for line, row in _json_rows(text) if file.suffix == ".jsonl" else _csv_rows(file, text):
            try:
                name, caption = _fields(f"{file}, line {line},", row)
                path = _named(folder, name)
                if path in captions:
                    raise AptError(
                        f"{file}, line {line}, names {name} a second time: keep one caption for each file."
                    )
                captions[path] = caption
            except AptError as error:
                bad.append(Bad(file, str(error)))
        if not captions and not bad:
            raise AptError(f"{file} is empty: write a file_name and a caption for each video and image.")
    return captions, bad


def _named(folder: Path, name: str) -> Path:
    """The file that a metadata line names.

    Tries the name as written, then without spaces around it, then with backslashes (Windows) as slashes.
    """
    paths = [
        folder / os.path.normpath(form) for form in (name, name.strip(), name.strip().replace("\\", "/"))
    ]
    return next((path for path in paths if path.is_file()), paths[1])


def _fields(where: str, row) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise AptError(f"{where} is not a JSON object: write one with file_name and caption.")
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise AptError(f"{where} has no file_name: write which file it describes.")
    if None in row:  # csv.DictReader puts surplus fields under None
        raise AptError(
            f"{where} has more fields than the header: put a caption with commas in quotation marks."
        )
    caption = next((row[column] for column in COLUMNS if row.get(column) is not None), "")
    if not isinstance(caption, str):
        raise AptError(f"{where} has a caption that is not text: write it in quotation marks.")
    return name, caption


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    # Not splitlines: it also breaks at U+2028 and its like, which JSON allows within a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict]]:
    # Strict, because an unclosed quotation mark would otherwise swallow the lines after it. Not splitlines,
    # because it also breaks at U+2028.
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        columns = reader.fieldnames or []
        if "file_name" not in columns or not any(column in columns for column in COLUMNS):
            raise AptError(
                f"{file} has the columns {', '.join(columns) or '(none)'}: "
                "it needs file_name and caption (or text)."
            )
        if twice := [column for column in ("file_name", *COLUMNS) if columns.count(column) > 1]:
            raise AptError(f"{file} has the column {twice[0]} twice: keep one of them.")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise AptError(
            f"{file}, line {reader.line_num}, is not valid CSV ({error}): export it again."
        ) from None

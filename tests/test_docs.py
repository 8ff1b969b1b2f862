"""README and docs say what is there: links lead somewhere, the functions and tests that are named exist, and
the commands are ones that the command line takes.
"""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import trainer.cli.training
import trainer.jobs.training
from apt_core.files.contract import as_lora, metadata_strings
from trainer.__main__ import app
from trainer.config import load_preset
from trainer.evaluate import metrics
from trainer.jobs.plan import metadata
from trainer.proof.variants import all_variants

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    ROOT / "example_workflows" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROSE = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "nodes" / "web" / "docs").rglob("*.md"))]
WIDEST = 110
STAGES = {"precompute": "run_precompute", "distill": "run_distill", "adversarial": "run_adversarial"}
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
TERMINAL = re.compile(r"^```sh\n(.*?)^```", re.S | re.M)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
INLINE = re.compile(r"`(?:python )?-m trainer ([^`]+)`")
COMMAND = re.compile(r"-m trainer\s+(.+)$")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def long_lines(text: str) -> list[str]:
    """Lines wider than `WIDEST` that could be broken: not of tables, nor what a program printed (a block that
    names no language), nor a line without a space, nor the README's set-up lines, which `.ci/run` takes
    whole.
    """
    found, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
            continue
        whole = line.startswith(("|", "python3 -m venv")) or language == "" or " " not in line.strip()
        if len(line) > WIDEST and not whole:
            found.append(line)
    return found


def test_long_lines_are_found_where_they_can_be_broken():
    long = "word " * 30
    assert long_lines(f"short\n{long}\n```sh\n{long}\n```\n") == [long, long]
    assert long_lines(f"| {long} |\n```\n{long}\n```\n{'x' * 200}\n") == []


@pytest.mark.parametrize("page", PROSE, ids=[page.relative_to(ROOT).as_posix() for page in PROSE])
def test_lines_of_pages_are_not_too_long(page):
    assert long_lines(text_of(page)) == []


def test_comments_beside_the_code_are_not_too_long():
    """In presets, settings, workflows and scripts of the browser; ruff looks at Python's."""
    folders = (
        "trainer/presets/*.toml",
        "*.toml",
        "requirements.txt",
        ".github/workflows/*",
        "nodes/web/*.js",
    )
    files = [path for pattern in folders for path in sorted(ROOT.glob(pattern))]
    assert len(files) > 10
    comment = re.compile(r"^(?:.*?[ \t])?(?:#|//) .*$", re.M)
    assert [
        (path.name, line) for path in files for line in comment.findall(text_of(path)) if len(line) > WIDEST
    ] == []


@pytest.mark.parametrize("page", PROSE, ids=[page.relative_to(ROOT).as_posix() for page in PROSE])
def test_no_merge_was_left_unfinished(page):
    assert re.findall(r"^(?:<{7}|>{7})|={7}$", text_of(page), re.M) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    links = [
        link.partition("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page))
        if not link.startswith(("http", "#"))
    ]
    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors_of(page: Path) -> set[str]:
    """What `#...` may be in a link to this page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text_of(page)), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_into_a_page_name_one_of_its_headings(page):
    links = re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", text_of(page))
    lost = [
        (file, anchor)
        for file, anchor in links
        if anchor not in anchors_of(page.parent / file if file else page)
    ]
    assert lost == []


def test_anchors_are_github_s():
    wanted = {"the-walk-a-one-step-lora-on-one-card-in-a-weekend", "3-look-at-the-start-and-train"}
    assert wanted <= anchors_of(ROOT / "docs" / "train.md")


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)\)", text_of(ROOT / "README.md")))
    assert linked == {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}


def rows_of_the_method() -> list[str]:
    return [
        line
        for line in text_of(ROOT / "docs" / "method.md").splitlines()
        if "tests/" in line and line.startswith("|")
    ]


def test_the_table_of_the_method_is_there():
    assert len(rows_of_the_method()) >= 20


@pytest.mark.parametrize("row", rows_of_the_method(), ids=lambda row: row.split("|")[2].strip()[:40])
def test_every_function_and_every_test_of_the_method_exists(row):
    functions, tests = re.findall(r"`([\w.]+):(\w+)`", row), re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
    assert functions and tests
    for module, name in functions:
        assert hasattr(importlib.import_module(module), name), f"{module}:{name}"
    for file, name in tests:
        defined = {
            node.name for node in ast.parse(text_of(ROOT / file)).body if isinstance(node, ast.FunctionDef)
        }
        assert name in defined, f"{file}::{name}"


def test_the_method_page_has_the_presets_numbers_of_stage_1():
    page = text_of(ROOT / "docs" / "method.md")
    wan, mini = (load_preset(name) for name in ("wan2.1-1.3b-480p", "mini"))
    paper = wan.with_recipe("paper").distill.guidance
    assert f"| {wan.distill.steps} discrete steps (the miniature: {mini.distill.steps})," in page
    said = (
        f"| {wan.distill.guidance:g} for Wan, which `--recipe paper` makes {paper:g}; "
        f"{mini.distill.guidance:g} for"
    )
    assert said in page


def test_the_format_page_names_every_entry_that_a_stage_writes():
    page = (
        text_of(ROOT / "docs" / "checkpoint-format.md")
        .partition("Names in `apt`:")[2]
        .partition("**LoRA.**")[0]
    )
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.+?)\|", page, re.M))))
    stage = metadata(load_preset("mini"), "image", "image", "demo", 0)
    average = {"phase": "image", "updates": 1, "ema": 0.9, "ema_warmup": 0.0}
    written = json.loads(metadata_strings("x", as_lora(stage | average, 16))["apt"])
    assert named == written.keys() | {"over", "edited"}


def test_the_page_of_figures_has_a_row_for_each():
    page = text_of(ROOT / "docs" / "evaluate.md")
    rows = set(re.findall(r"^\| `(\w+)` \|", page.partition("## The figures")[2].partition("\n## ")[0], re.M))
    assert rows >= {*metrics.CLIP, metrics.FLOW, metrics.DIVERSITY, metrics.CLIP_SCORE}


def commands_of(page: Path) -> list[str]:
    """What follows `-m trainer` in the page's blocks of shell lines and in its sentences, with the variables
    that the page has set so far filled in, as a shell does. A command's name alone is no command.
    """
    found, variables = [], {}
    for block in TERMINAL.findall(text_of(page).replace("\\\n", "")):
        variables |= dict(re.findall(r'^(\w+)="?([^"\n]*?)"?$', block, re.M))
        for line in block.splitlines():
            for _ in range(3):
                line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
            if match := COMMAND.search(line.partition("  #")[0]):
                found.append(match[1].strip().rstrip("'"))
    prose = BLOCK.sub("", text_of(page)).replace("\n", " ")
    return found + [command for command in INLINE.findall(prose) if " " in command and "..." not in command]


ALL = [(name, command) for page, name in zip(PAGES, NAMES) for command in commands_of(page)]


def test_there_are_commands():
    assert len(ALL) >= 60
    assert ("docs/results.md", "probe mini") in ALL  # in the middle of a sentence


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_block_hides_a_command(page):
    hidden = [body for language, body in BLOCK.findall(text_of(page)) if language != "sh"]
    assert [body for body in hidden if re.search(r"^\s*\S*(python|torchrun|pip)\b.* -\w", body, re.M)] == []


def stubbed(command, seen: list):
    """The whole command line, with nothing behind it but a note of what it was given."""
    for one in getattr(command, "commands", {}).values():
        stubbed(one, seen)
    if not hasattr(command, "commands"):
        command.callback = lambda **given: seen.append(given)
    return command


@pytest.mark.parametrize("name, command", ALL, ids=[f"{name}-{command[:50]}" for name, command in ALL])
def test_every_command_is_one_that_the_command_line_takes(name, command):
    seen: list = []
    stubbed(typer.main.get_command(app), seen).main(shlex.split(command), standalone_mode=False)
    assert len(seen) == 1


TRAINING = [
    (name, command) for name, command in ALL if command.split()[0] in STAGES and ".toml" not in command
]


@pytest.mark.parametrize(
    "name, command", TRAINING, ids=[f"{name}-{command[:50]}" for name, command in TRAINING]
)
def test_every_preset_recipe_and_setting_of_a_command_exists(name, command, monkeypatch):
    (preset,) = run_without_work(command, monkeypatch)
    assert preset.name == command.split()[1]
    if "--dry-run" not in command:
        assert files_missing(preset, command.split()[0]) == []


def files_missing(preset, stage: str) -> list[str]:
    """The files without which a stage stops: all to encode; to train the base, and what decodes samples."""
    needed = {"base", "vae", "text_encoder"} if stage == "precompute" else {"base"}
    if preset.train.sample_every:
        needed.add("vae")
    return sorted(part for part in needed if not getattr(preset.files, part))


def test_a_command_that_names_no_files_is_noticed(monkeypatch):
    for command, missing in {
        "distill wan2.1-1.3b-480p": ["base", "vae"],
        "distill wan2.1-1.3b-480p base=wan.safetensors sample_every=0": [],
        "precompute wan2.1-1.3b-480p base=wan.safetensors": ["text_encoder", "vae"],
        "adversarial mini --phase image": [],
    }.items():
        (preset,) = run_without_work(command, monkeypatch)
        assert files_missing(preset, command.split()[0]) == missing


@pytest.mark.parametrize("wrong", ["mini updats=3", "mini --recipe weekend", "minni", "mini updates=many"])
def test_a_setting_that_is_none_is_noticed(wrong, monkeypatch, capsys):
    assert run_without_work(f"adversarial {wrong} --phase image", monkeypatch) == []
    assert capsys.readouterr().err.startswith("error: ")


def run_without_work(command: str, monkeypatch) -> list:
    """The preset that a command of training arrives with, its recipe and settings in it, where it would
    begin.
    """
    seen: list = []
    for stage in STAGES.values():
        monkeypatch.setattr(
            trainer.jobs.training, stage, lambda preset, *args, **options: seen.append(preset)
        )
    monkeypatch.setattr(trainer.cli.training, "_show", lambda preset, *args, **options: seen.append(preset))
    typer.main.get_command(app).main(shlex.split(command), standalone_mode=False)
    return seen


def quoted_messages() -> list[str]:
    """What the first column of docs/troubleshooting.md quotes of a message."""
    rows = re.findall(r"^\| (.+?) \|", text_of(ROOT / "docs" / "troubleshooting.md"), re.M)
    return [message for row in rows for message in re.findall(r"`([^`]*\.\.\.[^`]*)`", row) if " " in message]


def sentences_of_the_program() -> list[str]:
    """Every string of the code, `\0` in the place of a value."""
    found = []
    for path in (file for room in ("apt_core", "trainer") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(message: str, sentences: list[str]) -> bool:
    """Whether one sentence holds all words of a message, in order, between its gaps."""
    parts = [part for part in re.split(r"\.\.\.+", message) if part.strip(" .,:()")]
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in parts), re.S)
    return any(pattern.search(sentence) for sentence in sentences)


def test_every_message_of_the_troubleshooting_page_is_one_that_the_program_says():
    messages, sentences = quoted_messages(), sentences_of_the_program()
    assert len(messages) >= 16
    assert [message for message in messages if not is_said(message, sentences)] == []
    assert not is_said("... holds the status of a run", sentences)


def test_the_rows_of_the_ablations_are_said_as_the_program_says_them():
    table = text_of(ROOT / "docs" / "results.md").split("| row | what it changes |")[1].split("\n\n")[0]
    said = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", table, re.M))
    rows = all_variants(load_preset("mini"), "proof", "image")
    assert len(said) >= 20 and said == {name: rows[name].what for name in said}


def test_a_command_that_is_none_is_noticed():
    for wrong in ("demo --sede 1", "generat mini", "export"):
        with pytest.raises(Exception, match="(?i)no such|missing"):
            stubbed(typer.main.get_command(app), []).main(shlex.split(wrong), standalone_mode=False)

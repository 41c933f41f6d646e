"""What README and docs show must exist: verbs, options, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fewscan.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """Every ``fewscan VERB ...`` in code, in blocks or in a line."""
    code = [*re.findall(r"```\w*\n(.*?)```", text, re.S), *re.findall(r"`([^`\n]+)`", text)]
    lines = [line.strip() for block in code for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"fewscan [a-z-]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_shown_exist_with_their_options(page: Path) -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for _, verb, *words in commands(page.read_text(encoding="utf-8")):
        if verb.startswith("-"):
            continue
        assert verb in verbs, verb
        command = verbs[verb]
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        assert not getattr(command, "commands", {}), (verb, words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)}
        assert not given - known, (verb, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_readme_opens_with_the_two_lines_and_warns_once() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```\w*\n(.*?)```", text, re.S)
    assert block is not None
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == ["make demo", "make test"]
    assert len(re.findall("research use only", text, re.I)) == 1


def test_the_readme_lists_every_verb() -> None:
    listed = re.findall(r"^\| `fewscan (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(get_command(app).commands)  # type: ignore[attr-defined]


def test_the_versions_agree() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert f"version: {version[1]}" in (ROOT / "CITATION.cff").read_text()
    assert f"[{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_what_is_to_be_installed_is_what_the_extras_ask_for() -> None:
    from fewscan.deliver import dicom_seg, models
    from fewscan.tracts import estimate

    text = (ROOT / "pyproject.toml").read_text()
    for extra, told in (("dicom", dicom_seg.NEEDS), ("onnx", models.NEEDS), ("tracts", estimate.NEEDS)):
        listed = re.search(rf"^{extra} = \[(.*)\]$", text, re.M)
        assert listed is not None
        assert told.partition("pip install ")[2] == " ".join(f'"{name}"' for name in re.findall(r'"(.*?)"', listed[1]))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_installing_works_in_every_shell(page: Path) -> None:
    commands = re.findall(r"pip install [^`\n]*", page.read_text(encoding="utf-8"))
    assert not [line for line in commands if "'" in line or "#" in line]  # cmd.exe knows neither

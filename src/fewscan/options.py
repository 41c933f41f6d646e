"""What the verbs of the command line share: the application, the options, small conversions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from fewscan.errors import ConfigError

T = TypeVar("T")

app = typer.Typer(
    help="From a handful of labelled 3D scans to a measured segmenter. For research use only.",
    epilog="Start with [bold]fewscan demo[/bold]. Exit codes: 0 done, 1 faults found, 2 refused, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

Data = Annotated[Path, typer.Argument(help="Folder of scans, in any layout.", metavar="DATA")]
Budget = Annotated[
    str | None, typer.Option(help="Wall clock to spend, such as 90s or 1h30m; 10m unless told.", metavar="TIME")
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps, instead of a budget.", min=1)]
Seed = Annotated[int, typer.Option(help="Same seed and machine, same numbers.", min=0)]
Device = Annotated[
    str, typer.Option(help="auto (a GPU where CUDA finds one), cpu, cuda, cuda:1 for the second GPU, or mps.")
]
Deforming = Annotated[
    str, typer.Option("--device", help="auto (a GPU where CUDA finds one), cpu, cuda, or cuda:1 for the second GPU.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory for training, or for the logits of a prediction, not to exceed, such as 4GiB.", metavar="SIZE"
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting; repeatable.", metavar="KEY=VALUE")
]
Personalize = Literal["never", "auto", "always"]
Method = Annotated[
    str,
    typer.Option(
        help="auto, segment, register or joint; auto is joint where there are unlabelled scans, unless labels overlap.",
        metavar="METHOD",
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option(help="Where scans are, if they have moved; repeatable.", metavar="FOLDER"),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result here; - prints it alone.")]


def examples(*lines: str) -> str:
    """Help text that shows commands, one on each line.

    Parameters
    ----------
    *lines : str
        Commands without the program's name.
    """
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  fewscan {escape(line)}" for line in lines)])


def stdout() -> Console:
    """Where results go."""
    return Console(highlight=False, soft_wrap=True)


def parsed(parse: Callable[[str], T], text: str, *, flag: str) -> T:
    """Parse what was given; a refusal names the option.

    Parameters
    ----------
    parse : callable
        Text to value.
    text : str
        Of the option.
    flag : str
        The option.

    Raises
    ------
    ConfigError
        If it cannot be parsed.
    """
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None


def maybe(parse: Callable[[str], T], text: str | None, *, flag: str) -> T | None:
    """Parse what was given, if anything was.

    Parameters
    ----------
    parse : callable
        Text to value.
    text : str, optional
        Of the option.
    flag : str
        The option.

    Raises
    ------
    ConfigError
        If it cannot be parsed.
    """
    return None if text is None else parsed(parse, text, flag=flag)


def pairs(settings: Sequence[str]) -> dict[str, str]:
    """Split ``key=value`` words.

    Parameters
    ----------
    settings : sequence of str
        As given by ``--set``.

    Raises
    ------
    ConfigError
        If a word has no key or no value.
    """
    found = {}
    for word in settings:
        key, sign, value = word.partition("=")
        if not (key and sign):
            raise ConfigError(f"--set needs KEY=VALUE, such as train.lr=0.01, got {word!r}")
        found[key.strip()] = value.strip()
    return found


def parse_folds(text: str) -> int | Literal["loo"]:
    """Number of folds, or one for each patient.

    Parameters
    ----------
    text : str
        Of the option.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if text == "loo":
        return "loo"
    if not text.isdecimal() or int(text) < 2:
        raise ConfigError(f"--folds must be loo or a number of at least 2, got {text!r}")
    return int(text)


def to_json(content: Mapping[str, Any], path: Path | None) -> bool:
    """Write to the path; true when it is ``-``, so that nothing else must be printed.

    Parameters
    ----------
    content : mapping
        What JSON can hold.
    path : Path, optional
        File, or ``-`` for standard output.
    """
    if path is None:
        return False
    text = json.dumps(content, indent=1) + "\n"
    if str(path) == "-":
        typer.echo(text, nl=False)
        return True
    from fewscan.data.io import atomic

    with atomic(path) as part:
        part.write_text(text)
    return False

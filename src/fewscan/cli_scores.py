"""What the command line says of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fewscan.options import stdout, to_json

if TYPE_CHECKING:
    from fewscan.judge.results import Evaluation

MOST_NAMED = 20


def show_scores(evaluation: Evaluation, json_file: Path | None) -> None:
    """Write or print an evaluation, and what has no say in its figures.

    Parameters
    ----------
    evaluation : Evaluation
        To show.
    json_file : Path, optional
        File to write it to as well; ``-`` prints the JSON alone.
    """
    from fewscan.tables import scores

    content = evaluation.to_json()
    if json_file is not None and str(json_file) != "-":
        evaluation.save(json_file)
    elif to_json(content, json_file):
        return
    screen = stdout()
    screen.print(scores(content))
    screen.print(verdict(content), markup=False)
    unmatched = content.get("unmatched", {})
    show_left_out("References without a prediction", unmatched.get("references", ()), screen=screen)
    show_left_out("Predictions without a reference", unmatched.get("predictions", ()), screen=screen)


def show_left_out(what: str, ids: Sequence[str], *, screen: Console) -> None:
    """One line on cases that have no say in the figures; none where there are none.

    Parameters
    ----------
    what : str
        They are.
    ids : sequence of str
        Of the cases.
    screen : Console
        To print on.
    """
    if ids:
        more = f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else ""
        screen.print(f"{what} ({len(ids)}): {', '.join(ids[:MOST_NAMED])}{more}", markup=False)


def verdict(evaluation: Mapping[str, Any]) -> str:
    """The mean Dice in a sentence.

    Parameters
    ----------
    evaluation : mapping
        Its JSON.
    """
    dice = evaluation["summary"]["dice"]
    low, high = dice["low"], dice["high"]
    if dice["mean"] is None:
        return "No scan could be scored."
    interval = "" if low is None else f" (95 % interval {low:.3f} to {high:.3f})"
    return f"Mean Dice {dice['mean']:.3f}{interval} over {dice['n']} scans. For research use only."

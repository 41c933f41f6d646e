"""The report's part about transfer: which model was kept, why, and what became of the old population."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from fewscan.deliver import markup
from fewscan.deliver.markup import Cell, cell, number
from fewscan.deliver.records import figure, part, parts
from fewscan.deliver.sections import Run, tile

SAID = {
    ("adapted", "cross-validation"): "The adapted model was kept: on cases left out it was better than the one before.",
    ("base", "cross-validation"): "The model from before was kept: on cases left out the adapted one was no better.",
    (
        "adapted",
        "signs",
    ): "The adapted model was kept: no sign speaks against it. One labelled patient cannot show that "
    "it is better on others.",
    ("base", "signs"): "The model from before was kept: a sign speaks against the adapted one.",
    ("adapted", "nothing"): "The adapted model was kept. Nothing could be checked.",
}
"""What was kept and by which evidence, in words."""

COST = (
    "The model from before was kept: on the labels that it knows the adapted one was worse, and what that learnt of "
    "new labels does not make up for it."
)
"""Where known labels were lost for new ones."""

COST_ONE = "The model from before was kept: the adapted one was much worse on {}, whatever others gained."
"""Where some known labels were lost for others."""


def transfer(run: Run) -> str:
    """The verdict, Dice of every labelled case before and after, the weights, and what was forgotten.

    Parameters
    ----------
    run : Run
        Shown when its model came of a transfer.
    """
    record = part(run.model or {}, "transfer")
    if not record:
        return ""
    said = SAID.get((str(record.get("kept")), str(record.get("by"))), "")
    if record.get("kept") == "base" and part(record, "shared").get("lost"):
        shared = part(record, "shared")
        worse = ", ".join(escape(str(name)) for name in shared.get("worse") or ())
        said = COST if "labels" in shared or not worse else COST_ONE.format(worse)
    return "".join([f"<p>{said}</p>", _figures(record), _cases(record), _old(part(record, "source")), _weights(record)])


def signed(value: float) -> Cell:
    """A change in Dice points, with its sign.

    Parameters
    ----------
    value : float
        Difference of two Dice values; NaN shows a dash.
    """
    return Cell(f"{100 * value:+.1f}", value) if math.isfinite(value) else Cell(markup.ABSENT, -2.0)


def _figures(record: Mapping[str, Any]) -> str:
    before, after, old = figure(record, "base"), figure(record, "adapted"), part(record, "source")
    learnt = record.get("by") == "signs"
    tiles = []
    if math.isfinite(after):
        meaning = "on the case it learnt from: no accuracy" if learnt else "each case by a network that has not seen it"
        tiles.append(tile("Dice, adapted", number(after), between=f"{number(before)} before", meaning=meaning))
    if math.isfinite(figure(old, "after")):
        tiles.append(
            tile(
                "Dice, old population", number(figure(old, "after")), between=f"{number(figure(old, 'before'))} before",
                meaning="on a sample of it: what the model that was kept has forgotten",
            )
        )  # fmt: skip
    return f'<ul class="figures">{"".join(tiles)}</ul>' if tiles else ""


def _cases(record: Mapping[str, Any]) -> str:
    tables = []
    how = "the network has learnt this case" if record.get("by") == "signs" else "cross-validated"
    for key, title, caption in (
        ("cases", "Labelled case", f"Dice of each labelled case of the new population before and after; {how}."),
        ("labels", "Label", "Dice of each label over these cases."),
    ):
        rows = []
        for name, row in sorted(parts(record, key).items(), key=lambda item: figure(item[1], "adapted")):
            before, after = figure(row, "base"), figure(row, "adapted")
            rows.append([Cell(name), cell(before, bar=True), cell(after, bar=True), signed(after - before)])
        if len(rows) > (key == "labels"):
            tables.append(markup.table([title, "before", "adapted", "points"], rows, caption=caption))
    signs = [
        [Cell(name), cell(figure(row, "base"), 3), cell(figure(row, "adapted"), 3)]
        for name, row in parts(record, "signs").items()
    ]
    if signs:
        caption = "Dice between the answers to a scan without labels and to a disturbed copy of it. It is no accuracy."
        tables.append(markup.table(["Sign", "before", "adapted"], signs, caption=caption))
    return "".join(tables)


def _old(source: Mapping[str, Any]) -> str:
    rows = []
    for name, row in parts(source, "cases").items():
        before, after = figure(row, "before"), figure(row, "after")
        seen = Cell("yes" if row.get("trained") else "no")
        rows.append([Cell(name), cell(before, bar=True), cell(after, bar=True), signed(after - before), seen])
    unread = [str(name) for name in source.get("unread") or ()]
    left = f"<p>Of the old population could not be read: {escape(', '.join(unread))}.</p>" if unread else ""
    if not rows:
        return left
    caption = (
        "Old population: Dice of a sample with the model from before and with the one that was kept. Named as trained "
        "on: a case of that name taught the model from before."
    )
    return markup.table(["Case", "before", "after", "points", "named as trained on"], rows, caption=caption) + left


def _weights(record: Mapping[str, Any]) -> str:
    weights = part(record, "weights")
    asked, layers = record.get("asked"), record.get("layers")
    facts = {
        "layers that learnt": f"{layers} (auto)" if asked == "auto" else layers,
        "weights kept": weights.get("kept"),
        "weights adapted": weights.get("adapted") or "none",
        "weights new": weights.get("new") or "none",
        "labels, and where they come from": {k: v or "new" for k, v in part(weights, "labels").items()},
        "labels given up": weights.get("dropped") or "none",
        "channels, and where they come from": part(weights, "channels"),
        "not kept, and why": record.get("changes") or "nothing",
    }
    return markup.fold("What was taken over", markup.facts({k: v for k, v in facts.items() if v is not None}))

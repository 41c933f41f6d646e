"""Section and figure of ``benchmarks/tracts.py``: three findings tested, controls, baselines, a real subject."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tract_statistics as stats
from page_parts import pyplot, save, table
from scipy.stats import spearmanr
from tract_statistics import TWINS, Estimate, Row

from fewscan.judge.statistics import Paired, bootstrap_interval, paired_test
from fewscan.tracts.bundles import TARGETS

INPUTS = ("peaks", "tensor", "scalars")
MODES = ("none", "all", "decoder", "last", "norms", "guarded", "scratch")
PARTS = ("systematic", "tumour", "interaction")
LEAST_SHARE = 0.5  # of the systematic loss, that adaptation is expected to bring back
COLOURS = {"A_healthy": "#0072b2", "A_tumour": "#56b4e9", "B_healthy": "#d55e00", "B_tumour": "#e69f00"}


def runs(rows: Sequence[Row], kind: str, mode: str, k: int | None = None) -> list[Row]:
    """Rows of one network of the benchmark, one a draw; of the largest k where none is given, and alike in all else."""
    found = stats.chosen(comparable(rows), task="bundles", input=kind, mode=mode)
    most = max((row["key"]["k"] for row in found), default=0) if k is None else k
    return [row for row in found if row["key"]["k"] == most]


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Rows of one number of people and one length of training each for the model of the healthy and for what follows.

    Those that most rows of networks have; of as many, the largest. A row that says nothing of a length needs none.
    """
    people = main_of(stats.chosen(rows, task="bundles"), "people")
    found = [row for row in rows if row["key"].get("people", "") == people]
    for name in ("source", "adapt"):
        main = main_of(stats.chosen(found, task="bundles"), name)
        found = [row for row in found if not main or row["key"].get(name, "") in ("", main)]
    return found


def main_of(rows: Sequence[Row], name: str) -> str:
    """The value of a key that most rows have; of as many the one with the largest numbers."""
    said = Counter(str(row["key"].get(name, "")) for row in rows)
    if name != "people":  # where nothing is said, they are the usual ones
        del said[""]
    sizes = {text: [float(word) for word in text.split() if word[0].isdigit()] for text in said}
    return max(said, key=lambda text: (said[text], sizes[text], text), default="")


def left_out(rows: Sequence[Row], kept: Sequence[Row]) -> list[str]:
    """Which rows the figures are of, where others are in the table."""
    others = [row for row in rows if row not in kept and row["key"]["task"] != "inputs"]
    if not others:
        return []
    networks = stats.chosen(kept, task="bundles")
    said = [f"{name} {main}" for name in ("people", "source", "adapt") if (main := main_of(networks, name))]
    return [f"Figures are of rows with {', '.join(said)}; {len(others)} others are in the table alone.", ""]


def known(rows: Sequence[Row]) -> dict[str, Any]:
    """What is known of the test people."""
    found = stats.chosen(rows, task="cohort")
    return dict(found[0]["truth"]) if found else {}


def summary(rows: list[Row]) -> list[str]:
    """Everything below the table of rows.

    Parameters
    ----------
    rows : list of dict
        Of ``tracts.json``.
    """
    every, rows = rows, comparable(rows)
    lines = [
        *left_out(every, rows),
        *networks(rows),
        *drop(rows),
        *gain(rows),
        *displaced(rows),
        *controls(rows),
        *baselines(rows),
    ]
    lines += real(rows)
    if runs(rows, "peaks", "none"):
        lines += [
            "![Dice of the twins by labelled patients, the loss in parts, and against displacement](tracts.svg)",
            "",
        ]
    return lines


def networks(rows: Sequence[Row]) -> list[str]:
    """Each network: the four twins, the loss in parts and what came back of it."""
    cells = []
    for kind in INPUTS:
        base = runs(rows, kind, "none")
        for mode in MODES:
            for k in sorted({row["key"]["k"] for row in stats.chosen(rows, task="bundles", input=kind, mode=mode)}):
                mine = runs(rows, kind, mode, k)
                means = stats.subjects(mine).values()
                dice = [f"{stats.mean(m[twin] for m in means):.3f}" for twin in TWINS]
                back = [""] * 2
                if base and mode not in ("none", "scratch"):
                    back = [percent(stats.recovered(mine, base, kind=part)) for part in PARTS[:2]]
                cells.append([
                    kind, mode, str(k), str(len(mine)), *dice,
                    *(points(stats.lost(mine, part)) for part in PARTS), *back,
                ])  # fmt: skip
    if not cells:
        return []
    heads = ["input", "mode", "k", "draws", *(twin.replace("_", " ") for twin in TWINS)]
    heads += [*PARTS, "systematic recovered", "tumour recovered"]
    told = "Mean Dice over test people; losses in Dice points and shares with 95 % bootstrap intervals over people:"
    return [told, "", *table(heads, cells), ""]


def drop(rows: Sequence[Row]) -> list[str]:
    """First finding: from the healthy under A to patients under B."""
    lines = []
    for kind in INPUTS:
        if base := runs(rows, kind, "none"):
            total = stats.lost(base, "total")
            means = stats.subjects(base).values()
            paired = paired_test([m["A_healthy"] for m in means], [m["B_tumour"] for m in means])
            lines.append(
                f"(1) {kind}: A healthy less B with tumour is {points(total)} points over {paired.n} people, "
                f"p = {paired.p:.2g}; a significant drop: {shown(total.low > 0)}."
            )
    return spaced(lines)


def gain(rows: Sequence[Row]) -> list[str]:
    """Second finding: fine-tuning with the whole pool against none and scratch, and the systematic loss it recovers."""
    lines = []
    for kind in INPUTS:
        tuned, base = runs(rows, kind, "all"), runs(rows, kind, "none")
        if not (tuned and base):
            continue
        k = tuned[0]["key"]["k"]
        better = []
        for other, theirs in (("none", base), ("scratch", runs(rows, kind, "scratch", k))):
            if theirs:
                paired = stats.against(tuned, theirs, twin="B_tumour")
                better.append(paired.low > 0)
                lines.append(f"(2) {kind}, k={k}, B with tumour: all beside {other} {pair(paired)}.")
        share = stats.recovered(tuned, base, kind="systematic")
        passed = len(better) == 2 and all(better) and share.value >= LEAST_SHARE
        lines.append(
            f"(2) {kind}, k={k}: {percent(share)} of the systematic loss recovered; better than both, and at least "
            f"{100 * LEAST_SHARE:.0f} % of it: {shown(passed)}."
        )
    return spaced(lines)


def displaced(rows: Sequence[Row]) -> list[str]:
    """Third finding: what comes back of the tumour loss, by true displacement."""
    tuned, base, truth = runs(rows, "peaks", "all"), runs(rows, "peaks", "none"), known(rows)
    if not (tuned and base and truth):
        return []
    if not (found := stats.tracts(base, tuned, truth)):
        return []
    cells = []
    for low, high, inside in stats.binned(found):
        people = [t.person for t in inside]
        share = stats.ratio([t.before - t.after for t in inside], [t.before for t in inside], groups=people)
        means = [f"{100 * stats.mean(getattr(t, name) for t in inside):.1f}" for name in ("before", "after")]
        cells.append([span(low, high), str(len(inside)), str(len(set(people))), *means, percent(share)])
    ranks = {name: rank(found, name) for name in ("before", "after")}
    share = stats.recovered(tuned, base, kind="tumour")
    told = (
        f"(3) peaks, k={tuned[0]['key']['k']}, reported: {percent(share)} of the tumour loss recovered. Loss of a "
        f"bundle against its true displacement: Spearman {ranks['before']:.2f} before, {ranks['after']:.2f} after."
    )
    heads = ["true displacement, mm", "bundles", "people", "tumour loss before, points", "after", "recovered"]
    return [told, "", *table(heads, cells), ""]


def controls(rows: Sequence[Row]) -> list[str]:
    """What must vanish, and whether it does."""
    lines = []
    for mode, part in (("B=A", "systematic"), ("radius 0", "tumour")):
        for row in stats.chosen(rows, task="null", mode=mode):
            lines.append(f"Control, {mode}: {part} loss {points(stats.lost([row], part))} points.")
    worth = stats.chosen(rows, task="null", mode="chance")
    for row in stats.chosen(rows, task="null", mode="shuffled"):
        dice = stats.mean(m["A_healthy"] for m in stats.subjects([row]).values())
        beside = f"; true masks under the names of others are worth {worth[0]['dice']:.3f}" if worth else ""
        lines.append(f"Control, shuffled names: Dice {dice:.3f} on A healthy{beside}.")
    base, truth = runs(rows, "peaks", "none"), known(rows)
    if base and truth:
        far, away = stats.far_target(base, truth, TARGETS), f"{stats.FAR_MM:.0f} mm or more away"
        if math.isfinite(far.value):
            lines.append(f"Control, tumours {away}: tumour loss of the target {points(far)} points.")
    return spaced(lines)


def baselines(rows: Sequence[Row]) -> list[str]:
    """Registration alone, beside the model of the healthy and the adapted one."""
    lines = []
    for row in stats.chosen(rows, task="baseline"):
        for mode, twin in (("none", "A_healthy"), ("none", "B_tumour"), ("all", "B_tumour")):
            if mine := runs(rows, "peaks", mode):
                paired = stats.against(mine, [row], twin=twin)
                k = f", k={mine[0]['key']['k']}" if mode != "none" else ""
                lines.append(f"peaks, {mode}{k}, {twin.replace('_', ' ')}: beside {row['key']['mode']} {pair(paired)}.")
    return spaced(lines)


def real(rows: Sequence[Row]) -> list[str]:
    """Each bundle of the real subject."""
    lines: list[str] = []
    for row in stats.chosen(rows, task="real"):
        cells = [[name, f"{dice:.3f}", f"{row['ceilings'][name]:.3f}"] for name, dice in row["bundles"].items()]
        lines += [
            f"A real subject's released {row['key']['input']}, never trained on: mean Dice {row['dice']:.3f} over "
            f"{len(cells)} bundles; two processing runs of that scan agree at {row['ceiling']:.3f}. The cohort's "
            "anatomy is theirs, so that this is no new person:",
            "",
            *table(["bundle", "Dice", "two runs"], cells),
            "",
        ]
    return lines


def plot(rows: Sequence[Row], out: Path) -> None:
    """Dice of the twins by labelled patients, the loss in parts before and after, tumour loss against displacement.

    Parameters
    ----------
    rows : sequence of dict
        Of ``tracts.json``, with the model of the healthy on peaks.
    out : Path
        SVG file.
    """
    rows = comparable(rows)
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=(1, 1.25, 1))
    _by_labels(axes[0], rows)
    _parts(axes[1], rows)
    _by_displacement(axes[2], rows)
    save(figure, out)


def _by_labels(axis: Any, rows: Sequence[Row]) -> None:
    """Twins of the adapted network, solid; scratch on patients, dashed."""
    for mode, style, twins in (("all", "-o", TWINS), ("scratch", "--s", ("B_tumour",))):
        labels = sorted({row["key"]["k"] for row in stats.chosen(rows, task="bundles", input="peaks", mode=mode)})
        named = [("none", 0)] * (mode == "all") + [(mode, k) for k in labels]
        for twin in twins:
            dice = [[m[twin] for m in stats.subjects(runs(rows, "peaks", m, k)).values()] for m, k in named]
            means = [stats.mean(values) for values in dice]
            low, high = zip(*(bootstrap_interval(values) for values in dice), strict=True) if dice else ((), ())
            label = twin.replace("_", " ") + (", scratch" if mode == "scratch" else "")
            places = [k for _, k in named]
            axis.plot(places, means, style, color=COLOURS[twin], markersize=4, label=label)
            axis.vlines(places, low, high, color=COLOURS[twin], alpha=0.4)
    ticks = sorted({0, *(row["key"]["k"] for row in stats.chosen(rows, task="bundles", input="peaks"))})
    axis.set(xlabel="labelled patients", ylabel="Dice, peaks", xscale="symlog", xticks=ticks, xticklabels=ticks)
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)


def _parts(axis: Any, rows: Sequence[Row]) -> None:
    """Losses before, full, and after adaptation, light; one group an input."""
    colours = dict(zip(PARTS, ("#0072b2", "#d55e00", "#999999"), strict=True))
    width = 0.13
    shown = [kind for kind in INPUTS if runs(rows, kind, "none")]
    for group, kind in enumerate(shown):
        for i, part in enumerate(PARTS):
            for j, mode in enumerate(("none", "all")):
                if mine := runs(rows, kind, mode):
                    found = scaled(stats.lost(mine, part))
                    place = group + (2 * i + j - 2.5) * width
                    axis.bar(place, found.value, width, color=colours[part], alpha=(1, 0.4)[j])
                    axis.vlines(place, found.low, found.high, color="black", linewidth=1)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xticks=range(len(shown)), xticklabels=shown, ylabel="loss, Dice points; light: after, largest k")
    handles = [pyplot().Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axis.margins(y=0.25)
    axis.legend(handles, PARTS, frameon=False, fontsize=8, ncols=3, loc="upper center")


def _by_displacement(axis: Any, rows: Sequence[Row]) -> None:
    """Tumour loss of each bundle of each person before and after, bin means, and the share that came back."""
    tuned, base, truth = runs(rows, "peaks", "all"), runs(rows, "peaks", "none"), known(rows)
    found = stats.tracts(base, tuned, truth) if tuned and base and truth else []
    if not found:
        axis.set_axis_off()
        return
    bins = stats.binned(found)
    middle = [stats.mean(t.displacement_mm for t in inside) for _, _, inside in bins]
    for name, colour in (("before", "#d55e00"), ("after", "#009e73")):
        every = [(t.displacement_mm, 100 * getattr(t, name)) for t in found]
        axis.plot(*zip(*every, strict=True), ".", color=colour, alpha=0.25, markersize=4)
        means = [100 * stats.mean(getattr(t, name) for t in inside) for _, _, inside in bins]
        axis.plot(middle, means, "-D", color=colour, markersize=5, label=name)
    top = max(100 * max(t.before, t.after) for t in found)
    for place, (_, _, inside) in zip(middle, bins, strict=True):
        share = stats.ratio([t.before - t.after for t in inside], [t.before for t in inside]).value
        if math.isfinite(share):
            axis.annotate(f"{100 * share:.0f} %", (place, top * 1.08), ha="center", fontsize=8, color="#009e73")
    axis.set_ylim(top=top * 1.2)
    axis.set(xlabel="true displacement of a bundle, mm", ylabel="tumour loss, Dice points")
    axis.set_title("at the top: share recovered", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))


def scaled(found: Estimate) -> Estimate:
    """In Dice points."""
    return Estimate(value=100 * found.value, low=100 * found.low, high=100 * found.high)


def points(found: Estimate) -> str:
    """Dice points with the interval."""
    return f"{signed(100 * found.value, 1):+.1f}{bounds(100 * found.low, 100 * found.high, '+.1f')}"


def percent(found: Estimate) -> str:
    """A share with its interval; a dash where nothing was lost."""
    if not math.isfinite(found.value):
        return "-"
    return f"{signed(100 * found.value, 0):.0f} %{bounds(100 * found.low, 100 * found.high, '.0f')}"


def bounds(low: float, high: float, form: str) -> str:
    """The interval in brackets, nothing where there is none."""
    digits = int(form[-2])
    return f" [{signed(low, digits):{form}}, {signed(high, digits):{form}}]" if math.isfinite(low) else ""


def signed(value: float, digits: int) -> float:
    """Rounded, without a minus before a zero."""
    return round(value, digits) + 0.0


def pair(found: Paired) -> str:
    """A paired difference."""
    value = Estimate(value=found.difference, low=found.low, high=found.high)
    return f"{points(value)} points over {found.n} people, p = {found.p:.2g}"


def shown(passed: bool) -> str:
    """Verdict on a finding."""
    return "shown" if passed else "not shown"


def span(low: float, high: float) -> str:
    """A bin in words."""
    return f"{low:g} and more" if math.isinf(high) else f"{low:g} to {high:g}"


def rank(found: Sequence[stats.Tract], name: str) -> float:
    """Spearman's correlation of a loss with displacement; NaN where either is constant, or of nothing."""
    pairs = [(t.displacement_mm, getattr(t, name)) for t in found]
    if not pairs or any(len(set(values)) < 2 for values in zip(*pairs, strict=True)):
        return math.nan
    return float(spearmanr(*zip(*pairs, strict=True))[0])


def spaced(lines: list[str]) -> list[str]:
    """Each line a paragraph of a list, with an empty line behind."""
    return [*(f"- {line}" for line in lines), ""] if lines else []

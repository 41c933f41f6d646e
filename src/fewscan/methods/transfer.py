"""Transfer to another population: a trained segmenter, adapted with few labelled cases, kept only where it is better.

Riccardi et al.: "Supervised white matter bundle segmentation in glioma patients with transfer learning", Medical Image
Analysis 2025, doi 10.1016/j.media.2025.103766. Only the abstract was readable: fine-tuning on few patients manages the
systematic shift of measurement and pre-processing, but cannot follow large deformations by tumours. This is a
re-implementation of that idea; layers, rates and guard are ours.

Weights are matched by name and shape, the rows of the last layer by label name, the columns of the first by channel
(`learn.grafting`). What is new learns first on a frozen trunk; then the chosen layers follow at a smaller rate. Beside
the network that is kept, one for each fold of a cross-validation takes its turns in the same run, so that all are
annealed when the budget ends and each labelled case has an answer from a network that has not seen it. The trained
model is kept where these answers are no better than its own, or worse on the labels that it knows: what it scores 0 on
because it never learnt it must not hide that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fewscan.data import dataset as datasets
from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.dicom_labels import plain_name
from fewscan.errors import DataError, FewscanError, ModelError
from fewscan.judge.metrics import dice
from fewscan.learn import grafting, infer
from fewscan.learn.answers import Segmented
from fewscan.learn.batches import Prepared
from fewscan.learn.channels import said
from fewscan.learn.checkpoint import Model, build_segmenter
from fewscan.learn.engine import Phase
from fewscan.learn.grafting import Grafted
from fewscan.learn.hardware import Hardware
from fewscan.learn.networks import Absent, layers
from fewscan.learn.request import Request
from fewscan.learn.session import Session, open_session
from fewscan.learn.state import State
from fewscan.methods import segment
from fewscan.methods.evidence import consistency
from fewscan.space.volume import IGNORE, Case

AUTO = "all"  # layers that learn when nothing else is asked for: decisions/010-transfer.md
JUDGING = 0.08  # most of a budget that the trained model's answers may take; the adapted ones' take as long
MARGIN = 1.3  # on the time that the answers took the first time
LOST = 0.02  # Dice that may be lost: on the labels known before, and between the answers to a scan and a disturbed copy
LOOKED = 3  # scans without labels that consistency is judged on
SOURCE_CASES = 8  # of the sample that tells what was forgotten

Scores = dict[str, dict[str, float]]  # case to label to Dice


@dataclass(frozen=True, eq=False)
class _Learner:
    """A network of the run, what it learns from, and the cases that it never sees."""

    network: nn.Module
    cases: Sequence[Prepared]
    held: Sequence[str]
    steps: int


def run(request: Request, *, source: Dataset | None = None) -> Model:
    """Adapt the model that a request starts from, and leave the better of the two as a model folder.

    Parameters
    ----------
    request : Request
        With a base; its labelled cases are of the new population.
    source : Dataset, optional
        Labelled cases of the old one, on a sample of which forgetting is measured; that takes time beyond the budget.

    Raises
    ------
    DataError
        If nothing is labelled, or the old population lacks a channel that either model needs.
    ModelError
        If the base has no segmenter.
    """
    base = request.base
    if base is None or isinstance(base.segmenter, Absent):
        raise ModelError(f"{base.path if base else 'no model'}: it only registers; give one that segments")
    if source is not None:
        _refuse_unreadable(source, base, adapted=request.dataset.channels)
    with open_session(request, unlabelled=LOOKED, plan_of=grafting.plan_of) as session:
        for change in grafting.changes(session.plan, base.plan):
            request.say(change)
        learners, grafted = _learners(session, base)
        request.say(str(grafted))
        files = _order(session, learners)
        begin = time.monotonic()
        before = _before(session, base, files)
        spent = time.monotonic() - begin
        state = _fit(session, learners, grafted, reserve=spent)
        verdict = _verdict(session, base, state, learners=learners, before=before)
        request.say(verdict["reason"])
        return _finish(session, base, state.average_of(learners[0].network), grafted, verdict, source)


def _refuse_unreadable(source: Dataset, base: Model, *, adapted: Sequence[str]) -> None:
    """Before anything is spent: both models must be able to read the old population, whichever is kept."""
    plan = base.plan
    for channels in (plan.channels, tuple(adapted) if plan.kind == "scalar" else plan.channels):
        if grafting.columns_of(source.channels, replace(plan, channels=channels), kind=source.kind) is None:
            raise DataError(
                f"{source.root}: {said(source.kind)} with the channels {', '.join(source.channels)} cannot tell what "
                f"is forgotten: {said(plan.kind)} with {', '.join(channels)} are read; leave --source out"
            )


def _learners(session: Session, base: Model) -> tuple[list[_Learner], Grafted]:
    """The network to keep, and one for each fold; all start alike."""
    labelled = {case.id: case for case in session.labelled}
    chosen = datasets.select(session.request.dataset, labelled=list(labelled))
    patients = len({case.patient for case in chosen.labelled})
    config = session.settings.transfer
    folds = min(config.folds, patients) if config.guard else 1
    split = datasets.folds(chosen, folds, seed=session.request.seed) if folds > 1 else []
    parts: list[tuple[Sequence[Prepared], Sequence[str]]] = [(session.labelled, [])]
    parts += [([labelled[i] for i in seen], held) for seen, held in split]
    learners = []
    for i, (cases, held) in enumerate(parts):
        network = build_segmenter(session.plan, session.settings, seed=session.request.seed)
        grafted = grafting.graft(network, base, plan=session.plan)
        steps = max(1, len(split)) if i == 0 else 1  # half of the time for what is kept
        learners.append(_Learner(network.to(session.hardware.device), cases, held, steps))
    return learners, grafted


def _order(session: Session, learners: Sequence[_Learner]) -> list[CaseFiles]:
    """Cases to judge, those of different folds in turns: if time is short, each fold has some."""
    files = {case.id: case for case in session.request.dataset.labelled}
    held = [list(one.held) for one in learners[1:]] or [[case.id for case in session.labelled]]
    longest = max(len(ids) for ids in held)
    return [files[ids[i]] for i in range(longest) for ids in held if i < len(ids)]


def _before(session: Session, base: Model, files: Sequence[CaseFiles]) -> Scores:
    """The trained model's Dice, on as many cases as a share of the budget allows; nothing where it lacks a channel."""
    request, begin, scores = session.request, time.monotonic(), Scores()
    if grafting.columns(base.plan.channels, session.plan.channels) is None or not session.settings.transfer.guard:
        return scores
    budget = request.budget or request.extend
    for case in files:
        if request.dry_run or (scores and budget and time.monotonic() - begin > JUDGING * budget):
            break
        scores[case.id] = score(base, datasets.load(case, request.dataset), hardware=session.hardware)
    return scores


def score(model: Model, case: Case, *, hardware: Hardware) -> dict[str, float]:
    """Dice of each label of a case that occurs in it or in the model's answer; labels belong together by name.

    Parameters
    ----------
    model : Model
        Whose channels the case has.
    case : Case
        Labelled.
    hardware : Hardware
        Where to predict.

    Raises
    ------
    ModelError
        If the case lacks a channel of the model.
    """
    image = grafting.arranged(case.image, model.plan, case=case.id)
    answer = infer.segment(model, image, predictor=infer.torch_predictor(model, hardware))
    return score_answer(answer, case, model=model)


def score_answer(answer: Segmented, case: Case, *, model: Model) -> dict[str, float]:
    """As `score`, of an answer that is there already.

    Parameters
    ----------
    answer : Segmented
        Of the model, on the case's grid.
    case : Case
        Labelled.
    model : Model
        Whose labels the answer has.
    """
    assert case.label is not None
    numbers = {plain_name(name): value for value, name in model.names.items()}
    looked = case.label.data != IGNORE
    found = {}
    for value, name in case.label.names.items():
        if case.drawn is None or value in case.drawn:
            number = numbers.get(plain_name(name))
            mask = np.zeros(looked.shape, bool) if number is None else answer.mask(number, model.plan) & looked
            if not np.isnan(overlap := dice(mask, case.label.mask(value))):
                found[name] = overlap
    return found


def _fit(session: Session, learners: Sequence[_Learner], grafted: Grafted, *, reserve: float) -> State:
    """What is new on a frozen trunk, then the layers asked for; time for the answers at the end is left over."""
    config = session.settings.transfer
    which = layers(learners[0].network, AUTO if config.layers == "auto" else config.layers)

    def phases(name: str, *, learns: frozenset[str], lr: float) -> list[Phase]:
        return [
            replace(
                segment.phase(session, cases=one.cases, segmenter=one.network, name=name if i == 0 else "folds"),
                learns=learns, lr=lr, steps=one.steps,
            )
            for i, one in enumerate(learners)
        ]  # fmt: skip

    warm = config.warm if grafted.fresh else 0.0
    session.fit(phases("warm-up", learns=grafted.fresh or which, lr=session.settings.train.lr), until=warm)
    seconds = session.bounds.seconds
    until = 1.0 if seconds is None else max(warm, 1 - (MARGIN * reserve + 1) / seconds)
    return session.fit(phases("adapt", learns=which | grafted.fresh, lr=config.lr), until=until)


def _verdict(
    session: Session, base: Model, state: State, *, learners: Sequence[_Learner], before: Scores
) -> dict[str, Any]:
    """Which of the two is kept, by what can be checked, and why."""
    if session.interrupted:
        return {"kept": "adapted", "by": "nothing", "reason": "transfer was stopped before anything could be checked"}
    if not session.settings.transfer.guard:
        return {"kept": "adapted", "by": "nothing", "reason": "kept the adapted model unchecked, as asked for"}
    if not before:
        reason = "kept the adapted model: the one it started from cannot read these scans, so there is none to compare"
        return {"kept": "adapted", "by": "nothing", "reason": reason}
    files = {case.id: case for case in session.request.dataset.labelled}
    after: Scores = {}
    for learner in learners[1:] or learners:
        model = replace(base, segmenter=state.average_of(learner.network), plan=session.plan)
        for case in learner.held or list(before):
            if case in before:
                loaded = datasets.load(files[case], session.request.dataset)
                after[case] = score(model, loaded, hardware=session.hardware)
    cases = {i: dict(zip(("base", "adapted"), _paired(before[i], after[i]), strict=True)) for i in before}
    means = {k: float(np.mean([row[k] for row in cases.values()])) for k in ("base", "adapted")}
    shared = _shared(base, before, after)
    found = {"cases": cases, "labels": _by_label(before, after), **means} | ({"shared": shared} if shared else {})
    if learners[1:]:
        kept = "adapted" if means["adapted"] > means["base"] and not shared.get("lost") else "base"
        reason = (
            f"kept the {_called(kept)}: cross-validated Dice over {len(cases)} labelled case(s) "
            f"{means['base']:.3f} before, {means['adapted']:.3f} adapted{_said(shared)}"
        )
        return found | {"kept": kept, "by": "cross-validation", "folds": len(learners) - 1, "reason": reason}
    return found | _by_signs(session, base, state.average_of(learners[0].network), means, shared)


def _shared(base: Model, before: Scores, after: Scores) -> dict[str, Any]:
    """Dice on the labels that the trained model knows, where there are others; nothing where it knows all or none."""
    known = {plain_name(name) for name in base.names.values()}
    names = {name for row in (*before.values(), *after.values()) for name in row}
    shared = {name for name in names if plain_name(name) in known}
    if not shared or shared == names:
        return {}
    rows = []
    for case in before:
        one, other = ({name: row[case][name] for name in shared & row[case].keys()} for row in (before, after))
        rows += [_paired(one, other)] if one or other else []  # none of them was looked for, or all are rightly absent
    base_mean, adapted_mean = (float(np.mean(column)) for column in zip(*rows, strict=True))
    lost = adapted_mean < base_mean - LOST
    return {"labels": sorted(shared), "base": base_mean, "adapted": adapted_mean, "lost": lost}


def _said(shared: Mapping[str, Any]) -> str:
    """What became of the labels that the trained model knows, in words."""
    if not shared:
        return ""
    said = f"; on the labels known before {shared['base']:.3f} before, {shared['adapted']:.3f} adapted"
    return said + (
        f", where no more than {LOST:g} may be lost for new ones (--set transfer.guard=false keeps the adapted one)"
        if shared["lost"]
        else ""
    )


def _by_signs(
    session: Session, base: Model, adapted: nn.Module, means: Mapping[str, float], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """With one labelled patient none can be left out: a collapse shows, a gain does not."""
    signs: dict[str, dict[str, float]] = {}
    hardware, looked = session.hardware, session.unlabelled[:LOOKED]
    own, other = ((p.spacing, p.channels, p.classes, p.overlapping) for p in (session.plan, base.plan))
    if looked and own == other:
        signs["consistency"] = {}
        for name, network in (("base", base.segmenter), ("adapted", adapted)):
            predictor = infer.network_predictor(network.to(hardware.device).eval(), hardware)
            same = [consistency(case, session, predictor=predictor) for case in looked]
            signs["consistency"][name] = float(np.mean(same))
    fitted = means["adapted"] > means["base"] and not shared.get("lost")
    steady = all(row["adapted"] >= row["base"] - LOST for row in signs.values())
    kept = "adapted" if fitted and steady else "base"
    said = f"Dice on the labelled case itself {means['base']:.3f} before, {means['adapted']:.3f} adapted{_said(shared)}"
    for name, row in signs.items():
        said += f"; {name} on scans without labels {row['base']:.3f} before, {row['adapted']:.3f} adapted"
    reason = (
        f"kept the {_called(kept)}: {said}. One labelled patient cannot show that it is better on others; label a "
        "second one for a cross-validation"
    )
    return {"kept": kept, "by": "signs", "signs": signs, "reason": reason}


def _called(kept: str) -> str:
    return "adapted model" if kept == "adapted" else "model as it was"


def _by_label(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for case in before:
        for name in before[case] | after[case]:
            found.setdefault(name, []).append((before[case].get(name, 1.0), after[case].get(name, 1.0)))
    return {
        name: dict(zip(("base", "adapted"), map(float, np.mean(rows, 0)), strict=True)) for name, rows in found.items()
    }


def _paired(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, float]:
    """Mean Dice of a case by two models. A label that only the other's row has is rightly absent: 1, as `mean_dice`."""
    names = one.keys() | other.keys()
    first, second = (float(np.mean([row.get(n, 1.0) for n in names])) if names else 1.0 for row in (one, other))
    return first, second


def _finish(
    session: Session, base: Model, adapted: nn.Module, grafted: Grafted, verdict: dict[str, Any], source: Dataset | None
) -> Model:
    """Write the model that is kept, with where it came from and what spoke for it."""
    config = session.settings.transfer
    came = {key: base.provenance.get(key) for key in ("method", "sha256")}
    if "transfer" in base.provenance:  # then the whole way is told
        came["from"] = base.provenance["transfer"].get("from")
    record = {
        "from": came,
        "layers": AUTO if config.layers == "auto" else config.layers,
        "asked": config.layers,
        "weights": grafted.to_dict(),
        "changes": grafting.changes(session.plan, base.plan),
        **verdict,
    }
    keeps = verdict["kept"] == "adapted"
    segmenter = adapted if keeps else base.segmenter
    plan = session.plan if keeps else replace(base.plan, names=grafting.renumbered(base.names, session.plan.names))
    others = base.others if plan.channels == base.plan.channels else {}
    model = session.finish(segmenter, others=others, record={"transfer": record}, plan=plan)
    if source is None or session.interrupted:
        return model
    record["source"] = _forgotten(base, replace(base, segmenter=segmenter, plan=plan), source, session)
    return session.finish(segmenter, others=others, record={"transfer": record}, plan=plan)  # the model was safe before


def _forgotten(base: Model, kept: Model, source: Dataset, session: Session) -> dict[str, Any]:
    """Dice of both models on labelled cases of the old population; those called as the base's training are marked."""
    say, rng, known = session.request.say, np.random.default_rng(session.request.seed), source.labelled
    drawn = [known[i] for i in sorted(rng.permutation(len(known))[:SOURCE_CASES].tolist())]
    trained = {str(i) for i in base.provenance.get("labelled", ())}
    rows: dict[str, dict[str, Any]] = {}
    unread = []
    for files in drawn:
        try:
            case = datasets.load(files, source)
            pair = _paired(*(score(model, case, hardware=session.hardware) for model in (base, kept)))
        except FewscanError as error:  # one damaged scan does not cost the others theirs
            say(f"{files.id} of the old population is left out: {error}")
            unread.append(files.id)
            continue
        rows[files.id] = {"before": pair[0], "after": pair[1], "trained": files.id in trained}
    found: dict[str, Any] = {"cases": rows} | ({"unread": unread} if unread else {})
    if not rows:
        say("on the old population: no case could be judged")
        return found
    found |= {k: float(np.mean([row[k] for row in rows.values()])) for k in ("before", "after")}
    say("on the old population: Dice {before:.3f} before, {after:.3f} after".format(**found))
    return found

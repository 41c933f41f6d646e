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
because it never learnt it must not hide that, and neither must a gain of one label the loss of another.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fewscan.data import dataset as datasets
from fewscan.data.contents import contents_of
from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.listing import read_json
from fewscan.errors import DataError, FewscanError, ModelError
from fewscan.learn import grafting, infer
from fewscan.learn.batches import Prepared
from fewscan.learn.channels import said
from fewscan.learn.checkpoint import Model, build_segmenter, write_json
from fewscan.learn.engine import Phase
from fewscan.learn.folder import BEFORE
from fewscan.learn.grafting import Grafted
from fewscan.learn.networks import Absent, layers
from fewscan.learn.request import Request
from fewscan.learn.session import Session, open_session
from fewscan.learn.state import State
from fewscan.methods import segment
from fewscan.methods.evidence import consistency
from fewscan.methods.scores import (
    LOST,
    Scores,
    before_and_after,
    by_label,
    ever_trained_on,
    paired,
    said_of,
    score,
    shared_labels,
    trained_on,
)

AUTO = "all"  # layers that learn when nothing else is asked for: decisions/010-transfer.md
JUDGING = 0.08  # most of a budget that the trained model's answers may take; the adapted ones' take as long
MARGIN = 1.3  # on the time that the answers took the first time
MOST_RESERVED = 0.4  # of a budget: what was not learnt needs no answers
LOOKED = 3  # scans without labels that consistency is judged on
SOURCE_CASES = 8  # of the sample that tells what was forgotten


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
        before, each = _before(session, base, _unseen(_order(session, learners), base))
        reserve = each * _answers(session, base, learners, judged=len(before))
        state = _fit(session, learners, grafted, reserve=reserve)
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


def _unseen(files: Sequence[CaseFiles], base: Model) -> list[CaseFiles]:
    """Cases that the trained model has not learnt from, by their names; all where too few patients are left to ask."""
    seen = ever_trained_on(base.provenance)
    found = [case for case in files if case.id not in seen]
    return found if len({case.patient for case in found}) > 1 else list(files)


def _witnesses(base: Model, session: Session, before: Scores) -> tuple[dict[str, list[str]], str]:
    """Cases called as those that the trained model has learnt from: those that were asked and those that were not."""
    called = sorted(ever_trained_on(base.provenance) & {case.id for case in session.labelled})
    asked, left = [i for i in called if i in before], [i for i in called if i not in before]
    if asked:
        told = f"; {len(asked)} called so were learnt from before, which speaks for the model as it was"
        return {"seen": asked}, told
    return ({"left_out": left}, f"; {len(left)} called as what it has learnt from not asked") if left else ({}, "")


def _before(session: Session, base: Model, files: Sequence[CaseFiles]) -> tuple[Scores, float]:
    """The trained model's Dice, on as many cases as a share of the budget allows, and the seconds that one took.

    Nothing where it lacks a channel. A run that goes on has them already, of the cases whose files are as they were.
    """
    request, scores, spent = session.request, Scores(), 0.0
    if grafting.columns(base.plan.channels, session.plan.channels) is None or not session.settings.transfer.guard:
        return scores, 0.0
    known = _known(request) if request.going_on else {}
    budget = request.budget or request.extend
    for case in files:
        row, contents = known.get(case.id, {}), contents_of(case, request.dataset)
        if row.get("of") == contents:
            scores[case.id], took = row["scores"], row["seconds"]
        elif request.dry_run or (scores and budget and spent * _finer(session, base) > JUDGING * budget):
            break
        else:
            begin = time.monotonic()
            scores[case.id] = score(base, datasets.load(case, request.dataset), hardware=session.hardware)
            took = time.monotonic() - begin
            known[case.id] = {"of": contents, "scores": scores[case.id], "seconds": took}
        spent += took
    if not request.dry_run:
        write_json({"cases": known}, request.out / BEFORE)
    return scores, spent / max(1, len(scores))


def _known(request: Request) -> dict[str, Any]:
    """What an earlier part of the run has found; nothing where that cannot be read."""
    try:
        found = read_json(request.out / BEFORE)
        rows = {case: {"of": row["of"], "scores": dict(row["scores"]), "seconds": float(row["seconds"])}
                for case, row in found["cases"].items()}  # fmt: skip
    except (FewscanError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return rows


def _finer(session: Session, base: Model) -> float:
    """How many times as long as the base the adapted model takes for an answer, whose voxels may be finer."""
    return max(1.0, float(np.prod(base.plan.spacing) / np.prod(session.plan.spacing)))


def _alike(session: Session, base: Model) -> bool:
    """Whether both networks can be asked the same, on one grid."""
    own, other = ((p.spacing, p.channels, p.classes, p.overlapping) for p in (session.plan, base.plan))
    return own == other


def _answers(session: Session, base: Model, learners: Sequence[_Learner], *, judged: int) -> float:
    """How many answers of the base the verdict will take as long as."""
    signs = 4 * len(session.unlabelled[:LOOKED])  # a scan and its copy, by two networks, where none can be left out
    return judged * _finer(session, base) + (signs if _alike(session, base) and not learners[1:] else 0)


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

    new = phases("warm-up", learns=grafted.fresh or which, lr=session.settings.train.lr)
    session.fit(new, until=0.0)  # from here on it is known what ends the run
    warm, seconds = config.warm if grafted.fresh else 0.0, session.bounds.seconds
    until = 1.0 if seconds is None else max(warm, 1 - MOST_RESERVED, 1 - (MARGIN * reserve + 1) / seconds)
    if warm:
        session.fit(new, until=warm, annealed=until)
    return session.fit(phases("adapt", learns=which | grafted.fresh, lr=config.lr), until=until, annealed=until)


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
    whose = {case: files[case].patient for case in before}
    cases = {i: dict(zip(("base", "adapted"), paired(before[i], after[i]), strict=True)) for i in before}
    means = before_and_after([(whose[i], row["base"], row["adapted"]) for i, row in cases.items()])
    labels = by_label(before, after, whose=whose)
    shared = shared_labels(base, labels, before=before, after=after, whose=whose)
    found = {"cases": cases, "labels": labels, **means} | ({"shared": shared} if shared else {})
    noted, remark = _witnesses(base, session, before)
    found |= noted
    if learners[1:]:
        kept = "adapted" if means["adapted"] > means["base"] and not shared.get("lost") else "base"
        reason = (
            f"kept the {_called(kept)}: cross-validated Dice over {len(cases)} labelled case(s) "
            f"{means['base']:.3f} before, {means['adapted']:.3f} adapted{said_of(shared)}{remark}"
        )
        return found | {"kept": kept, "by": "cross-validation", "folds": len(learners) - 1, "reason": reason}
    signs = _by_signs(session, base, state.average_of(learners[0].network), means, shared)
    return found | signs | {"reason": signs["reason"] + remark}


def _by_signs(
    session: Session, base: Model, adapted: nn.Module, means: Mapping[str, float], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """With one labelled patient none can be left out: a collapse shows, a gain does not."""
    signs: dict[str, dict[str, float]] = {}
    hardware, looked = session.hardware, session.unlabelled[:LOOKED]
    if looked and _alike(session, base):
        signs["consistency"] = {}
        for name, network in (("base", base.segmenter), ("adapted", adapted)):
            predictor = infer.network_predictor(network.to(hardware.device).eval(), hardware)
            same = [consistency(case, session, predictor=predictor) for case in looked]
            signs["consistency"][name] = float(np.mean(same))
    fitted = means["adapted"] > means["base"] and not shared.get("lost")
    steady = all(row["adapted"] >= row["base"] - LOST for row in signs.values())
    kept = "adapted" if fitted and steady else "base"
    said = (
        f"Dice on the labelled case itself {means['base']:.3f} before, {means['adapted']:.3f} adapted{said_of(shared)}"
    )
    for name, row in signs.items():
        said += f"; {name} on scans without labels {row['base']:.3f} before, {row['adapted']:.3f} adapted"
    reason = (
        f"kept the {_called(kept)}: {said}. One labelled patient cannot show that it is better on others; label a "
        "second one for a cross-validation"
    )
    return {"kept": kept, "by": "signs", "signs": signs, "reason": reason}


def _called(kept: str) -> str:
    return "adapted model" if kept == "adapted" else "model as it was"


def _finish(
    session: Session, base: Model, adapted: nn.Module, grafted: Grafted, verdict: dict[str, Any], source: Dataset | None
) -> Model:
    """Write the model that is kept, with where it came from and what spoke for it."""
    config = session.settings.transfer
    came = {key: base.provenance.get(key) for key in ("method", "sha256")}
    came["labelled"] = sorted(trained_on(base.provenance))
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
    if not session.interrupted:
        (session.request.out / BEFORE).unlink(missing_ok=True)
    if source is None or session.interrupted:
        return model
    record["source"] = _forgotten(base, replace(base, segmenter=segmenter, plan=plan), source, session)
    return session.finish(segmenter, others=others, record={"transfer": record}, plan=plan)  # the model was safe before


def _forgotten(base: Model, kept: Model, source: Dataset, session: Session) -> dict[str, Any]:
    """Dice of both models on labelled cases of the old population; those called as the base's training are marked."""
    say, rng, known = session.request.say, np.random.default_rng(session.request.seed), source.labelled
    trained = ever_trained_on(base.provenance)
    known = tuple(case for case in known if case.id not in trained) or known  # what was learnt by heart is no measure
    drawn = [known[i] for i in sorted(rng.permutation(len(known))[:SOURCE_CASES].tolist())]
    rows: dict[str, dict[str, Any]] = {}
    unread = []
    for files in drawn:
        try:
            case = datasets.load(files, source)
            pair = paired(*(score(model, case, hardware=session.hardware) for model in (base, kept)))
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

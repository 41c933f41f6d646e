"""Joint registration and segmentation: unlabelled scans teach both networks, down to one labelled scan.

Xu & Niethammer: "DeepAtlas: Joint Semi-supervised Learning of Image Registration and Segmentation", MICCAI 2019,
arXiv 1904.08465; their loss names in brackets. The registrar learns from image similarity (L_i), smoothness (L_r) and
the overlap of warped and fixed labels (L_a); the segmenter from drawn labels (L_sp) and from warped ones on unlabelled
scans (L_a). Both are trained apart first, then in turns, one frozen while the other learns. A pair of which both scans
are labelled trains the registrar's L_a only, a pair of which neither is trains nobody's.

What is ours: the labels of an unlabelled scan are a vote of several atlases, each optimised from the registrar's
answer, and of the averaged segmenter, by what each is worth (`methods.pseudo`); they are renewed between rounds and
cached, so that segmentation steps on unlabelled scans cost no more, and are as strongly augmented, as those on labelled
ones. Beside each stands the nearest labelled scan in its shape, whose labels are exact (Zhao et al. 2019, arXiv
1902.09383). The segmenter learns first, then the registrar, then both in turns: where labelled scans kept from the
segmenter tell that steps promise more than scans, it gets all of the time, and no registrar is trained. At the end the
segmenter of before the turns is kept where the evidence speaks against what came of them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import shutil
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import safetensors
import safetensors.torch
from torch import nn

from fewscan.data.io import atomic
from fewscan.data.listing import read_json
from fewscan.errors import DataError, ModelError
from fewscan.learn import infer
from fewscan.learn.batches import Prepared, labelled_as
from fewscan.learn.checkpoint import Model, read_description, write_json
from fewscan.learn.engine import Phase, stop_on_signals
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar
from fewscan.learn.request import Request
from fewscan.learn.session import Session, open_session
from fewscan.learn.state import State
from fewscan.methods import register, segment
from fewscan.methods.evidence import fit, guard
from fewscan.methods.pseudo import COMPARED, LABELLING, Index, Labeller, fused, index_of

SEGMENTER_STEPS = 10  # in a row, on drawn labels
COST = 0.45  # of a registration step by a segmentation step, for each voxel: measured on a CPU
LAST = 0.95  # share of the run at which the turns end: what is left anneals on drawn labels
GUARD = 0.98  # share at which training ends, so that the guard fits into the budget
FITTED = 0.8  # least Dice on the scans it learns from with which a segmenter is ready for others
HELD = 5  # of so many labelled scans one is kept from the segmenter while it is trained apart; of three, one, too
BEHIND = 0.05  # expected Dice by which the segmenter must be behind the atlases for the log to say so
DECISION = "scans"  # name of the note that says whether unlabelled scans help
PSEUDO = "pseudo"  # where a run that goes on finds what it had between its parts
WARPED_VALUES = 50_000_000  # of warped scans held at a time


Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, eq=False)
class _Both:
    """Two networks, the segmenter's phase, whether an earlier part has decided, the user's wish to stop."""

    session: Session
    alone: Phase
    registrar: Registrar
    held: frozenset[str]
    decided: bool
    stop: threading.Event

    @functools.cached_property
    def cases(self) -> Sequence[Whole]:
        """The scans that both share, aligned once it is known that they can help."""
        return register.wholes(self.session, self.registrar)

    @functools.cached_property
    def together(self) -> Phase:
        """Of the registrar."""
        return register.phase(self.session, self.registrar, cases=self.cases)

    @property
    def limits(self) -> str:
        """Of this run, in a word."""
        bounds = self.session.bounds
        return f"{bounds.steps}n" if bounds.seconds is None else f"{bounds.seconds:g}s"

    def tag(self, name: str) -> Path:
        """File of this run: one with other limits must not find it."""
        return self.session.request.out / PSEUDO / f"{name}-{self.limits}"

    def fit(self, phases: Sequence[Phase], *, until: float = 1.0) -> State:
        """Train on, unless somebody wished to stop since."""
        self.session.interrupted |= self.stop.is_set()
        return self.session.fit(phases, until=until, later=[self.registrar])

    def noted(self, name: str, question: Callable[[], Answer], *, otherwise: Answer) -> Answer:
        """The answer to a question, which stays what it was when a run goes on; otherwise, where nobody asks."""
        path = self.tag(f"{name}.json")
        if self.session.request.going_on and path.is_file():
            with contextlib.suppress(DataError, KeyError):  # damaged: asked again
                return cast(Answer, read_json(path)["answer"])
        if self.session.request.dry_run or self.session.interrupted or self.stop.is_set():
            return otherwise
        answer = question()
        path.parent.mkdir(exist_ok=True)
        write_json({"answer": answer}, path)
        return answer

    def shared(self, phases: Sequence[Phase]) -> list[Phase]:
        """The segmenter's phases and the registrar's, which gets its share of the time by what their steps cost."""
        share, patch = self.session.settings.joint.registrar, float(np.prod(self.session.plan.patch))
        patch *= self.session.plan.batch
        others = sum(phase.steps for phase in phases) * patch / (COST * float(np.prod(self.registrar.shape)))
        return [*phases, dataclasses.replace(self.together, steps=max(1, round(others * share / (1 - share))))]


def run(request: Request) -> Model:
    """Train both networks, or the segmenter alone where that promises more.

    Parameters
    ----------
    request : Request
        Data, limits, settings.

    Raises
    ------
    DataError
        If nothing is labelled, there is one scan only, or labels overlap.
    """
    request.dataset.one_label_each("--method joint")
    with open_session(request, unlabelled=register.pool(request)) as session, stop_on_signals() as stop:
        register.enough(session)
        alone = dataclasses.replace(segment.phase(session), steps=SEGMENTER_STEPS)
        both = _Both(session, alone, register.build(session), _held(session), _decided(request), stop)
        state, early = _apart(both)
        unasked: dict[str, Any] = {"help": False}
        found = both.noted(DECISION, lambda: _scans_help(both, state, early), otherwise=unasked)
        if "reason" in found:
            request.say(found["reason"])
        if found["help"]:
            return _in_turns(both, state, found)
        return _finish(both, both.fit([alone]), found)


def _apart(both: _Both) -> tuple[State, float]:
    """Train the segmenter by itself, for its share of the time that both have so; and Dice on unseen scans half-way."""
    config = both.session.settings.joint
    seen = [case for case in both.session.labelled if case.id not in both.held]
    alone = segment.phase(both.session, cases=seen, segmenter=both.alone.train)
    first = dataclasses.replace(alone, steps=SEGMENTER_STEPS)
    phases = both.shared([first]) if both.session.request.dry_run else [first]  # which tells what all of it takes
    end = config.apart * (1 - config.registrar)
    state = both.fit(phases, until=end / 2)
    early = both.noted("early", lambda: _fit(both, state, held=True), otherwise=0.0) if both.held else 0.0
    return both.fit([first], until=end), early


def _in_turns(both: _Both, state: State, found: Mapping[str, Any]) -> Model:
    """Train the registrar by itself, then both, each with what the other knows."""
    session, config = both.session, both.session.settings.joint
    session.interrupted |= both.stop.is_set()
    if session.interrupted:
        return _finish(both, state, found)
    together = both.together  # aligns the scans, which takes its time, too
    begin = both.noted("registrar", session.fraction, otherwise=config.apart)  # later in a run that is extended
    state = both.fit([together], until=max(config.apart, begin + config.apart * config.registrar))
    before = _kept(both, state)
    labeller = Labeller(session, both.cases, path=both.tag)
    _ready(both, state, labeller)  # also where a run goes on and reads the labels of its rounds
    for turn in range(config.rounds if session.unlabelled else 0):
        until = config.apart + (LAST - config.apart) * (turn + 1) / config.rounds
        if session.fraction() < until and not session.interrupted:
            phases = _phases(both, labeller, _labels(both, state, labeller, turn))
            state = both.fit(phases, until=min(until, LAST))
    guarded = session.unlabelled and session.bounds.seconds is not None
    last = [both.alone] if session.unlabelled else both.shared([both.alone])
    state = both.fit(last, until=GUARD if guarded else 1.0)
    return _finish(both, state, found, before=before, labeller=labeller)


def _decided(request: Request) -> bool:
    """Whether an earlier part of this run, with whatever limits, got beyond the decision: all scans were seen since."""
    if not request.going_on:
        return False
    with contextlib.suppress(ModelError):  # killed before there was a model
        scans = read_description(request.out).get("scans", {})
        if scans.get("help") or "seen" in scans:
            return True
    return any((request.out / PSEUDO).glob(f"{DECISION}.json-*"))


def _held(session: Session) -> frozenset[str]:
    """Labelled scans that the segmenter does not see at first, whole patients; the others hold every label."""
    labelled = {case.id: case for case in session.labelled}
    if len(labelled) < 3 or not session.unlabelled or not session.settings.joint.decide:
        return frozenset()
    rng, held = np.random.default_rng([session.request.seed, HELD]), list[str]()
    for patient in rng.permutation(sorted({case.whose for case in session.labelled})):
        away = {*held, *(name for name, case in labelled.items() if case.whose == patient)}
        rest = [case for name, case in labelled.items() if name not in away]
        every = all(
            any(case.counts[k] for case in rest) or not any(labelled[name].counts[k] for name in away)
            for k in range(1, session.plan.classes)
        )
        if every and 2 * len(away) <= len(labelled) and len(held) < max(1, len(labelled) // HELD):
            held = list(away)
    return frozenset(held)


def _fit(both: _Both, state: State, *, held: bool = False) -> float:
    """Mean Dice on labelled scans that the segmenter has learnt from, or on those that were kept from it."""
    predictor = infer.network_predictor(state.average_of(both.alone.train).eval(), both.session.hardware)
    cases = [case for case in both.session.labelled if (case.id in both.held) == held]
    return float(np.mean([fit(case, both.session, predictor=predictor) for case in cases[:COMPARED]]))


def _scans_help(both: _Both, state: State, early: float) -> dict[str, Any]:
    """Whether more scans promise more than more steps do, for scans that were never seen; with the figures.

    More scans can close the gap between seen and unseen ones. What steps bring follows from what the last doubling of
    their number brought. Joint training takes about half a doubling away, and may well close half of the gap.
    """
    if not (both.session.unlabelled and both.session.settings.joint.decide):  # both networks were asked for
        return {"help": True}
    found: dict[str, Any] = {"help": True, "seen": round(_fit(both, state), 4)}
    alone = "the segmenter learns on from drawn labels alone, and no registration network is trained"
    if found["seen"] < FITTED:
        low = f"the drawn labels are not fitted yet (Dice {found['seen']:.2f})"
        return found | {"help": False, "reason": f"{low}: {alone}; see whether fewscan draft labels such scans better"}
    if not both.held or both.decided:
        return found
    found |= {"unseen": round(_fit(both, state, held=True), 4), "half_way": round(early, 4), "kept": len(both.held)}
    found["help"] = found["seen"] - found["unseen"] > max(0.0, found["unseen"] - early)
    told = "unlabelled scans can help" if found["help"] else f"steps promise more than scans, {alone}"
    found["reason"] = (
        f"Dice {found['seen']:.3f} on scans that the segmenter learns from, {found['unseen']:.3f} on {found['kept']} "
        f"kept from it, and {early:.3f} there half-way: {told}"
    )
    return found


def _phases(both: _Both, labeller: Labeller, labels: Mapping[str, Index]) -> list[Phase]:
    """Turns of one round: drawn labels, pseudo-labels, registration."""
    session, config = both.session, both.session.settings.joint
    drawn = np.logical_or.reduce([case.drawn for case in session.labelled])
    if config.teach != "segmenter":
        for case in both.cases:
            if not case.labelled and case.id in labels:
                case.label = case.place.labels_onto_shared(labels[case.id], classes=session.plan.classes)
                case.drawn = drawn
    if config.teach == "registrar":
        return both.shared([both.alone])
    taught = [
        dataclasses.replace(labelled_as(case, labels[case.id]), drawn=drawn)
        for case in session.unlabelled
        if case.id in labels
    ]
    useful = [case for case in taught if any(case.counts[1:])]
    share = min(config.unlabelled, len(useful) / (len(useful) + len(session.labelled)))  # few must not be repeated
    steps = round(SEGMENTER_STEPS * share / max(0.2, 1 - share))
    if steps < 1:
        return both.shared([both.alone])
    useful += _warped(session, labeller, labels) if config.warped else []
    anatomy = segment.phase(session, cases=useful, segmenter=both.alone.train, name="anatomy")
    return both.shared([both.alone, dataclasses.replace(anatomy, steps=steps)])


def _labels(both: _Both, state: State, labeller: Labeller, turn: int) -> Mapping[str, Index]:
    """Pseudo-labels of a round; read back when a run goes on."""
    session, path = both.session, both.tag(f"round{turn}")
    if session.request.going_on and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name.removeprefix("label "): stored[name] for name in stored.files}
        except (ValueError, OSError, KeyError, zipfile.BadZipFile):
            session.request.say(f"{path} is damaged; its scans are labelled again")
    labels = _label(both, state, labeller, turn)
    if both.stop.is_set():  # some of them: the run that goes on makes all
        return labels
    with atomic(path) as temporary, Path(temporary).open("wb") as file:
        np.savez(file, **{f"label {name}": label for name, label in labels.items()})  # type: ignore[arg-type]
    return labels


def _ready(both: _Both, state: State, labeller: Labeller, *, count: int = 0) -> None:
    """Let a labeller use the networks as they are now, for so many scans."""
    predictor = infer.network_predictor(state.average_of(both.alone.train).eval(), both.session.hardware)
    labeller.begin(cast(Registrar, state.average_of(both.registrar).eval()), predictor, count=count)


def _label(both: _Both, state: State, labeller: Labeller, turn: int) -> dict[str, Index]:
    """What atlases and segmenter say together of as many scans as there is time for."""
    session, config, unlabelled = both.session, both.session.settings.joint, both.session.unlabelled
    drawn = [unlabelled[i] for i in np.random.default_rng([session.request.seed, turn]).permutation(len(unlabelled))]
    asked = [case for case in drawn if labeller.drafted(case)]  # those first, which cost little
    new = [case for case in drawn if not labeller.drafted(case)][: config.scans]
    order = [*asked, *new]
    session.request.say(f"labelling up to {len(order)} unlabelled scan(s) by atlases and segmenter")
    _ready(both, state, labeller, count=len(new))
    rating = labeller.rating(order)
    session.request.say(str(rating))
    answer: dict[str, Index] = {}
    doubted = 0
    for done, case in enumerate(order):
        if both.stop.is_set() or (done and labeller.spent() > LABELLING):
            break
        drafted = labeller.draft(case)
        if drafted is None or not labeller.believed(drafted):
            doubted += 1
            continue
        belief = labeller.belief(case) if config.agree else None
        answer[case.id] = fused(*drafted.vote, belief=belief, trust=rating.weights)
    if doubted:
        session.request.say(f"{doubted} scan(s) left out: their atlases contradict each other")
    return answer


def _warped(session: Session, labeller: Labeller, labels: Mapping[str, Index]) -> list[Prepared]:
    """Labelled scans in the shape of the unlabelled ones they are nearest to: exact labels on anatomies that exist."""
    labelled = {case.id: case for case in session.labelled}
    answer: list[Prepared] = []
    for name in labels:
        drafted = labeller.draft(labeller.cases[name])
        if drafted is not None and sum(one.image.size for one in answer) < WARPED_VALUES:
            nearest = drafted.nearest
            atlas = dataclasses.replace(labelled[nearest.name], image=nearest.image.numpy())
            answer.append(labelled_as(atlas, index_of(nearest.label)))
    return answer


def _kept(both: _Both, state: State) -> nn.Module:
    """The segmenter as it was trained apart; on disk, because a run that goes on needs it again."""
    kept = copy.deepcopy(state.average_of(both.alone.train))
    if both.session.request.dry_run or both.session.interrupted:
        return kept
    path = both.tag("apart")
    if both.session.request.going_on and path.is_file():
        try:
            kept.load_state_dict(safetensors.torch.load_file(path))
            return kept
        except (safetensors.SafetensorError, RuntimeError, OSError):
            both.session.request.say(f"{path} is damaged; the guard compares with the segmenter as it is now")
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in kept.state_dict().items()}, temporary)
    return kept


def _finish(
    both: _Both,
    state: State,
    found: Mapping[str, Any],
    *,
    before: nn.Module | None = None,
    labeller: Labeller | None = None,
) -> Model:
    """Keep the better segmenter by evidence that needs no further label; the registrar where it was trained."""
    session = both.session
    after, verdict = state.average_of(both.alone.train), {}
    whole = not (session.request.dry_run or session.interrupted or both.stop.is_set())
    if before is not None and session.unlabelled and whole:
        verdict = guard(session, before=before, after=after, held=both.held)
        session.request.say(verdict["reason"])
    kept = before if before is not None and verdict.get("kept") == "apart" else after
    if verdict and labeller is not None:
        verdict |= _compared(both, labeller, kept)
    trained = state.place_of(both.registrar) in state.first
    others = {"registrar": state.average_of(both.registrar)} if trained else {}
    record = {"guard": verdict, "scans": dict(found)}
    model = session.finish(kept, others=others, record=record)
    if not session.interrupted:  # label maps of other people's scans must not travel with the model
        shutil.rmtree(session.request.out / PSEUDO, ignore_errors=True)
    return model


def _compared(both: _Both, labeller: Labeller, segmenter: nn.Module) -> dict[str, float]:
    """What the atlases are worth beside the segmenter in the end; says so where that is more.

    Nothing where no round labelled a scan, or no labelled scan could be left out to measure it.
    """
    session = both.session
    drafted = [case for case in session.unlabelled if labeller.drafted(case)]
    if not drafted:
        return {}
    labeller.predictor = infer.network_predictor(segmenter.eval(), session.hardware)
    rating = labeller.rating(drafted)
    if rating.assumed:
        return {}
    if rating.segmenter < rating.atlases - BEHIND:
        session.request.say(f"{rating}: fewscan draft labels such scans better; a longer --budget helps the segmenter")
    return {"atlases": round(rating.atlases, 4), "segmenter": round(rating.segmenter, 4)}

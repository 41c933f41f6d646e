"""What to label next: unlabelled scans ranked by what their labels would bring, and how many more it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fewscan import api, forecasting
from fewscan.data import kinds
from fewscan.data.dataset import CaseFiles, Dataset, patient_of
from fewscan.data.io import read_image
from fewscan.deliver.markup import without_folders
from fewscan.deliver.records import part
from fewscan.errors import ConfigError, DataError, FewscanError, ModelError
from fewscan.judge import acquisition, looks
from fewscan.judge.acquisition import Candidate, Suggestion
from fewscan.judge.doubt import doubt
from fewscan.judge.learning_curve import LearningCurve, learning_curve
from fewscan.judge.looks import Look
from fewscan.judge.results import plain
from fewscan.learn import checkpoint
from fewscan.learn.channels import said
from fewscan.learn.engine import Status
from fewscan.learn.grafting import columns
from fewscan.learn.hardware import memory_told, pick
from fewscan.learn.infer import torch_predictor
from fewscan.learn.inputs import find_scans
from fewscan.learn.networks import Absent
from fewscan.learn.request import Observer
from fewscan.runs import Training
from fewscan.space.volume import Volume

FILE = "suggest.json"
LABELLED = 0.3  # of a budget, at most, for looking at the labelled scans
TRANSFERRED = "The curve's models are trained by {} from nothing: what this one brought from elsewhere is not in them."

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """Which scans to label next, and what more labels are expected to bring.

    Parameters
    ----------
    ranked : tuple of Suggestion
        The next one first.
    skipped : mapping of str to str
        Scans that could not be judged, and why.
    late : int
        Scans that the budget left no time for.
    labelled : int
        Scans that are labelled already.
    unseen : int
        Of those, how many could not be read or came too late, so that nothing was compared with them.
    curve : LearningCurve, optional
        Where it was asked for.
    seconds : float
        That it took.
    caveat : str
        What to know of the curve's trainings; empty where there is nothing.
    """

    ranked: tuple[Suggestion, ...]
    skipped: Mapping[str, str]
    late: int
    labelled: int
    unseen: int
    curve: LearningCurve | None
    seconds: float
    caveat: str = ""

    def remarks(self) -> list[str]:
        """What else to know, a sentence each."""
        found = [] if self.ranked else ["No scan is unlabelled: there is nothing to suggest."]
        if self.ranked and not self.labelled:
            found.append("No scan is labelled: unlikeness is to the scans suggested before.")
        if self.ranked and self.unseen:
            found.append(
                f"{self.labelled - self.unseen} of {self.labelled} labelled scans were looked at: what is unlike them "
                "may be like another one."
            )
        if self.skipped:
            found.append(f"{len(self.skipped)} scan(s) could not be used: {', '.join(self.skipped)}.")
        if self.late:
            found.append(f"The budget left no time for {self.late} scan(s), drawn by the seed.")
        found += [] if self.curve is None else [self.curve.sentence]
        return [*found, self.caveat] if self.caveat else found

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries without a folder of this machine; NaN becomes None."""
        found: dict[str, Any] = plain({
            "ranked": [asdict(one) for one in self.ranked],
            "skipped": {case: without_folders(why) for case, why in self.skipped.items()},
            "late": self.late,
            "labelled": self.labelled,
            "unseen": self.unseen,
            "curve": None,
            "remarks": [without_folders(line) for line in self.remarks()],
            "seconds": round(self.seconds, 1),
            "use": checkpoint.USE,
        })  # fmt: skip
        return found if self.curve is None else found | {"curve": self.curve.to_json()}


@dataclass(frozen=True, eq=False)
class _Work:
    """What looking at scans shares."""

    model: checkpoint.Model
    dataset: Dataset
    seed: int
    observe: Observer | None
    started: float
    budget: float

    def each(
        self, cases: Sequence[CaseFiles], look: Callable[[CaseFiles], T], *, span: tuple[float, float]
    ) -> tuple[list[T], dict[str, str], int]:
        """Look at cases in an order drawn by the seed: what was seen, what could not be, how many were too late.

        The span is the share of the whole work, and of the budget, that these cases take.
        """
        seen, skipped = list[T](), dict[str, str]()
        low, high = span
        order = np.random.default_rng(self.seed).permutation(len(cases))
        for done, i in enumerate(order):
            spent = time.monotonic() - self.started
            if seen and spent > self.budget * high:
                return seen, skipped, len(cases) - done
            share = low + (high - low) * done / len(cases)
            if self.observe is not None:
                left = spent * (1 - share) / max(share, 0.02)
                self.observe(Status(done + 1, len(cases), share, spent, left, math.nan, {}, 0.0, cases[i].id))
            try:
                with memory_told(fix="leave such a scan out"):
                    seen.append(look(cases[i]))
            except (FewscanError, OSError) as error:
                skipped[cases[i].id] = " ".join(str(error).split())
                if self.observe is not None:
                    self.observe(f"skipped {cases[i].id}: {skipped[cases[i].id]}")
        return seen, skipped, 0

    def image(self, case: CaseFiles) -> Volume:
        """With the model's channels in their order; its label, if any, is not read."""
        wanted, kind = self.model.plan.channels, self.model.plan.kind
        if (seen := kinds.kind_of_scan(case.images, wanted=kind)) != kind:
            raise DataError(f"{case.images[0]}: holds {said(seen)}, the model takes {said(kind)}")
        there = self.dataset.channels if case in self.dataset.cases else wanted
        found = read_image(case.images[0] if len(case.images) == 1 else case.images, channels=there)
        data, places = kinds.in_order(found.data, kind, file=case.images[0]), columns(wanted, there)
        assert places is not None
        return Volume(data[places], found.geometry, found.native, wanted, kind)


def suggest(
    model: checkpoint.Model | Path | str,
    data: api.Data,
    *,
    images: Sequence[Path | str] = (),
    out: Path | str | None = None,
    folds: Sequence[Path | str] = (),
    curve: bool = False,
    budget: float | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    max_memory: int | None = None,
    settings: Mapping[str, str] | None = None,
    observe: Observer | None = None,
) -> Suggestions:
    """Rank unlabelled scans by what labelling them next would bring, and say what more labels are expected to bring.

    Parameters
    ----------
    model : Model or path
        Trained on the labelled scans; its folder is only read.
    data : Dataset or path
        Labelled and unlabelled scans.
    images : sequence of path
        Files or folders of more unlabelled scans.
    out : path, optional
        Folder for ``suggest.json``, which `report` shows, and for the models of a learning curve.
    folds : sequence of path
        Folders that `crossval` wrote for this task: a learning curve is fitted where they hold three sizes or more.
    curve : bool
        Train on 1, 2, 4, ... of the labelled scans, and judge on others, for a learning curve; finished sizes in
        ``out`` are not repeated.
    budget : float or str, optional
        Seconds, or a duration, for looking at scans, and for each training of a learning curve.
    steps : int, optional
        Of each training, instead of seconds.
    seed : int
        Of the order in which scans are looked at, and of trainings.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    max_memory : int, optional
        Bytes that each training may take.
    settings : mapping of str to str, optional
        For trainings, as for `train`.
    observe : callable, optional
        Gets messages and a `learn.engine.Status` as it goes.

    Raises
    ------
    FewscanError
        If model, data or folders do not allow it, or no scan is unlabelled and no curve was asked for.
    """
    started = time.monotonic()
    if curve and (folds or out is None):
        raise ConfigError("a learning curve trains into a folder: give --curve with -o DIR, or --folds alone")
    if not curve and (steps is not None or max_memory is not None or settings):
        raise ConfigError("--steps, --max-memory and --set are for the trainings of --curve; add it, or leave them out")
    loaded = model if isinstance(model, checkpoint.Model) else api.load(model)
    found, limit = api.dataset_of(data), api.seconds(budget)
    if isinstance(loaded.segmenter, Absent):
        raise ModelError(
            f"{loaded.path or 'the model'} only registers; give one trained with --method joint or segment"
        )
    if columns(loaded.plan.channels, found.channels) is None:
        raise DataError(
            f"{found.root} has the channels {', '.join(found.channels)}, the model takes "
            f"{', '.join(loaded.plan.channels)}; name the channels alike"
        )
    cases = _unlabelled(found, [Path(path) for path in images], loaded, needed=not (curve or folds), say=observe)
    if found.kind != loaded.plan.kind:
        raise DataError(
            f"{found.root} holds {said(found.kind)}, the model takes {said(loaded.plan.kind)}; give scans of the same"
        )
    work = _Work(loaded, found, seed, observe, started, math.inf if limit is None else limit)
    ranked, skipped, late, unseen = _ranked(work, cases, device=device) if cases else ([], {}, 0, 0)
    seen, caveat = forecasting.from_folds([Path(path) for path in folds], names=found.names.values()), ""
    if curve and out is not None:
        how = Training(
            method=_method(loaded, found), budget=limit, steps=steps, seed=seed, device=device,
            settings=settings, max_memory=max_memory, observe=observe,
        )  # fmt: skip
        if "transfer" in loaded.provenance:
            caveat = TRANSFERRED.format(how.method)
        seen = forecasting.by_training(found, Path(out), how=how)
    drawn = learning_curve(seen, now=len(found.labelled), seed=seed) if curve or folds else None
    answer = Suggestions(
        ranked=tuple(ranked), skipped=skipped, late=late, labelled=len(found.labelled), unseen=unseen, curve=drawn,
        seconds=time.monotonic() - started, caveat=caveat,
    )  # fmt: skip
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        more = {"model": dict(loaded.provenance.get("sha256", {})), "seed": seed, "versions": checkpoint.versions()}
        checkpoint.write_json(answer.to_json() | more, Path(out) / FILE)
    return answer


def _unlabelled(
    found: Dataset, more: Sequence[Path], model: checkpoint.Model, *, needed: bool, say: Observer | None
) -> tuple[CaseFiles, ...]:
    """Those of the data set and those behind more paths; a scan that is in the data set already is not taken twice."""
    known = {image.resolve() for case in (*found.cases, *found.test) for image in case.images}
    names = {case.id for case in found.cases}
    extra = list[CaseFiles]()
    for scan in find_scans(more, channels=model.plan.channels, kind=model.plan.kind, say=say) if more else ():
        if known & {image.resolve() for image in scan.images}:
            continue
        if scan.id in names:
            raise DataError(f"{scan.images[0]}: {found.root} has another scan named {scan.id}; rename one of the two")
        extra.append(CaseFiles(scan.id, scan.images, patient=patient_of(scan.id)))
    cases = (*found.unlabelled, *extra)
    if not cases and needed:
        raise DataError(
            f"{found.root}: none of its {len(found.cases)} scans is unlabelled, so there is nothing to suggest; give "
            "unlabelled ones with --images FOLDER"
        )
    return cases


def _method(model: checkpoint.Model, data: Dataset) -> str:
    """The one that trained the model, or the one before the first transfer, for trainings like its own."""
    names = [model.provenance.get("method")]
    before = part(part(model.provenance, "transfer"), "from")
    while before:
        names.append(before.get("method"))
        before = part(before, "from")
    known = [str(name) for name in names if name in api.METHODS]
    if not known or (known[0] == "joint" and (data.overlapping or not data.unlabelled)):
        return api.method_for(data)
    return known[0]


def _ranked(
    work: _Work, cases: Sequence[CaseFiles], *, device: str
) -> tuple[list[Suggestion], dict[str, str], int, int]:
    """Look at labelled and unlabelled scans, and rank the latter; how many of each were not looked at."""
    model = work.model
    predictor = torch_predictor(model, pick(device))

    def features(case: CaseFiles) -> Look:
        return looks.look(work.image(case), model, case=case.id, patient=case.patient)

    def candidate(case: CaseFiles) -> Candidate:
        image = work.image(case)
        found = doubt(image, model.plan, predictor=predictor)
        if found is None:
            raise DataError(f"{case.images[0]} is too large for disturbed copies of it to be held in memory")
        return Candidate(look=looks.look(image, model, case=case.id, patient=case.patient), signs=found.signs)

    labelled = work.dataset.labelled
    split = min(LABELLED, len(labelled) / (len(labelled) + 4 * len(cases)))  # a candidate is predicted several times
    known, unread, _ = work.each(labelled, features, span=(0.0, split))
    seen, skipped, late = work.each(cases, candidate, span=(split, 1.0))
    if not seen:
        raise DataError(f"none of {len(cases)} unlabelled scans could be used; {next(iter(skipped.values()))}")
    unseen = len(labelled) - len(known)
    return acquisition.rank(seen, known, every=not unseen), unread | skipped, late, unseen

"""Prediction made to measure: each scan segmented by a model personalised to it, where nothing speaks against that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fewscan.data import dataset as datasets
from fewscan.data.dataset import Dataset
from fewscan.errors import ConfigError, DataError
from fewscan.judge.expectation import expectation
from fewscan.judge.recipe import calibration_of
from fewscan.learn import infer
from fewscan.learn.atlases import (
    MOST_KEPT,
    atlases_of,
    in_turn,
    load_atlases,
    patient_among,
    save_atlases,
    shared_atlases,
)
from fewscan.learn.batches import Prepared, bytes_on_plan, on_plan
from fewscan.learn.checkpoint import Model, load_model
from fewscan.learn.folder import scratch
from fewscan.learn.hardware import Hardware, free_memory_bytes, memory_told, pick
from fewscan.learn.request import Observer
from fewscan.methods.personalize import FITTING, Mode, PersonalizeConfig, Personalized, Personalizer
from fewscan.prediction import Answer, Inputs, Prediction, Tick, Work, predict_by
from fewscan.space.volume import Volume

OWN = "every atlas is this scan itself or of its patient; give labelled scans of others with --atlases"
SHORTEST, LONGEST = 60.0, 240.0  # seconds that a scan may take unless told
WIDE = 500_000  # voxels on the model's grid from which it may take the longest: an abdomen of 2.5 x 2.5 x 8 mm has more


def personalize(
    model: Model | Path | str,
    inputs_: Inputs,
    out: Path | str,
    *,
    atlases: Dataset | Path | str | None = None,
    mode: Mode = "auto",
    budget_per_case: float | Literal["auto"] | None = "auto",
    calibration: Path | str | None = None,
    probabilities: bool = False,
    skip_existing: bool = False,
    device: str = "auto",
    config: PersonalizeConfig | None = None,
    observe: Observer | None = None,
) -> list[Prediction]:
    """Segment scans as `predict` does, each by a copy of the model that was personalised to it (Chen et al. 2025).

    Where the personalised answer is kept, the model's own, as `predict` writes it, goes to ``OUT/before/``.

    Parameters
    ----------
    model : Model or path
        Trained; stays as it is, to the bit.
    inputs_ : path, Scan, or sequence of them
        As for `predict`.
    out : path
        Folder to write; made if need be.
    atlases : Dataset or path, optional
        Labelled scans to deform to each, as a folder in any layout or as `api.open` found them; those that the model
        keeps when None.
    mode : {"auto", "always"}
        Auto keeps the model's own answer where the evidence speaks against the change, and where atlases of a single
        patient give none. Always keeps it only where there is no other: the first mask is empty, no atlas can be laid
        onto the scan, the refinement diverges, or memory lacks.
    budget_per_case : float or "auto", optional
        Seconds for a scan; auto goes by its size, see `budget_for`, and None takes as long as it takes.
    calibration : path, optional
        As for `predict`: what is expected is the Dice of the model's own answer, and the slices are those to look at
        first in it.
    probabilities : bool
        As for `predict`.
    skip_existing : bool
        Leave finished scans alone.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    config : PersonalizeConfig, optional
        How; the preset when None.
    observe : callable, optional
        Gets progress, and a message per scan with the verdict.

    Raises
    ------
    ScansError
        As `predict` does where some of several scans could not be used.
    FewscanError
        If there is no atlas, the model or the only scan cannot be used, or nothing can be written; scans finished
        before stay.

    Examples
    --------
    Atlases are given by name; the third argument is the folder to write, as for `predict`::

        cases = fewscan.open("scans")  # or some of them: fewscan.data.dataset.select(cases, labelled=["p1", "p7"])
        fewscan.personalize("model", "new.nii.gz", "out", atlases=cases)

    Atlases are files: those that are in memory alone have to be written first.
    """
    model = model if isinstance(model, Model) else load_model(Path(model))
    if mode not in ("auto", "always"):
        raise ConfigError(f"mode must be auto or always, got {mode!r}; predict alone never personalises")
    seconds = None if isinstance(budget_per_case, str) else budget_per_case
    if budget_per_case not in ("auto", seconds) or (seconds is not None and seconds <= 0):
        raise ConfigError(f"the budget of a case must be above 0 s, auto or None, got {budget_per_case!r}")
    hardware, out = pick(device), Path(out)
    with scratch() as folder:  # no variable here may hold an atlas, whose file is mapped
        return predict_by(
            _telling(
                _work(
                    model, _atlases(model, atlases, folder=folder), hardware, config or PersonalizeConfig(), mode=mode,
                    limit=lambda voxels: budget_for(voxels) if budget_per_case == "auto" else seconds,
                    calibration=calibration, probabilities=probabilities, observe=observe,
                )
            ),
            model, scans=inputs_, folder=out, skip_existing=skip_existing, before=True, probabilities=probabilities,
            observe=observe,
        )  # fmt: skip


def _work(
    model: Model,
    known: list[Prepared],
    hardware: Hardware,
    config: PersonalizeConfig,
    *,
    mode: Mode,
    limit: Callable[[int], float | None],
    calibration: Path | str | None,
    probabilities: bool,
    observe: Observer | None,
) -> Work:
    """What answers with the labels of the model, or with those of a copy that was personalised."""
    maker = Personalizer(model, known, config=config, hardware=hardware, say=observe or (lambda line: None))
    predictor = infer.fastest_predictor(model, hardware)
    learnt = None if calibration is None else calibration_of(model, Path(calibration), observe=observe)

    def work(volume: Volume, tick: Tick, *, name: str) -> Answer:
        each = 20 + 2 * model.plan.width  # atlases of two rounds, and what turns or moves them
        need = bytes_on_plan(volume, model.plan, values=12 * model.plan.classes + each * maker.config.atlases)
        if need > free_memory_bytes():
            reason = f"it takes about {need / 2**30:.0f} GiB of memory, more than is free"
            found = Personalized(torch.empty(0), torch.empty(0), "before", reason, {})
        else:
            everything, image = np.ones(model.plan.classes, np.bool_), on_plan(volume, model.plan).numpy()
            case = Prepared(
                "scan to segment", image, None, (), (0,) * model.plan.classes, everything, model.plan.kind,
                patient=patient_among(known, image, name=name),
            )  # fmt: skip
            found = _personalised(maker, case, mode=mode, seconds=limit(image[0].size), tick=tick)
        kept, shape, told = found.kept == "before", volume.geometry.shape, {"personalized": _record(found)}
        if learnt is not None:
            told |= expectation(learnt, volume, model=model, predictor=predictor, replaced=not kept)
        own = infer.segment(model, volume, predictor=predictor, probabilities=probabilities and kept)
        if kept:
            return Answer(own, told)
        after = infer.labels_from(found.after, model.plan, shape=shape, probabilities=probabilities)
        return Answer(after, told, own)  # not `found.before`, which leaves out the weights of the loss

    return work


def _telling(work: Work) -> Work:
    """With what to do where memory runs out; nothing bounds what personalising takes."""

    def told(volume: Volume, tick: Tick, *, name: str) -> Answer:
        with memory_told(fix=f"{name} is too large to be personalised to: predict it without --personalize"):
            return work(volume, tick, name=name)

    return told


def _personalised(maker: Personalizer, case: Prepared, **options: Any) -> Personalized:
    """With the atlases of other patients: the scan's own labels, or its patient's, are what is to be found out."""
    own = sum(atlas.whose == case.whose for atlas in maker.shaper.atlases)
    if not own:
        return _made(maker, case, **options)
    left_out = {"left_out": float(own)}
    maker.say(f"atlases: {own} of {len(maker.shaper.atlases)} left out, the scan itself or others of its patient")
    if own == len(maker.shaper.atlases):
        return Personalized(torch.empty(0), torch.empty(0), "before", OWN, left_out)
    found = _made(maker, case, **options)
    return replace(found, evidence={**found.evidence, **left_out})


def _made(maker: Personalizer, case: Prepared, **options: Any) -> Personalized:
    """What a GPU is too small for must not cost the next scans theirs."""
    try:
        return maker(case, **options)
    except torch.OutOfMemoryError:
        reason = f"{maker.hardware.device} ran out of memory while it was made; --device cpu may hold it"
        return Personalized(torch.empty(0), torch.empty(0), "before", reason, {})


def budget_for(voxels: int) -> float:
    """Seconds that personalising to a scan may take unless told: one minute for a hippocampus, four for an abdomen.

    Parameters
    ----------
    voxels : int
        Of the scan on the model's grid.

    Examples
    --------
    >>> [budget_for(voxels) for voxels in (64_000, 250_000, 2_000_000)]
    [60.0, 120.0, 240.0]
    """
    return min(LONGEST, max(SHORTEST, LONGEST * voxels / WIDE))


def keep_atlases(model: Model, dataset: Dataset, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Put labelled scans of a data set beside a model, at most `MOST_KEPT`, for `personalize` to deform.

    They are scans of people, on the model's grid and without their names: whoever gets the model gets them too.

    Parameters
    ----------
    model : Model
        In a folder.
    dataset : Dataset
        What it was trained on, or carried over to; labels that only one of the two knows are left out.
    say : callable
        Gets a line on how many were put there, and how large they are.

    Raises
    ------
    FewscanError
        If nothing is labelled, or no label or not all channels are those of the model.
    """
    if model.path is None:
        raise ConfigError("the model is not in a folder yet; train it with an output folder")
    with scratch() as folder:
        file, kept, every = _left_beside(model, dataset, model.path, folder=folder)
    size = file.stat().st_size / 1e6
    say(f"atlases: {kept} of {every} labelled scans lie beside the model now, {size:.1f} MB")
    return file


def _left_beside(model: Model, dataset: Dataset, place: Path, *, folder: Path) -> tuple[Path, int, int]:
    """Write atlases beside a model: the file, how many are in it, and of how many they are."""
    every = shared_atlases(dataset, model.plan, folder=folder)
    kept = in_turn(every, most=MOST_KEPT)
    return save_atlases(kept, place, plan=model.plan), len(kept), len(every)


def _atlases(model: Model, given: Dataset | Path | str | None, *, folder: Path) -> list[Prepared]:
    """From the data set given, or those that lie beside the model."""
    if given is not None:
        dataset = given if isinstance(given, Dataset) else datasets.find(Path(given))
        return atlases_of(dataset, model.plan, folder=folder)
    kept = load_atlases(model, folder=folder)
    if not kept:
        raise DataError(
            "the model keeps no atlases, so there is nothing to deform; give labelled scans with --atlases, "
            "or train or transfer with --keep-atlases"
        )
    return kept


def _record(found: Personalized) -> Mapping[str, Any]:
    """For the record of predictions."""
    reason = found.reason
    if found.kept == "after" and reason != FITTING:  # and without the remedy: what it tells to ask for was asked for
        reason = f"as asked, although {reason.partition(';')[0]}"
    return {
        "kept": found.kept,
        "reason": reason,
        "evidence": {key: round(value, 4) for key, value in found.evidence.items()},
    }

"""Prediction of files and folders, one label map per scan, each on the scan's own grid."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fewscan.data import kinds, proof
from fewscan.data.bundles import replace_bundles
from fewscan.data.io import read_image, write_image, write_labelmap
from fewscan.deliver.records import personalised
from fewscan.errors import ConfigError, DataError, FewscanError, ModelError, ScansError, TakenError
from fewscan.judge.expectation import expectation
from fewscan.judge.recipe import calibration_of
from fewscan.learn import checkpoint, infer, inputs
from fewscan.learn.answers import Segmented
from fewscan.learn.channels import said
from fewscan.learn.checkpoint import Model
from fewscan.learn.engine import Status
from fewscan.learn.hardware import memory_told, pick
from fewscan.learn.request import Observer
from fewscan.recording import Record
from fewscan.space.volume import Volume

Tick = Callable[[float], None]
FULL = (errno.ENOSPC, errno.EDQUOT)
Inputs = Path | str | inputs.Scan | Sequence[Path | str | inputs.Scan]


class Answer(NamedTuple):
    """What is to be kept of a scan.

    Parameters
    ----------
    found : Segmented
        Its labels.
    told : mapping of str to any
        Fields of its `Prediction`.
    before : Segmented, optional
        The model's own answer, where that in ``found`` is another.
    """

    found: Segmented
    told: Mapping[str, Any]
    before: Segmented | None = None


class Work(Protocol):
    """What segments one scan after another."""

    def __call__(self, volume: Volume, tick: Tick, *, name: str) -> Answer:
        """The labels of a scan; ``tick`` gets the share that is done."""


@dataclass(frozen=True, kw_only=True)
class Before:
    """The model's own answer to a scan, where a personalised one took its place.

    Parameters
    ----------
    path : Path
        The label map written, or the folder of masks where labels overlap.
    volumes_ml : mapping of str to float
        Volume of each label.
    dice : mapping of str to float
        Between both answers, of each label that either holds.
    voxels_changed : float
        Share of the voxels that are labelled in either answer whose labels are not the same.
    """

    path: Path
    volumes_ml: Mapping[str, float]
    dice: Mapping[str, float]
    voxels_changed: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One predicted scan.

    Parameters
    ----------
    id : str
        The input's name.
    path : Path
        The label map written, or the folder of masks where labels overlap.
    seconds : float
        Reading, predicting and writing.
    volumes_ml : mapping of str to float
        Volume of each label.
    skipped : bool
        Whether the file was there already.
    personalized : mapping, optional
        What the guard of personalisation kept, why, and its evidence.
    before : Before, optional
        What the model itself answers, where the personalised answer was kept.
    probabilities : Path, optional
        The probabilities written.
    expected : mapping, optional
        Expected Dice of each label with its range, what that is to hold, and the slices to look at first; of the
        model's own answer, which ``of`` says where another took its place.
    warning : str, optional
        What was found wrong with the scan that does not keep it from being segmented.
    """

    id: str
    path: Path
    seconds: float
    volumes_ml: Mapping[str, float]
    skipped: bool = False
    personalized: Mapping[str, Any] | None = None
    before: Before | None = None
    probabilities: Path | None = None
    expected: Mapping[str, Any] | None = None
    warning: str | None = None


def predict(
    model: Model | Path | str,
    inputs_: Inputs,
    out: Path | str,
    *,
    probabilities: bool = False,
    tta: bool = False,
    skip_existing: bool = False,
    calibration: Path | str | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    observe: Observer | None = None,
) -> list[Prediction]:
    """Segment scans, each on its own grid, as ``OUT/<name>.nii.gz``.

    Where labels overlap, as ``OUT/<name>/bundle_segmentations/<label>.nii.gz``: a mask each, an empty one too.

    Parameters
    ----------
    model : Model or path
        Trained.
    inputs_ : path, Scan, or sequence of them
        Files, folders or DICOM series; or scans put together by the caller.
    out : path
        Folder to write; made if need be.
    probabilities : bool
        Also write ``<name>_probabilities.nii.gz``: one volume per class, background first, in 255ths. They take a byte
        per class and voxel, which is held in memory.
    tta : bool
        Average with mirrored inputs, where anatomy allows.
    skip_existing : bool
        Leave finished scans alone.
    calibration : path, optional
        Folder of a cross-validation of the same task: each label then gets an expected Dice. Not together with
        mirrored inputs, since it was learnt without.
    max_memory : int, optional
        Bytes for the logits that are held at a time.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    observe : callable, optional
        Gets a `learn.engine.Status` after each window, and a message per scan.

    Raises
    ------
    ScansError
        Once all are through, if some of several scans could not be read or segmented: its ``done`` are the others, its
        ``failed`` says why, and so does the record.
    FewscanError
        If the model or the only scan cannot be used, or nothing can be written; scans finished before stay.
    """
    model = model if isinstance(model, Model) else checkpoint.load_model(Path(model))
    predictor = infer.fastest_predictor(model, pick(device), tta=tta)
    known = None if calibration is None else calibration_of(model, Path(calibration), tta=tta, observe=observe)

    def whole(volume: Volume, tick: Tick, *, name: str) -> Answer:
        memory = max_memory or infer.WORKING_MEMORY
        with memory_told(fix=f"{name} is too large: bound the logits with --max-memory, such as 1GiB"):
            answer = infer.segment(
                model, volume, predictor=predictor, probabilities=probabilities, memory=memory, observe=tick
            )
            told = {} if known is None else expectation(known, volume, model=model, predictor=predictor)
        return Answer(answer, told)

    return predict_by(
        whole, model, scans=inputs_, folder=Path(out), skip_existing=skip_existing, probabilities=probabilities,
        observe=observe,
    )  # fmt: skip


def predict_by(
    work: Work,
    model: Model,
    *,
    scans: Inputs,
    folder: Path,
    skip_existing: bool = False,
    before: bool = False,
    probabilities: bool = False,
    observe: Observer | None = None,
) -> list[Prediction]:
    """Read scans, let something segment each, write what it answers, and keep the record of it.

    Parameters
    ----------
    work : callable
        Gets a scan, a callable for the share that is done, and by name the scan's id; answers with labels and what is
        to be recorded. Memory that runs out is for it to tell, which knows what bounds it.
    model : Model
        Trained.
    scans : path, Scan, or sequence of them
        As for `predict`.
    folder : Path
        To write.
    skip_existing : bool
        Leave finished scans alone.
    before : bool
        Whether the answers of ``work`` may hold the model's own beside another.
    probabilities : bool
        Whether they hold probabilities, for a file of somebody else in their place to be found before the work.
    observe : callable, optional
        As for `predict`.

    Raises
    ------
    ScansError, FewscanError
        As `predict` does.
    """
    found = _scans(scans, model, observe=observe)
    record = Record(folder, model=model)
    for scan in found:
        record.check(scan, keep=skip_existing, before=before, probabilities=probabilities)
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Prediction] = []
    lost: dict[str, str] = {}
    begin, say = time.monotonic(), observe or (lambda event: None)

    def tick(share: float) -> None:
        """Progress through all scans; their sizes are not known before they are read, so each counts alike."""
        at, seconds = len(done) + len(lost), time.monotonic() - begin
        fraction = (at + share) / len(found)
        left = seconds * (1 - fraction) / max(fraction, 1e-9)
        say(Status(at + 1, len(found), fraction, seconds, left, math.nan, {}, 0.0, found[at].id))

    for number, scan in enumerate(found, start=1):
        if skip_existing and record.finished(scan):
            if not record.vouched(scan):
                say(f"warning: {scan.id}: left alone, though nothing tells whether it is of this very scan")
            record.passed(scan)
            done.append(Prediction(id=scan.id, path=record.target(scan), seconds=0.0, volumes_ml={}, skipped=True))
            continue
        started = time.monotonic()
        record.reading(scan)
        try:
            read = _answered(model, scan, work=lambda volume, name: work(volume, tick, name=name), say=say)
            record.begin(scan, before=read[2].before is not None, probabilities=read[2].found.probs is not None)
        except (FewscanError, OSError) as error:
            if len(found) == 1 or _of_every_scan(error):
                raise
            lost[scan.id] = " ".join(str(error).split())
            record.fail(scan, lost[scan.id])
            say(f"{number} of {len(found)}: {scan.id} could not be predicted: {lost[scan.id]}")
            continue
        answer = _written(*read, scan=scan, model=model, record=record, started=started)
        del read  # or two scans would be held at a time
        done.append(answer)
        row = record.finish(scan, asdict(answer))
        say(f"{number} of {len(found)}: {scan.id}, {answer.seconds:.1f} s{_said(row)}")
    if lost:
        raise ScansError(f"{len(lost)} of {len(found)} scans could not be predicted", done=done, failed=lost)
    return done


def _of_every_scan(error: FewscanError | OSError) -> bool:
    """Whether the next scan would meet the same: a model or an option that is wrong, or a disk that is full."""
    wrong = isinstance(error, ModelError | ConfigError) and not isinstance(error, TakenError)
    return wrong or (isinstance(error, OSError) and error.errno in FULL)


def _said(row: Mapping[str, Any]) -> str:
    """The verdict on a personalised scan."""
    return f"; {told}" if (told := personalised(row)) else ""


def _scans(given: Inputs, model: Model, *, observe: Observer | None) -> list[inputs.Scan]:
    """Scans as they were given, or those behind the paths."""
    listed = [given] if isinstance(given, (str, Path, inputs.Scan)) else list(given)
    paths = [Path(item) for item in listed if not isinstance(item, inputs.Scan)]
    scans = [item for item in listed if isinstance(item, inputs.Scan)]
    if not paths:
        return scans
    return scans + inputs.find_scans(paths, channels=model.plan.channels, kind=model.plan.kind, say=observe)


def _answered(
    model: Model, scan: inputs.Scan, *, work: Callable[[Volume, str], Answer], say: Observer
) -> tuple[Volume, str | None, Answer]:
    """Read and segment: the scan, what speaks against it, and what is to be kept of it."""
    kind = kinds.kind_of_scan(scan.images, wanted=model.plan.kind)
    if kind != model.plan.kind:
        raise DataError(
            f"{scan.images[0]}: holds {said(kind)}, the model takes {said(model.plan.kind)}; give such a scan"
        )
    volume = read_image(scan.images[0] if len(scan.images) == 1 else scan.images, channels=model.plan.channels)
    volume = kinds.of_kind(volume, kind, file=scan.images[0])
    warning = _misfit(volume, scan.images)
    if warning is not None:
        say(f"warning: {scan.id}: {warning}")
    return volume, warning, work(volume, scan.id)


def _written(
    volume: Volume,
    warning: str | None,
    found: Answer,
    *,
    scan: inputs.Scan,
    model: Model,
    record: Record,
    started: float,
) -> Prediction:
    """Write; the model's own answer too where it is not the one that is kept."""
    (answer, told, first), target = found, record.target(scan)
    volumes = _write(answer, target, model, like=volume, replaced=record.replaceable(scan, before=False))
    probabilities, before = None, None
    if answer.probs is not None:
        probabilities = record.probabilities(scan)
        write_image(answer.probs, probabilities, native=volume.native)
    if first is not None:
        dice, changed = _between(answer, first, model)
        own = record.own(target)
        held = _write(first, own, model, like=volume, replaced=record.replaceable(scan, before=True))
        before = Before(path=own, volumes_ml=held, dice=dice, voxels_changed=changed)
    return Prediction(
        id=scan.id, path=target, seconds=time.monotonic() - started, volumes_ml=volumes, before=before,
        probabilities=probabilities, warning=warning, **told,
    )  # fmt: skip


def _write(
    answer: Segmented, target: Path, model: Model, *, like: Volume, replaced: Collection[str]
) -> dict[str, float]:
    """Write labels on the scan's own grid, masks in the place of those named; the volume of each in mL."""
    if model.plan.overlapping:
        masks = dict(zip(model.names.values(), answer.label, strict=True))
        replace_bundles(masks, target.parent, native=like.native, own=replaced)
    else:
        write_labelmap(answer.label, target, native=like.native)
    counts = _counts(answer.label, model)
    return {name: float(counts[value]) * like.geometry.voxel_mm3 / 1000 for value, name in model.names.items()}


def _between(one: Segmented, other: Segmented, model: Model) -> tuple[dict[str, float], float]:
    """Dice between two answers of each label that either holds, and the share of labelled voxels that differ."""
    if model.plan.overlapping:
        both = one.label & other.label
        unlike, held = (one.label != other.label).any(0), (one.label | other.label).any(0)
    else:
        unlike, held = one.label != other.label, (one.label > 0) | (other.label > 0)
        both = np.where(unlike, 0, one.label)
    shared, first, second = (_counts(label, model) for label in (both, one.label, other.label))
    total = {value: first[value] + second[value] for value in model.names}
    dice = {name: 2 * shared[value] / total[value] for value, name in model.names.items() if total[value]}
    return dice, float(unlike.sum()) / max(1, int(held.sum()))


def _misfit(volume: Volume, images: Sequence[Path]) -> str | None:
    """What speaks, or may speak, against directions that nobody has proven; None where nothing does."""
    found = proof.examine(volume.data, volume.geometry, images=images, kind=volume.kind)
    return next((f"{f.message}; {f.remedy}" for f in found if f.severity != "note"), None)


def _counts(label: NDArray[Any], model: Model) -> dict[int, int]:
    """Voxels of each label."""
    if model.plan.overlapping:
        return {value: int(mask.sum()) for value, mask in zip(model.names, label, strict=True)}
    found = np.zeros(max(model.names, default=0) + 1, np.int64)
    for slab in label:  # one at a time: counting takes eight bytes a voxel
        found += np.bincount(slab.reshape(-1), minlength=len(found))
    return {value: int(found[value]) for value in model.names}

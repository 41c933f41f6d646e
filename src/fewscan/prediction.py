"""Prediction of files and folders, one label map per scan, each on the scan's own grid."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fewscan.data.io import read_image, write_image, write_labelmap
from fewscan.errors import ConfigError
from fewscan.learn import checkpoint, infer, inputs
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import pick
from fewscan.learn.session import Observer


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One predicted scan.

    Parameters
    ----------
    id : str
        The input's name.
    path : Path
        The label map written.
    seconds : float
        Reading, predicting and writing.
    volumes_ml : mapping of str to float
        Volume of each label.
    skipped : bool
        Whether the file was there already.
    """

    id: str
    path: Path
    seconds: float
    volumes_ml: Mapping[str, float]
    skipped: bool = False


def predict(
    model: Model | Path | str,
    inputs_: Sequence[Path | str] | Path | str,
    out: Path | str,
    *,
    probabilities: bool = False,
    tta: bool = False,
    skip_existing: bool = False,
    max_memory: int | None = None,
    device: str = "auto",
    observe: Observer | None = None,
) -> list[Prediction]:
    """Segment scans, each on its own grid, as ``OUT/<name>.nii.gz``.

    Parameters
    ----------
    model : Model or path
        Trained.
    inputs_ : path or sequence of paths
        Files, folders or DICOM series.
    out : path
        Folder to write; made if need be.
    probabilities : bool
        Also write ``<name>_probabilities.nii.gz``, one volume per class.
    tta : bool
        Average with mirrored inputs, where anatomy allows.
    skip_existing : bool
        Leave finished scans alone.
    max_memory : int, optional
        Bytes for the logits that are held at a time.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    observe : callable, optional
        Gets a message per scan.

    Raises
    ------
    FewscanError
        If the model or a scan cannot be used; scans finished before stay.
    """
    model = model if isinstance(model, Model) else checkpoint.load_model(Path(model))
    paths = [inputs_] if isinstance(inputs_, (str, Path)) else list(inputs_)
    scans = inputs.find_scans([Path(p) for p in paths], channels=len(model.plan.channels))
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the predictions")
    for scan in scans:
        if any(folder.resolve() == image.parent.resolve() for image in scan.images):
            raise ConfigError(f"{folder} is where the scans are, and their files would be overwritten; give another -o")
    folder.mkdir(parents=True, exist_ok=True)
    predictor = infer.fastest_predictor(model, pick(device), tta=tta)
    done = []
    for i, scan in enumerate(scans):
        target = folder / f"{scan.id}.nii.gz"
        if skip_existing and target.is_file():
            done.append(Prediction(id=scan.id, path=target, seconds=0.0, volumes_ml={}, skipped=True))
            continue
        done.append(
            _predict_one(model, scan, target, predictor=predictor, probabilities=probabilities, memory=max_memory)
        )
        if observe is not None:
            observe(f"{i + 1} of {len(scans)}: {scan.id}, {done[-1].seconds:.1f} s")
    records = [asdict(p) | {"path": p.path.name} for p in done]
    checkpoint.write_json(
        {"model": model.provenance.get("sha256", {}), "predictions": records}, folder / "predictions.json"
    )
    return done


def _predict_one(
    model: Model,
    scan: inputs.Scan,
    target: Path,
    *,
    predictor: infer.Predictor,
    probabilities: bool,
    memory: int | None,
) -> Prediction:
    """Read, segment, write."""
    begin = time.monotonic()
    volume = read_image(scan.images[0] if len(scan.images) == 1 else scan.images, channels=model.plan.channels)
    answer = infer.segment(
        model, volume, predictor=predictor, probabilities=probabilities, memory=memory or infer.WORKING_MEMORY
    )
    write_labelmap(answer.label, target, native=volume.native)
    if answer.probs is not None:
        path = target.with_name(f"{scan.id}_probabilities.nii.gz")
        write_image(answer.probs.astype(np.float32) / 255, path, native=volume.native)
    counts = np.bincount(answer.label.reshape(-1), minlength=max(model.names, default=0) + 1)
    volumes = {name: float(counts[value]) * volume.geometry.voxel_mm3 / 1000 for value, name in model.names.items()}
    return Prediction(id=scan.id, path=target, seconds=time.monotonic() - begin, volumes_ml=volumes)

"""Labelled scans that travel with a model, because its owner said so: what personalisation deforms to a new scan.

::

    MODEL/
      atlases.safetensors    images at half precision and class indices, both on the model's grid; of labels that
                             overlap indices of combinations, and a table of what these stand for; a number that
                             scans of one patient share
      atlases.json           SHA-256 of that file, how many scans it holds, and what they share with their model: the
                             names of its classes and channels, and its spacing in mm

They are scans of people. Without ``--keep-atlases`` of `train` or `transfer` a model holds none, with it at most
`MOST_KEPT`, and names of cases and patients are not stored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray

from fewscan.data.dataset import Dataset, load, patient_of
from fewscan.data.io import atomic, sha256
from fewscan.data.painting import plain_name
from fewscan.errors import DataError, FewscanError, ModelError, ResourceError
from fewscan.learn.batches import Prepared, labelled_as, prepare
from fewscan.learn.channels import laid, said
from fewscan.learn.checkpoint import Model, write_json
from fewscan.learn.grafting import arranged, columns_of
from fewscan.learn.plan import Plan

FILE, RECORD = "atlases.safetensors", "atlases.json"
REMEDY = "take those of this model, delete them and give --atlases, or train again with --keep-atlases"
MOST_KEPT = 20  # scans beside a model: few of them are ever fitted to a scan, and each is one more person's


def atlases_of(dataset: Dataset, plan: Plan, *, folder: Path) -> list[Prepared]:
    """The labelled scans of a data set as a model sees them.

    Parameters
    ----------
    dataset : Dataset
        Found cases; its labels are those of the model, its channels are matched by name.
    plan : Plan
        Of the model.
    folder : Path
        Scratch folder, which exists.

    Raises
    ------
    DataError
        If nothing is labelled, or every label map empty; if labels overlap in one of the two only, or labels or
        channels are not those of the model.
    """
    lacking = [name for name in plan.names.values() if name not in dataset.names.values()]
    if dataset.labelled and (lacking or any(plan.names.get(value) != name for value, name in dataset.names.items())):
        raise DataError(
            f"{dataset.root}: labels {dict(dataset.names)} are not those of the model, {dict(plan.names)}; "
            "give atlases labelled alike, named in labels.json"
        )
    return _prepared(dataset, plan, folder=folder)


def shared_atlases(dataset: Dataset, plan: Plan, *, folder: Path) -> list[Prepared]:
    """As `atlases_of`, of the labels that both know: the model's others count as not looked for.

    Parameters
    ----------
    dataset : Dataset
        Found cases.
    plan : Plan
        Of the model; labels of the same name have the same number in both.
    folder : Path
        Scratch folder, which exists.

    Raises
    ------
    DataError
        As `atlases_of`, and if no label is known to both.
    """
    own = dataset.names
    known = {v for v, name in plan.names.items() if v in own and plain_name(own[v]) == plain_name(name)}
    if dataset.labelled and not known:
        raise DataError(
            f"{dataset.root}: none of its labels {dict(own)} is among those of the model, {dict(plan.names)}; "
            "atlases would tell it nothing"
        )
    alone = {v: name for v, name in plan.names.items() if v not in known}
    if alone:
        cases = tuple(replace(c, drawn=frozenset(own) if c.drawn is None else c.drawn) for c in dataset.cases)
        dataset = replace(dataset, names={**own, **alone}, cases=cases)
    return _prepared(
        dataset, replace(plan, names={v: own.get(v, name) for v, name in plan.names.items()}), folder=folder
    )


def _prepared(dataset: Dataset, plan: Plan, *, folder: Path) -> list[Prepared]:
    """The labelled scans on the model's grid, with the channels that it takes."""
    if not dataset.labelled:
        raise DataError(f"{dataset.root}: no labelled case, so there is no atlas; put a label map beside an image")
    there = dataset.channels
    if columns_of(there, plan, kind=dataset.kind) is None:
        raise DataError(
            f"{dataset.root}: {', '.join(there)} of {said(dataset.kind)}, the model takes {', '.join(plan.channels)} "
            f"of {said(plan.kind)}; give atlases with the same channels"
        )
    if dataset.overlapping != plan.overlapping:
        raise DataError(
            f"{dataset.root} holds {laid(dataset.overlapping)}, the model gives {laid(plan.overlapping)}; "
            "give atlases labelled as those it was trained on"
        )
    found = []
    for files in dataset.labelled:
        case = load(files, dataset)
        image = arranged(case.image, plan, case=case.id)
        atlas = prepare(replace(case, image=image), plan, folder=folder)
        if atlas.label is not None and any(atlas.counts[1:]):
            found.append(atlas)
    if not found:
        raise DataError(
            f"{dataset.root}: {len(dataset.labelled)} label maps, and no voxel of {', '.join(plan.names.values())} in "
            "them, so there is no atlas; give scans in which some are drawn"
        )
    return found


def in_turn(cases: Sequence[Prepared], *, most: int) -> list[Prepared]:
    """A few cases of many: a scan of every patient before a second one of any, the fullest labelled first.

    A label counts the less, the more of the cases chosen already hold it, so that one drawn in few scans is not lost.

    Parameters
    ----------
    cases : sequence of Prepared
        Labelled; those that are chosen keep their order.
    most : int
        How many to choose.
    """
    chosen, turns, seen = set[int](), Counter[str](), Counter[int]()
    held = [[k for k, voxels in enumerate(case.counts) if k and voxels] for case in cases]
    for _ in range(min(most, len(cases))):
        left = [i for i in range(len(cases)) if i not in chosen]
        best = max(left, key=lambda i: (-turns[cases[i].whose], sum(1 / (1 + seen[k]) for k in held[i])))
        chosen.add(best)
        turns[cases[best].whose] += 1
        seen.update(held[best])
    return [cases[i] for i in sorted(chosen)]


def patient_among(atlases: Sequence[Prepared], image: NDArray[np.float32], *, name: str) -> str:
    """Whose atlases must not speak of a scan: they are the scan itself, drawn by hand, or of its patient; else "".

    Parameters
    ----------
    atlases : sequence of Prepared
        On the model's grid.
    image : (C, X, Y, Z) float32
        The scan there.
    name : str
        Its id, which tells the patient where atlases have theirs.
    """
    same = (atlas.whose for atlas in atlases if _is(atlas.image, image))
    named = (atlas.whose for atlas in atlases if atlas.id == name or atlas.whose == patient_of(name))
    return next(same, next(named, ""))


def _is(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Whether two images are one, up to half precision; a few voxels tell nearly always that they are not."""
    few = (slice(None), *(slice(None, None, 8),) * 3)
    return one.shape == other.shape and all(
        np.allclose(one[part], other[part], rtol=2e-3, atol=5e-3) for part in (few, ...)
    )


def save_atlases(cases: Sequence[Prepared], folder: Path, *, plan: Plan) -> Path:
    """Put atlases beside a model.

    Parameters
    ----------
    cases : sequence of Prepared
        Labelled, on the model's grid.
    folder : Path
        Of the model.
    plan : Plan
        Of the model.
    """
    tensors, patients = {}, {whose: i for i, whose in enumerate(dict.fromkeys(case.whose for case in cases))}
    for i, case in enumerate(cases):
        assert case.label is not None
        tensors[f"{i}.image"] = torch.from_numpy(np.array(case.image)).half()
        tensors[f"{i}.label"] = torch.from_numpy(np.array(case.label))
        tensors[f"{i}.drawn"] = torch.from_numpy(np.array(case.drawn))
        tensors[f"{i}.patient"] = torch.tensor(patients[case.whose])
        if case.table is not None:
            tensors[f"{i}.table"] = torch.from_numpy(np.array(case.table))
    with atomic(folder / FILE) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    write_json({"cases": len(cases), "sha256": sha256(folder / FILE), **_shared(plan)}, folder / RECORD)
    return folder / FILE


def load_atlases(model: Model, *, folder: Path | None = None) -> list[Prepared]:
    """Atlases that lie beside a model; none where its owner kept none.

    Parameters
    ----------
    model : Model
        From a folder.
    folder : Path, optional
        Scratch folder, which exists, for images that need not be held then.

    Raises
    ------
    ModelError
        If they are damaged, were changed since, or are those of a model with other classes, channels or spacing.
    ResourceError
        If the disk of the scratch folder is full.
    """
    if model.path is None or not (model.path / RECORD).is_file():
        return []
    path = model.path / FILE
    try:
        record = json.loads((model.path / RECORD).read_text())
        if not path.is_file() or sha256(path) != record["sha256"]:
            raise ModelError(f"{path} is not the file that {RECORD} describes (SHA-256 differs); copy the folder again")
        for what, own in _shared(model.plan).items():
            if record.get(what, own) != own:  # older records do not say
                raise ModelError(f"{path}: of a model with {what} {record[what]}, this one has {own}; {REMEDY}")
        tensors = safetensors.torch.load_file(path)
        return [_case(i, tensors, model.plan, folder) for i in range(int(record["cases"]))]
    except FewscanError:  # which says itself what is wrong
        raise
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path} is damaged: {str(error).splitlines()[0][:300]}; train with --keep-atlases") from None


def _shared(plan: Plan) -> dict[str, list[str] | list[float]]:
    """What atlases have of their model, for the record."""
    return {"classes": [*plan.names.values()], "channels": [*plan.channels], "spacing": [*plan.spacing]}


def _case(number: int, tensors: dict[str, torch.Tensor], plan: Plan, folder: Path | None) -> Prepared:
    image, label, drawn = (tensors[f"{number}.{part}"].numpy() for part in ("image", "label", "drawn"))
    image, table = image.astype(np.float32), tensors.get(f"{number}.table")
    if (len(image), len(drawn), table is not None) != (plan.width, plan.classes, plan.overlapping):
        own = f"{len(image)} channels and {len(drawn)} classes of {laid(table is not None)}"
        wanted = f"{plan.width} and {plan.classes} of {laid(plan.overlapping)}"
        raise ModelError(f"{FILE}: atlas {number + 1} has {own}, the model {wanted}; {REMEDY}")
    if folder is not None:
        path = folder / f"atlas_{number + 1}.npy"
        try:
            np.save(path, image)
        except OSError as error:  # of a full disk, which says so itself or that less was written than asked
            raise ResourceError(f"{path}: the disk is full ({error}); free some space and start again") from None
        image = np.load(path, mmap_mode="r")
    patient = tensors.get(f"{number}.patient")  # older ones hold none: each scan is then its own patient
    bare = Prepared(
        f"atlas {number + 1}", image, None, (), (), drawn.astype(np.bool_), plan.kind,
        patient="" if patient is None else f"patient {int(patient) + 1}",
    )  # fmt: skip
    return labelled_as(bare, label.astype(np.int16), table=None if table is None else table.numpy().astype(np.bool_))

"""Labelled scans that travel with a model, because its owner said so: what personalisation deforms to a new scan.

::

    MODEL/
      atlases.safetensors    images at half precision and class indices, both on the model's grid; of labels that
                             overlap indices of combinations, and a table of what these stand for
      atlases.json           SHA-256 of that file and how many scans it holds

They are scans of people. Without ``train --keep-atlases`` a model holds none, and names of cases are not stored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from fewscan.data.dataset import Dataset, load
from fewscan.data.io import atomic
from fewscan.errors import DataError, ModelError
from fewscan.learn.batches import Prepared, labelled_as, prepare
from fewscan.learn.channels import laid, said
from fewscan.learn.checkpoint import Model, sha256, write_json
from fewscan.learn.plan import Plan

FILE, RECORD = "atlases.safetensors", "atlases.json"


def atlases_of(dataset: Dataset, plan: Plan, *, folder: Path) -> list[Prepared]:
    """The labelled scans of a data set as a model sees them.

    Parameters
    ----------
    dataset : Dataset
        Found cases; its labels are matched to the model's by name.
    plan : Plan
        Of the model.
    folder : Path
        Scratch folder, which exists.

    Raises
    ------
    DataError
        If nothing is labelled, labels overlap in one of the two only, or labels or channels are not those of the model.
    """
    if not dataset.labelled:
        raise DataError(f"{dataset.root}: no labelled case, so there is no atlas; put a label map beside an image")
    if (len(dataset.channels), dataset.kind) != (len(plan.channels), plan.kind):
        raise DataError(
            f"{dataset.root}: {len(dataset.channels)} channel(s) of {said(dataset.kind)}, the model takes "
            f"{', '.join(plan.channels)} of {said(plan.kind)}; give atlases with the same channels"
        )
    if dataset.overlapping != plan.overlapping:
        raise DataError(
            f"{dataset.root} holds {laid(dataset.overlapping)}, the model gives {laid(plan.overlapping)}; "
            "give atlases labelled as those it was trained on"
        )
    lacking = [name for name in plan.names.values() if name not in dataset.names.values()]
    if lacking or any(plan.names.get(value) != name for value, name in dataset.names.items()):
        raise DataError(
            f"{dataset.root}: labels {dict(dataset.names)} are not those of the model, {dict(plan.names)}; "
            "give atlases labelled alike, named in labels.json"
        )
    prepared = [prepare(load(case, dataset), plan, folder=folder) for case in dataset.labelled]
    return [case for case in prepared if case.label is not None and any(case.counts[1:])]


def save_atlases(cases: Sequence[Prepared], folder: Path) -> Path:
    """Put atlases beside a model.

    Parameters
    ----------
    cases : sequence of Prepared
        Labelled, on the model's grid.
    folder : Path
        Of the model.
    """
    tensors = {}
    for i, case in enumerate(cases):
        assert case.label is not None
        tensors[f"{i}.image"] = torch.from_numpy(np.array(case.image)).half()
        tensors[f"{i}.label"] = torch.from_numpy(np.array(case.label))
        tensors[f"{i}.drawn"] = torch.from_numpy(np.array(case.drawn))
        if case.table is not None:
            tensors[f"{i}.table"] = torch.from_numpy(np.array(case.table))
    with atomic(folder / FILE) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    write_json({"cases": len(cases), "sha256": sha256(folder / FILE)}, folder / RECORD)
    return folder / FILE


def load_atlases(model: Model) -> list[Prepared]:
    """Atlases that lie beside a model; none where its owner kept none.

    Parameters
    ----------
    model : Model
        From a folder.

    Raises
    ------
    ModelError
        If they are damaged, or were changed since.
    """
    if model.path is None or not (model.path / RECORD).is_file():
        return []
    path = model.path / FILE
    try:
        record = json.loads((model.path / RECORD).read_text())
        if not path.is_file() or sha256(path) != record["sha256"]:
            raise ModelError(f"{path} is not the file that {RECORD} describes (SHA-256 differs); copy the folder again")
        tensors = safetensors.torch.load_file(path)
        return [_case(i, tensors, model.plan) for i in range(int(record["cases"]))]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path} is damaged: {str(error).splitlines()[0][:300]}; train with --keep-atlases") from None


def _case(number: int, tensors: dict[str, torch.Tensor], plan: Plan) -> Prepared:
    image, label, drawn = (tensors[f"{number}.{part}"].numpy() for part in ("image", "label", "drawn"))
    bare = Prepared(f"atlas {number + 1}", image.astype(np.float32), None, (), (), drawn.astype(np.bool_), plan.kind)
    table = tensors.get(f"{number}.table")
    return labelled_as(bare, label.astype(np.int16), table=None if table is None else table.numpy().astype(np.bool_))

"""Data sets for other programs: nnU-Net's raw layout, and label maps as BIDS derivatives."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import kinds
from fewscan.data.dataset import Dataset, load
from fewscan.data.found import LABEL_TAIL, stem_of
from fewscan.data.io import read_labels, write_image, write_labelmap
from fewscan.deliver.structures import structures_of
from fewscan.errors import DataError
from fewscan.learn.channels import said
from fewscan.learn.checkpoint import USE
from fewscan.space.volume import IGNORE

ENTITIES = re.compile(r"sub-[A-Za-z0-9]+(_[a-z]+-[A-Za-z0-9]+)*")


def write_nnunet(dataset: Dataset, folder: Path) -> list[str]:
    """Write a data set as nnU-Net v2 reads it; labels renumbered from 1, voxels not looked at as its ignore label.

    Unlabelled and held-out cases go to ``imagesTs``, labels of the latter to ``labelsTs``.

    Parameters
    ----------
    dataset : Dataset
        Read one case at a time.
    folder : Path
        Empty.

    Returns
    -------
    list of str
        What nnU-Net's format cannot say, one sentence each.
    """
    dataset.one_label_each("a data set of nnU-Net")
    names = dict(sorted(dataset.names.items()))
    numbers = np.zeros(IGNORE + 1, np.uint16)
    for number, value in enumerate(names, start=1):
        numbers[value] = number
    numbers[IGNORE] = len(names) + 1
    notes, ignored = [], False
    held = {id(case) for case in dataset.test}
    for case in [*dataset.cases, *dataset.test]:
        part = "Ts" if case.label is None or id(case) in held else "Tr"
        loaded = load(case, dataset)
        for channel, image in enumerate(loaded.image.data):
            target = folder / f"images{part}" / f"{case.id}_{channel:04d}.nii.gz"
            if target.exists():
                raise DataError(f"{case.images[0]}: case {case.id!r} is there twice, as a held-out one too; rename one")
            write_image(image, target, native=loaded.image.native)
        if loaded.label is not None:
            ignored = ignored or bool((loaded.label.data == IGNORE).any())
            target = folder / f"labels{part}" / f"{case.id}.nii.gz"
            write_labelmap(numbers[loaded.label.data], target, native=loaded.image.native)
        if case.drawn is not None:
            absent = [name for value, name in names.items() if value not in case.drawn]
            notes.append(f"{case.id}: {', '.join(absent)} was not drawn, which nnU-Net takes for background")
    if dataset.kind != "scalar":
        notes.append(f"the channels hold {said(dataset.kind)}, which nnU-Net moves without turning them")
    labels = {"background": 0} | {name: number for number, name in enumerate(names.values(), start=1)}
    if ignored:
        labels["ignore"] = len(names) + 1
    single = dataset.channels == ("image",)
    channels = ("CT",) if single and dataset.modality == "ct" else dataset.channels
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels,
        **kinds.listed(dataset.kind),
        "numTraining": len(dataset.labelled),
        "file_ending": ".nii.gz",
        "description": f"written by fewscan {version('fewscan')}; {USE}",
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return notes


def write_bids(files: Sequence[Path], folder: Path, *, names: Mapping[int, str], ignore: int | None) -> None:
    """Write label maps as BIDS derivatives: discrete segmentations with one lookup table.

    Parameters
    ----------
    files : sequence of Path
        Label maps; a name that starts with ``sub-`` keeps its entities, another becomes the subject.
    folder : Path
        Empty; belongs into the ``derivatives`` of the raw data set.
    names : mapping of int to str
        Labels there may be.
    ignore : int, optional
        Value in the files that means "not looked at"; written as background.

    Raises
    ------
    DataError
        If two files would get the same name.
    """
    made = {"Name": "fewscan", "Version": version("fewscan"), "Description": f"labels for {USE}"}
    description = {
        "Name": "fewscan segmentations",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [made],
    }
    (folder / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    rows = [(s.value, s.name, "#{:02x}{:02x}{:02x}".format(*s.colour)) for s in structures_of(names)]
    lines = ["index\tname\tcolor", *("\t".join(map(str, row)) for row in rows)]
    (folder / "desc-fewscan_dseg.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for file in files:
        name = _entities(file)
        target = folder / name.split("_")[0] / "anat" / f"{name}_desc-fewscan_dseg.nii.gz"
        if target.exists():
            raise DataError(f"{file}: another label map is called {name} too; export them into folders of their own")
        label = read_labels(file, names=names, ignore=ignore)
        data: NDArray[Any] = np.where(label.data == IGNORE, 0, label.data)
        write_labelmap(data, target, native=label.geometry)
        sidecar = target.with_name(target.name.replace(".nii.gz", ".json"))
        sidecar.write_text(json.dumps({"Manual": False, "Sources": [file.name]}, indent=2) + "\n", encoding="utf-8")


def _entities(file: Path) -> str:
    """``sub-...`` with its further entities, from a file name; without its description and contrast."""
    stem = LABEL_TAIL.sub("", stem_of(file))
    match = ENTITIES.match(stem)
    if match:
        return re.sub(r"_desc-[A-Za-z0-9]+", "", match[0])
    return f"sub-{re.sub(r'[^A-Za-z0-9]+', '', stem)}"

"""What a lesion does to one scan: deformation around it, and the structures near it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewscan.data.painting import plain_name
from fewscan.judge import lesions, looks
from fewscan.learn.answers import Segmented
from fewscan.learn.channels import to_look_at
from fewscan.learn.checkpoint import Model
from fewscan.methods import pairwise
from fewscan.space import directions, field
from fewscan.space.volume import IGNORE, Case, Volume

MASKED_MM = 2.0  # around a lesion, where likeness does not count


def placed(lesion: NDArray[np.bool_], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """The mask at the same relative place of another grid.

    Parameters
    ----------
    lesion : (X, Y, Z) bool
        Its mask.
    shape : (int, int, int)
        Of the other grid.
    """
    index = [
        np.minimum((np.arange(n) + 0.5) * m / n, m - 1).astype(int) for n, m in zip(shape, lesion.shape, strict=True)
    ]
    return lesion[np.ix_(*index)]


def deformation_around(image: Volume, lesion: NDArray[np.bool_], *, templates: Sequence[Volume]) -> dict[str, float]:
    """How healthy templates must deform, beyond an affine map, to fit around a lesion: volume, length, rotation.

    Parameters
    ----------
    image : Volume
        Intensities, or directions, of which the lengths or traces are compared.
    lesion : (X, Y, Z) bool
        On its grid; likeness does not count there.
    templates : sequence of Volume
        Healthy scans that hold the same.
    """
    away = looks.distance_mm(lesion, image.geometry.spacing)
    mask = looks.tissue(to_look_at(image).data[0])
    rows = []
    for template in templates:
        found = pairwise.register(image, template, weight=away > MASKED_MM)
        u = field.without_affine(found.field.u, found.matrix, fixed=image.geometry)
        change = np.abs(np.log(np.maximum(field.determinant(torch.from_numpy(u)[None])[0].numpy(), 1e-3)))
        length = np.linalg.norm(np.einsum("ij,jxyz->ixyz", image.geometry.affine[:3, :3], u), axis=0)
        near, far = lesions.near_and_far(change, away, mask=mask)
        turned = directions.turned_deg(torch.from_numpy(u)[None], spacing=image.geometry.spacing)[0].numpy()
        rows.append((near, far, *(lesions.near_and_far(values, away, mask=mask)[0] for values in (length, turned))))
    near, far, moved, angle = (float(np.mean(column)) for column in zip(*rows, strict=True))
    changed = {"volume change": near, "volume change, far": far, "excess": near - far}
    return changed | {"displacement_mm": moved, "turned_deg": angle}


def structures(case: Case, lesion: NDArray[np.bool_], *, answer: Segmented, model: Model) -> dict[str, Any]:
    """Of each structure, drawn or predicted, distance and expected push; Dice near and far where it was drawn.

    Both Dice are means over the same structures, those with enough voxels on either side. Where nobody looked, at a
    structure or at a voxel, the prediction stands.

    Parameters
    ----------
    case : Case
        Labelled or not.
    lesion : (X, Y, Z) bool
        On its grid.
    answer : Segmented
        Of the model, on the same grid.
    model : Model
        Whose structures are looked at.
    """
    away = looks.distance_mm(lesion, case.image.geometry.spacing)
    looked, drawn = _drawn(case)
    effect = lesions.mass_effect_mm(lesion, case.image.geometry.spacing)
    distances, pushed, pairs = {}, {}, []
    for value, name in model.names.items():
        mask, truth = answer.mask(value, model.plan), drawn.get(plain_name(name))
        if truth is not None:
            pairs.append(lesions.near_and_far_dice(mask & looked, truth, away=away))
            mask = np.where(looked, truth, mask)
        distances[name] = float(away[mask].min()) if mask.any() else math.nan
        pushed[name] = float(effect[mask & ~lesion].mean()) if (mask & ~lesion).any() else math.nan
    held = [pair for pair in pairs if math.isfinite(pair[0])]  # of both sides or of none
    near, far = np.mean(held, axis=0).tolist() if held else (math.nan, math.nan)
    return {"distance_mm": distances, "pushed_mm": pushed, "dice_near": near, "dice_far": far}


def _drawn(case: Case) -> tuple[NDArray[np.bool_], dict[str, NDArray[np.bool_]]]:
    """Voxels that somebody looked at, and the structures that were looked for."""
    if case.label is None:
        return np.zeros(case.image.geometry.shape, bool), {}
    names = {v: n for v, n in case.label.names.items() if case.drawn is None or v in case.drawn}
    return case.label.data != IGNORE, {plain_name(name): case.label.mask(value) for value, name in names.items()}

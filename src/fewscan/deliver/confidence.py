"""How sure a model is of a surface, from the probabilities it gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from fewscan.deliver.surface import Mesh
from fewscan.space.geometry import Array
from fewscan.space.volume import Volume


class Classes(NamedTuple):
    """Probabilities of all classes of a label map, and at which place that of each label value is.

    Parameters
    ----------
    volume : Volume
        A channel for each class, background first, 0 to 1 or in 255ths.
    places : mapping of int to int
        Label value to channel.
    """

    volume: Volume
    places: Mapping[int, int]

    def on(self, mesh: Mesh, value: int) -> Array:
        """How sure the boundary of a label is, as `on_surface`.

        Parameters
        ----------
        mesh : Mesh
            Of that label.
        value : int
            Of the label.
        """
        return on_surface(mesh, self.volume, channel=self.places[value])

    def merged(self, values: Iterable[int], *, whole: bool) -> Classes:
        """Probability of any of some labels, as that of label 1.

        Parameters
        ----------
        values : iterable of int
            Of these labels.
        whole : bool
            Whether all that there are are meant, also those that the label map does not hold: what background leaves.
        """
        data = self.volume.data
        top = np.float32(255 if np.issubdtype(data.dtype, np.integer) else 1)
        found = 1 - data[0] / top if whole else data[[self.places[value] for value in values]].sum(0) / top
        return Classes(replace(self.volume, data=found[None], channels=("merged",)), {1: 0})


def on_surface(mesh: Mesh, probabilities: Volume, *, channel: int) -> Array:
    """How far the probability of a label falls across its surface, (V,), 0 to 1.

    On the surface itself the probability is about a half whatever the model knows. So it is read one voxel inside and
    one voxel outside along the normal, and their difference taken: 1 is a sharp boundary, 0 is none.

    Parameters
    ----------
    mesh : Mesh
        RAS+ mm.
    probabilities : Volume
        A channel for each class, background first, 0 to 1 or in 255ths.
    channel : int
        Of the label.
    """
    geometry = probabilities.geometry
    step = mesh.normals * geometry.voxel_mm3 ** (1 / 3)
    inverse = np.linalg.inv(geometry.affine)
    whole = 255.0 if np.issubdtype(probabilities.data.dtype, np.integer) else 1.0
    sides = []
    for places in (mesh.points - step, mesh.points + step):
        index = (places @ inverse[:3, :3].T + inverse[:3, 3]).T
        read = ndimage.map_coordinates(probabilities.data[channel], index, output=np.float64, order=1, mode="nearest")
        sides.append(read / whole)
    found: Array = np.clip(sides[0] - sides[1], 0, 1)
    return found

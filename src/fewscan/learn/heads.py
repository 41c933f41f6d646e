"""The last layer of a trained model for other labels, and for labels that overlap where the model's do not, or back.

A class wins a softmax by the difference of logits, a mask is there where its own logit is above zero. So a class logit
less that of background is the logit of a mask, its sigmoid the probability of the class against background; and masks'
logits beside a background of zero are those of classes. Where the masks do not overlap, the answers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewscan.learn.checkpoint import PRIOR


def carried(source: Tensor, fresh: Tensor, *, rows: Sequence[int | None], before: bool, after: bool) -> Tensor:
    """Weights, or biases, of the last layer, background first.

    Parameters
    ----------
    source : (K, ...) float
        Of the trained model.
    fresh : (L + 1, ...) float
        Drawn at random.
    rows : sequence of int or None
        For each label, the trained model's row; None keeps the fresh one.
    before, after : bool
        Whether the trained model's labels, and the new ones, overlap.

    Examples
    --------
    >>> classes, fresh = torch.tensor([1.0, 3.0, 0.5]), torch.tensor([9.0, 9.0])
    >>> carried(classes, fresh, rows=[2], before=False, after=True).tolist()
    [9.0, -0.5]
    >>> carried(torch.tensor([9.0, -0.5]), fresh, rows=[1], before=True, after=False).tolist()
    [0.0, -0.5]
    """
    background = source[0]
    if before != after:
        if all(row is None for row in rows):
            return fresh
        source = source - source[0] if after else source
        background = fresh[0] if after else torch.zeros_like(source[0])  # the first logit of masks means nothing
        if before and fresh.ndim == 1:  # beside a background of zero what is new would win half of all voxels
            fresh = torch.full_like(fresh, math.log(PRIOR / (1 - PRIOR)))
    return torch.stack([background, *(fresh[k] if row is None else source[row] for k, row in enumerate(rows, start=1))])

"""Segmentation terms. They see only what was labelled: voxels by ``seen``, labels by ``drawn``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs(logits: Tensor, drawn: Tensor | None = None) -> Tensor:
    """Log-softmax over classes, in which labels nobody looked for count as background.

    A case in which only some structures were drawn shows the others as background. There the network may answer with
    either, so their probabilities are added to the background's (the marginal loss of Shi et al. 2021, Medical Image
    Analysis 70, doi 10.1016/j.media.2021.101979, eq. 2).

    Parameters
    ----------
    logits : (B, K, X, Y, Z) float
        Network output, background first.
    drawn : (B, K) bool, optional
        Labels that were looked for in each case; all when None. Channels of the others become -inf.
    """
    log_p = F.log_softmax(logits.float(), 1)
    if drawn is None or bool(drawn.all()):
        return log_p
    hidden = ~drawn.to(log_p.device)[:, :, None, None, None]
    hidden = hidden & (torch.arange(log_p.shape[1], device=log_p.device) > 0).view(1, -1, 1, 1, 1)
    merged = hidden.clone()
    merged[:, 0] = True
    background = log_p.masked_fill(~merged, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([background, log_p[:, 1:].masked_fill(hidden[:, 1:], -torch.inf)], 1)


def cross_entropy(log_p: Tensor, target: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the voxels that were looked at.

    Parameters
    ----------
    log_p : (B, K, X, Y, Z) float
        From `log_probs`.
    target : (B, K, X, Y, Z) float
        Soft one-hot; a voxel whose channels sum to 0 was not looked at.
    weights : (K,) float, optional
        Of each class; all alike when None.
    """
    if weights is not None:
        target = target * weights.to(target.device).view(1, -1, 1, 1, 1)
    seen = target.sum(1)
    loss = -(target * log_p.clamp(min=-30)).sum(1)  # -inf only where the target is 0
    return loss.sum() / seen.sum().clamp(min=1)


def soft_dice(probs: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """One minus the mean soft Dice of the foreground classes that occur in the target; 0 when none does.

    Classes that the patch does not hold are left to the cross-entropy: their Dice would only say "predict nothing".

    Parameters
    ----------
    probs : (B, K, X, Y, Z) float
        Class probabilities, background first.
    target : (B, K, X, Y, Z) float
        Soft one-hot; a voxel whose channels sum to 0 was not looked at.
    smooth : float
        Voxels added to both sides of the ratio.

    Examples
    --------
    >>> mask = torch.zeros(1, 2, 4, 4, 4); mask[:, 1, 1:3] = 1; mask[:, 0] = 1 - mask[:, 1]
    >>> soft_dice(mask, mask).item()
    0.0
    """
    seen = target.sum(1, keepdim=True)
    probs, target = probs[:, 1:], target[:, 1:]
    overlap = (probs * target).sum((0, 2, 3, 4))
    total = (probs * seen).sum((0, 2, 3, 4)) + target.sum((0, 2, 3, 4))
    there = (target.sum((0, 2, 3, 4)) > 0.5).float()
    dice = (2 * overlap + smooth) / (total + smooth)
    return ((1 - dice) * there).sum() / there.sum().clamp(min=1)


def sigmoid_terms(logits: Tensor, target: Tensor, *, drawn: Tensor | None = None) -> dict[str, Tensor]:
    """Dice and cross-entropy of labels that may overlap: an independent sigmoid each, no background.

    The cross-entropy is summed over labels, so that the slope on each logit is that of a softmax. As in `soft_dice`, a
    label that the batch does not hold counts in the cross-entropy only.

    Parameters
    ----------
    logits : (B, K, X, Y, Z) float
        Network output; the first channel means nothing.
    target : (B, K, X, Y, Z) float
        How much of a voxel was looked at, then a soft mask of each label.
    drawn : (B, K) bool, optional
        Labels that were looked for in each case; all when None. The others do not count.

    Examples
    --------
    >>> target = torch.ones(1, 3, 4, 4, 4); target[:, 1, 2:] = 0; target[:, 2, 3:] = 0
    >>> terms = sigmoid_terms(60 * target - 30, target)
    >>> [round(term.item(), 4) for term in terms.values()]
    [0.0, 0.0]
    """
    seen, masks, logits = target[:, :1], target[:, 1:], logits[:, 1:].float()
    looked = seen.expand_as(masks)
    if drawn is not None and not bool(drawn.all()):
        asked = drawn[:, 1:, None, None, None].to(masks)
        looked, masks = looked * asked, masks * asked
    loss = masks * F.softplus(-logits) + (looked - masks) * F.softplus(logits)
    probs, axes = logits.sigmoid(), (0, 2, 3, 4)
    held = masks.sum(axes)
    dice = (2 * (probs * masks).sum(axes) + 1) / ((probs * looked).sum(axes) + held + 1)
    there = (held > 0.5).float()
    return {
        "dice": ((1 - dice) * there).sum() / there.sum().clamp(min=1),
        "cross_entropy": loss.sum() / seen.sum().clamp(min=1),
    }

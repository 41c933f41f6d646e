"""Robust training from few labels: one preset for every task.

Ekman, Barakat, Heiberg: "Generalizable deep learning framework for 3D medical image segmentation using limited training
data", 3D Printing in Medicine 11:9 (2025), doi 10.1186/s41205-025-00254-1. Only the abstract was readable, so this is a
re-implementation of its claim, not of its code: one small set of hyper-parameters and augmentation settings for all
tasks, few training cases, no heavy GPU. What is ours: the plan derived from the data (`learn.plan`), batched
augmentation, a loss that sees only what was labelled, a moving average of the weights as the result, and a schedule
that ends annealed at any budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fewscan.learn import losses
from fewscan.learn.batches import Batch, PatchBatches, Prepared
from fewscan.learn.checkpoint import Model, build_segmenter
from fewscan.learn.config import Settings
from fewscan.learn.engine import Phase, Terms
from fewscan.learn.hardware import Hardware
from fewscan.learn.plan import Plan
from fewscan.learn.request import Request
from fewscan.learn.session import Session, open_session

WEIGHTS = {"dice": 1.0, "cross_entropy": 1.0}


def phase(
    session: Session,
    *,
    cases: Sequence[Prepared] | None = None,
    segmenter: nn.Module | None = None,
    name: str = "segment",
) -> Phase:
    """Supervised training of a segmenter on augmented patches.

    Parameters
    ----------
    session : Session
        Plan, settings and prepared cases.
    cases : sequence of Prepared, optional
        To learn from; the session's labelled ones when None.
    segmenter : nn.Module, optional
        To train; a fresh one when None.
    name : str
        For the log.
    """
    network = segmenter or build_segmenter(session.plan, session.settings, seed=session.request.seed)
    return supervised(
        cases or session.labelled, network.to(session.hardware.device), plan=session.plan, settings=session.settings,
        hardware=session.hardware, name=name,
    )  # fmt: skip


def supervised(
    cases: Sequence[Prepared], network: nn.Module, *, plan: Plan, settings: Settings, hardware: Hardware, name: str
) -> Phase:
    """The same for a network that is there, outside of a session too.

    Parameters
    ----------
    cases : sequence of Prepared
        To learn from.
    network : nn.Module
        To train, on the device.
    plan : Plan
        Patches and classes.
    settings : Settings
        Of training and augmentation.
    hardware : Hardware
        Device and precision.
    name : str
        For the log.
    """
    train = settings.train
    patches = PatchBatches(
        cases, plan, config=settings.augment, batch=plan.batch, foreground=train.foreground, device=hardware.device
    )
    weights = torch.tensor(plan.weights) if plan.weights else None

    def objective(batch: Batch) -> Terms:
        with hardware.autocast():
            logits = network(batch.images)
        if plan.overlapping:
            return losses.sigmoid_terms(logits, batch.labels, drawn=batch.drawn)
        log_p = losses.log_probs(logits, batch.drawn)
        return {
            "dice": losses.soft_dice(log_p.exp(), batch.labels),
            "cross_entropy": losses.cross_entropy(log_p, batch.labels, weights=weights),
        }

    return Phase(name=name, objective=objective, weights=WEIGHTS, batches=patches, train=network, lr=train.lr)


def run(request: Request) -> Model:
    """Train a segmenter and leave it as a model folder.

    Parameters
    ----------
    request : Request
        Data, limits, settings.

    Raises
    ------
    DataError
        If nothing is labelled.
    ConfigError
        If the folder is taken or the limits make no sense.
    """
    with open_session(request) as session:
        segment = phase(session)
        state = session.fit([segment])
        return session.finish(state.average_of(segment.train))

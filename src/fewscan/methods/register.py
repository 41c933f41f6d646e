"""Learned registration: a network that answers with a diffeomorphism, trained on whole scans, labelled or not.

The objective is the registration half of Xu & Niethammer 2019 (DeepAtlas, MICCAI, arXiv 1904.08465, eq. 2): image term,
smoothness and, where labels are known, anatomy. Ours: local correlation instead of global, a stationary velocity whose
flow cannot fold (Dalca et al. 2018, arXiv 1805.04605), and inverse consistency as an option (GradICON, Tian et al.
2023, arXiv 2206.05897). Instance optimisation at use time is `space.deformable.deform` from the network's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewscan.errors import DataError, ModelError
from fewscan.learn import regularity
from fewscan.learn.alignment import align
from fewscan.learn.checkpoint import Model
from fewscan.learn.engine import Phase, Terms
from fewscan.learn.folder import CACHE
from fewscan.learn.networks import Absent
from fewscan.learn.pairs import Pair, PairBatches, Whole, whole
from fewscan.learn.registrar import Registrar, build_registrar, register_images, registration_grid
from fewscan.learn.request import Request
from fewscan.learn.session import Session, open_session
from fewscan.space import field, kernels
from fewscan.space.deformable import overlap

SECONDS_A_SCAN = 4  # of a budget, for each scan without labels that is read and aligned
VOXELS = {"cpu": 250_000, "gpu": 2_000_000}


def build(session: Session) -> Registrar:
    """A fresh registrar for the scans of a session.

    Parameters
    ----------
    session : Session
        Plan, settings and prepared cases.
    """
    pair, device = session.settings.pair, session.hardware.device
    session.request.say(f"registration kernels on {device}: {kernels.path(device)}")
    extent = np.median([c.image.shape[1:] for c in (*session.labelled, *session.unlabelled)], 0)
    voxels = pair.voxels or VOXELS["cpu" if device.type == "cpu" else "gpu"]
    shape = registration_grid(extent.tolist(), session.plan.spacing, voxels=voxels, levels=len(pair.widths))
    seed = session.request.seed + 1  # not the weights of the segmenter
    return build_registrar(
        channels=session.plan.guides, shape=shape, widths=pair.widths, seed=seed
    ).to(device)  # fmt: skip


def enough(session: Session) -> None:
    """Refuse a session in which no two scans make a pair.

    Parameters
    ----------
    session : Session
        With its prepared cases.

    Raises
    ------
    DataError
        If there are fewer than two.
    """
    if len(session.labelled) + len(session.unlabelled) < 2:
        raise DataError(
            f"{session.request.dataset.root}: registration needs at least two scans; add another one, with or without "
            "labels"
        )


def spacing(session: Session, registrar: Registrar) -> list[float]:
    """Voxel size of the registrar's grid for a median scan, mm.

    Parameters
    ----------
    session : Session
        Prepared cases.
    registrar : Registrar
        Whose grid.
    """
    extent = np.median([c.image.shape[1:] for c in (*session.labelled, *session.unlabelled)], 0)
    size: list[float] = (extent * np.array(session.plan.spacing) / np.array(registrar.shape)).tolist()
    return size


def wholes(session: Session, registrar: Registrar) -> list[Whole]:
    """Every case of a session on the registrar's grid, affinely aligned, the labelled ones first.

    Parameters
    ----------
    session : Session
        Prepared cases, and the cache folder.
    registrar : Registrar
        Whose grid.
    """
    folder: Path = session.request.out / CACHE
    cases = [*session.labelled, *session.unlabelled]
    places = align(cases, registrar.shape, spacing=session.plan.spacing)
    return [whole(c, p, folder=folder, classes=session.plan.classes) for c, p in zip(cases, places, strict=True)]


def pool(request: Request) -> int:
    """Most scans without labels that a run uses: reading and aligning them must leave most of a budget for training.

    Parameters
    ----------
    request : Request
        Budget and settings.
    """
    most, budget = request.settings.joint.pool, request.budget or request.extend
    return most if budget is None else max(1, min(most, int(budget / SECONDS_A_SCAN)))


def phase(
    session: Session, registrar: Registrar, *, cases: Sequence[Whole], steps: int = 1, anatomy: bool = True
) -> Phase:
    """Training of a registrar on pairs of whole scans.

    Parameters
    ----------
    session : Session
        Settings and hardware.
    registrar : Registrar
        To train.
    cases : sequence of Whole
        From `wholes`.
    steps : int
        Steps in a row.
    anatomy : bool
        Whether known labels count.
    """
    config, hardware = session.settings.pair, session.hardware
    augment = session.settings.augment
    half = {name: getattr(augment, name) / 2 for name in ("rotate_deg", "scale", "shift", "elastic")}
    batches = PairBatches(
        cases, session.plan, config=replace(augment, **half), labelled=config.labelled,
        spacing=spacing(session, registrar), device=hardware.device,
    )  # fmt: skip
    weights = {"similarity": 1.0, "smoothness": config.smoothness}
    weights |= {"anatomy": config.anatomy} if anatomy else {}
    weights |= {"inverse": config.inverse} if config.inverse > 0 else {}

    def objective(batch: Pair) -> Terms:
        with hardware.autocast():
            v = registrar.velocity(batch.moving, batch.fixed)
        small = field.integrate(v)
        u = field.resize(small, registrar.shape)
        warped = kernels.sample(batch.moving, u)
        terms = {
            "similarity": 1 - kernels.lncc(batch.fixed, warped, radius=config.radius),
            "smoothness": regularity.diffusion(v),
        }
        if anatomy:
            terms["anatomy"] = anatomy_term(batch, u)
        if config.inverse > 0:
            with hardware.autocast():
                back = registrar.velocity(batch.fixed, batch.moving)
            terms["inverse"] = regularity.inconsistency(small, field.integrate(back))
        return terms

    return Phase(
        name="register",
        objective=objective,
        weights=weights,
        batches=batches,
        train=registrar,
        steps=steps,
        lr=config.lr,
    )


def anatomy_term(batch: Pair, u: Tensor) -> Tensor:
    """One minus the overlap of warped and fixed labels where those are known; 0 where none are compared.

    Parameters
    ----------
    batch : Pair
        With its labels.
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    """
    if batch.moving_label.shape[1] == 0:
        return u.sum() * 0
    both = batch.fixed_seen * kernels.sample(batch.moving_seen, u.detach())
    return 1 - overlap(batch.fixed_label * both, kernels.sample(batch.moving_label, u) * both)


def run(request: Request) -> Model:
    """Train a registration network and leave it as a model folder.

    Parameters
    ----------
    request : Request
        Data, limits, settings.

    Raises
    ------
    DataError
        If there are fewer than two scans, or labels overlap.
    """
    request.dataset.one_label_each("--method register")
    with open_session(request, unlabelled=pool(request), labels=False) as session:
        enough(session)
        registrar = build(session)
        register = phase(session, registrar, cases=wholes(session, registrar), anatomy=bool(session.labelled))
        state = session.fit([register])
        return session.finish(Absent(), others={"registrar": state.average_of(registrar)})


def starter(model: Model, *, device: torch.device | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """A model's first guess for `pairwise.register`.

    Parameters
    ----------
    model : Model
        Trained with ``--method register`` or ``joint``.
    device : torch.device, optional
        Where its network is to run, and is moved to; where it is when None.

    Raises
    ------
    ModelError
        If it holds no registration network.
    """
    registrar = model.others.get("registrar")
    if not isinstance(registrar, Registrar):
        raise ModelError(
            f"{model.path} holds no registration network (nor does one of --method joint where unlabelled scans did "
            "not help, unless it was trained with --set joint.decide=no); train one with --method register, or leave "
            "out --model"
        )
    if device is not None:
        registrar.to(device)

    def start(fixed: Tensor, moving: Tensor) -> Tensor:
        if len(fixed) != registrar.spec["channels"]:
            wanted = registrar.spec["channels"]
            raise ModelError(f"the model registers {wanted} channel(s), the scans have {len(fixed)}")
        return register_images(registrar, fixed, moving=moving)

    return start

"""Joint registration and segmentation: unlabelled scans teach both networks, down to one labelled scan.

Xu & Niethammer: "DeepAtlas: Joint Semi-supervised Learning of Image Registration and Segmentation", MICCAI 2019,
arXiv 1904.08465; their loss names in brackets. The registrar learns from image similarity (L_i), smoothness (L_r) and
the overlap of warped and fixed labels (L_a); the segmenter from drawn labels (L_sp) and from warped ones on unlabelled
scans (L_a). Both are trained apart first, then in turns, one frozen while the other learns. A pair of which both scans
are labelled trains the registrar's L_a only, a pair of which neither is trains nobody's.

What is ours: the labels that the registrar gives an unlabelled scan are a locally weighted vote of several atlases and
count only where they and the averaged segmenter are sure together; they are renewed between rounds and cached, so that
segmentation steps on unlabelled scans cost no more, and are as strongly augmented, as those on labelled ones. At the
end the segmenter of before the turns is kept where the evidence speaks against what came of them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewscan.data.io import atomic
from fewscan.learn import infer
from fewscan.learn.batches import Prepared, labelled_as, resample_index
from fewscan.learn.checkpoint import Model
from fewscan.learn.engine import Phase
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar
from fewscan.learn.request import Request
from fewscan.learn.session import Session, open_session
from fewscan.learn.state import State
from fewscan.methods import draft, register, segment

SEGMENTER_STEPS = 10  # in a row, of each kind
SURE = 0.65  # mean probability of atlases and segmenter from which a pseudo-label counts
Index = NDArray[np.int16]


def run(request: Request) -> Model:
    """Train both networks and leave them as one model folder.

    Parameters
    ----------
    request : Request
        Data, limits, settings.

    Raises
    ------
    DataError
        If nothing is labelled, or there is one scan only.
    """
    with open_session(request, unlabelled=True) as session:
        config, folder = session.settings.joint, request.out / "pseudo"
        alone = dataclasses.replace(segment.phase(session), steps=SEGMENTER_STEPS)
        registrar = register.build(session)
        cases = register.wholes(session, registrar)
        together = register.phase(session, registrar, cases=cases, steps=config.registrar_steps)
        state = session.fit([alone, together], until=config.apart)
        before = _kept(state.average_of(alone.train), folder / "apart.safetensors", session)
        for turn in range(config.rounds):
            if session.interrupted or request.dry_run or not session.unlabelled:
                break
            labels = _labels(
                session, state, folder / f"round{turn}.npz", segmenter=alone.train, registrar=registrar, cases=cases
            )
            phases = _phases(session, labels, cases=cases, alone=alone, together=together)
            state = session.fit(phases, until=config.apart + (1 - config.apart) * (turn + 1) / config.rounds)
        state = session.fit([alone, together])
        return _finish(session, state, before, segmenter=alone.train, registrar=registrar)


def _phases(
    session: Session, labels: Mapping[str, Index], *, cases: Sequence[Whole], alone: Phase, together: Phase
) -> list[Phase]:
    """Turns of one round: drawn labels, pseudo-labels, registration."""
    config, plan = session.settings.joint, session.plan
    if config.teach != "segmenter":
        for case in cases:
            if not case.labelled and case.id in labels:
                shape = (case.image.shape[1], case.image.shape[2], case.image.shape[3])
                case.label = resample_index(labels[case.id], shape, classes=plan.classes)
    if config.teach == "registrar":
        return [alone, together]
    taught = [labelled_as(case, labels[case.id]) for case in session.unlabelled if case.id in labels]
    useful = [case for case in taught if any(case.counts[1:])]
    if not useful or config.unlabelled == 0:
        return [alone, together]
    share = config.unlabelled / max(1e-6, 1 - config.unlabelled)
    steps = max(1, round(SEGMENTER_STEPS * min(share, 4)))
    anatomy = segment.phase(session, cases=useful, segmenter=alone.train, name="anatomy")
    return [alone, dataclasses.replace(anatomy, steps=steps), together]


def _labels(
    session: Session, state: State, path: Path, *, segmenter: nn.Module, registrar: Registrar, cases: Sequence[Whole]
) -> dict[str, Index]:
    """Pseudo-labels of unlabelled scans on the plan's grid, -1 where unsure; read back when a run goes on."""
    unlabelled = session.unlabelled
    if session.request.going_on and path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return {unlabelled[int(i)].id: stored[i] for i in stored.files}
    most = session.settings.joint.scans
    order = np.random.default_rng([session.request.seed, state.step]).permutation(len(unlabelled))[:most]
    session.request.say(f"labelling {len(order)} unlabelled scan(s) by atlases and segmenter")
    atlases = [case for case in cases if case.labelled]
    others = {case.id: case for case in cases if not case.labelled}
    moving, still = state.average_of(registrar).eval(), state.average_of(segmenter).eval()
    predictor = infer.network_predictor(still, session.hardware)
    answer: dict[str, Index] = {}
    for i in sorted(order.tolist()):
        case = unlabelled[i]
        vote = draft.vote(
            others[case.id].image, atlases, registrar=cast(Registrar, moving), most=session.settings.joint.atlases,
            classes=session.plan.classes,
        )  # fmt: skip
        answer[case.id] = _fused(case, vote, session, predictor)
    with atomic(path) as temporary, Path(temporary).open("wb") as file:
        named = {f"{i}": answer[case.id] for i, case in enumerate(unlabelled) if case.id in answer}
        np.savez_compressed(file, **named)  # type: ignore[arg-type]
    return answer


def _fused(case: Prepared, vote: Tensor, session: Session, predictor: infer.Predictor) -> Index:
    """Where atlases and segmenter are sure together; the atlases alone if so configured."""
    image = torch.from_numpy(np.array(case.image))
    shape = (image.shape[1], image.shape[2], image.shape[3])
    probs = draft.resize_vote(vote, shape)
    if session.settings.joint.agree:
        probs = (probs + infer.probabilities(image, session.plan, predictor=predictor)) / 2
        top, index = probs.max(0)
        index = torch.where(top >= SURE, index, torch.full_like(index, -1))
    else:
        index = probs.argmax(0)
    return index.to(torch.int16).numpy()


def _kept(network: nn.Module, path: Path, session: Session) -> nn.Module:
    """The segmenter as it was trained apart; on disk, because a run that goes on needs it again."""
    kept = copy.deepcopy(network)
    if session.request.going_on and path.is_file():
        kept.load_state_dict(safetensors.torch.load_file(path))
    elif not session.request.dry_run:
        path.parent.mkdir(exist_ok=True)
        with atomic(path) as temporary:
            safetensors.torch.save_file({k: v.contiguous() for k, v in kept.state_dict().items()}, temporary)
    return kept


def _finish(session: Session, state: State, before: nn.Module, *, segmenter: nn.Module, registrar: Registrar) -> Model:
    """Keep the better segmenter by evidence that needs no further label."""
    after, verdict = state.average_of(segmenter), {}
    if session.unlabelled and not session.request.dry_run and not session.interrupted:
        verdict = guard(session, before=before, after=after)
        session.request.say(verdict["reason"])
    kept = before if verdict.get("kept") == "apart" else after
    return session.finish(kept, others={"registrar": state.average_of(registrar)}, record={"guard": verdict})


def guard(session: Session, *, before: nn.Module, after: nn.Module, most: int = 8) -> dict[str, Any]:
    """Whether what joint training made of the segmenter may be kept.

    Two signs without a further label: Dice between the answers to an unlabelled scan and to the same scan with other
    contrast, shading and noise; and Dice on the labelled scans, which shows a collapse. The earlier segmenter is kept
    where it is better by `WORSE` in either.

    Parameters
    ----------
    session : Session
        Plan and cases.
    before, after : nn.Module
        Segmenters.
    most : int
        Scans of each kind to look at.
    """
    rows = {}
    for name, network in (("apart", before), ("joint", after)):
        predictor = infer.network_predictor(network.eval(), session.hardware)
        consistency = [_consistency(c, session, predictor) for c in session.unlabelled[:most]]
        fit = [_fit(c, session, predictor) for c in session.labelled[:most]]
        rows[name] = {"consistency": float(np.mean(consistency)), "labelled": float(np.mean(fit))}
    lost = {k: rows["apart"][k] - rows["joint"][k] for k in ("consistency", "labelled")}
    worse = [k for k, v in lost.items() if v > WORSE[k]]
    kept = "apart" if worse else "joint"
    reason = f"guard: kept the segmenter of {kept} training; " + ", ".join(
        f"{k} {rows['apart'][k]:.3f} before and {rows['joint'][k]:.3f} after" for k in lost
    )
    return {"kept": kept, "reason": reason, **rows}


WORSE = {"consistency": 0.02, "labelled": 0.03}  # Dice


def _answer(image: Tensor, session: Session, predictor: infer.Predictor) -> Tensor:
    return infer.probabilities(image, session.plan, predictor=predictor).argmax(0)


def _consistency(case: Prepared, session: Session, predictor: infer.Predictor) -> float:
    """Dice between the answers to a scan and to a disturbed copy of it."""
    image = torch.from_numpy(np.array(case.image))
    other = draft.disturbed(image, session.settings.augment, spacing=session.plan.spacing)
    return _dice(_answer(image, session, predictor), _answer(other, session, predictor))


def _fit(case: Prepared, session: Session, predictor: infer.Predictor) -> float:
    assert case.label is not None
    truth = torch.from_numpy(np.array(case.label))
    found = _answer(torch.from_numpy(np.array(case.image)), session, predictor)
    return _dice(torch.where(truth < 0, 0, found), truth.clamp(min=0))


def _dice(a: Tensor, b: Tensor) -> float:
    """Mean over the labels that occur in either map; 1 when none does."""
    values = sorted(set(np.unique(a.numpy()).tolist()) | set(np.unique(b.numpy()).tolist()))
    scores = [2 * float(((a == k) & (b == k)).sum()) / float((a == k).sum() + (b == k).sum()) for k in values if k > 0]
    return float(np.mean(scores)) if scores else 1.0

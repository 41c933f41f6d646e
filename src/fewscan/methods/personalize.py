"""Inference-specific learning: labelled scans in the shape of the one to segment, and a segmenter refined on them.

Chen, Liu, Li, Han, Xing: "Inference-specific learning for improved medical image segmentation", Medical Physics 52(7),
2025, doi 10.1002/mp.17883. Only the abstract was readable, so this is a re-implementation of its three stages, not of
its code: a first mask; the training scans deformed to the scan at hand, supervised by that mask; a copy of the
segmenter refined on them; with a moving average of the mask throughout.

What is ours: the first mask is the mean over disturbed views of the scan; all atlases are deformed at once; the
answer is what atlases and segmenters say together, by what each is worth (log odds of being right, as in
`methods.pseudo`); the scan itself is refined on too, where they agree; and a guard that keeps the first mask where the
evidence, all of it without a label, speaks against the change. The model that was given is never changed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fewscan.errors import ConfigError
from fewscan.learn import infer
from fewscan.learn.alignment import grid_of
from fewscan.learn.answers import after_none, certain, chosen, confident, labelled
from fewscan.learn.batches import Prepared, labelled_as
from fewscan.learn.checkpoint import Model
from fewscan.learn.engine import Limits, fit
from fewscan.learn.hardware import Hardware
from fewscan.learn.registrar import Registrar, register_images
from fewscan.learn.state import State
from fewscan.learn.views import belief, views
from fewscan.methods import draft, segment, voting
from fewscan.methods.evidence import Known, mean_dice, met, objection, one_each, uncalibrated
from fewscan.methods.pseudo import ALONE, Rating, index_of
from fewscan.space import affine, directions
from fewscan.space import field as fields
from fewscan.space.deformable import DeformConfig, deform
from fewscan.space.geometry import Array, Geometry, with_at_most
from fewscan.space.similarity import lncc, ncc
from fewscan.space.volume import resample

MOST_VOXELS = 1_000_000  # of the grid on which atlases are deformed
MOST_MASKS = 8  # labels that supervise the deformation, the largest ones: each costs as much as an image channel
AFFINE_LEVELS = ((8_000, 60),)
WARMED = DeformConfig(shrink=(2,), steps=(30,))  # from a registration network's answer
COLD = DeformConfig(shrink=(4, 2), steps=(60, 40))
MOST_FITTED = 12  # atlases that are affinely fitted to a scan; of more, thumbnails tell those most like it
TRIED = 5  # steps of the refinement after which it is known how long one takes
FITTING = "atlases and scan fit each other"

Mode = Literal["auto", "always"]


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig:
    """One default for all tasks.

    Parameters
    ----------
    atlases : int
        At most so many are deformed, those most like the scan.
    views : int
        Disturbed copies of the scan that the first mask is averaged over.
    rounds : int
        Of deformation.
    memory : float
        Share of the mask that a round keeps.
    anatomy : float
        Weight of the mask against the image in the deformation; 0 aligns by intensity alone.
    steps : int
        Of refinement; 0 leaves it out.
    lr : float
        Its learning rate.

    Raises
    ------
    ConfigError
        If a value makes no sense.
    """

    atlases: int = 5
    views: int = 3
    rounds: int = 2
    memory: float = 0.5
    anatomy: float = 1.0
    steps: int = 40
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if self.atlases < 1 or self.rounds < 1 or self.views < 0 or self.steps < 0:
            raise ConfigError("personalisation needs at least one atlas and one round, and no negative number")
        if not 0 <= self.memory < 1 or self.anatomy < 0 or self.lr <= 0:
            raise ConfigError("memory must lie in 0 to 1, anatomy must not be negative and lr must be positive")


@dataclass(frozen=True, eq=False)
class Personalized:
    """One scan, before and after.

    Parameters
    ----------
    before, after : (K, X, Y, Z) float
        Class probabilities on the model's grid.
    kept : {"before", "after"}
        What the guard chose.
    reason : str
        Why, for people: `FITTING`, or what speaks against the change, also where it was made because that was asked.
    evidence : mapping of str to float
        The figures behind it.
    """

    before: Tensor
    after: Tensor
    kept: Literal["before", "after"]
    reason: str
    evidence: Mapping[str, float]

    @property
    def probs(self) -> Tensor:
        """Those that were kept."""
        return self.after if self.kept == "after" else self.before


class _Aligned(NamedTuple):
    """Atlases affinely on a scan: its own grid, the one to deform on, both images there, and where to start."""

    own: Geometry
    grid: Geometry
    fixed: Tensor
    moving: Tensor
    atlases: Sequence[tuple[Prepared, Array]]
    start: Tensor | None


class Personalizer:
    """A model and its atlases, ready for one scan after another.

    Parameters
    ----------
    model : Model
        Stays as it is.
    atlases : sequence of Prepared
        Labelled scans on the model's grid; at least one.
    config : PersonalizeConfig
        How.
    hardware : Hardware
        Where.
    say : callable
        Gets a line as the atlases are compared with each other, before the first scan.
    """

    def __init__(
        self, model: Model, atlases: Sequence[Prepared], *, config: PersonalizeConfig, hardware: Hardware,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.model, self.plan, self.config, self.hardware = model, model.plan, config, hardware
        self.atlases, self.say = list(atlases), say
        self.segmenter = model.segmenter.to(hardware.device).eval()
        self._known: Known | None = None

    @functools.cached_property
    def _thumbnails(self) -> list[Tensor]:
        """Of all atlases."""
        return [draft.thumbnail(torch.from_numpy(np.array(atlas.guide))) for atlas in self.atlases]

    @property
    def known(self) -> Known:
        """Found out when it is first asked for."""
        if self._known is None:
            worth, alike = [], []
            left_out = one_each(self.atlases, most=self.config.atlases)
            for i, case in enumerate(left_out, start=1):
                self.say(f"what the atlases are worth: {i} of {len(left_out)}, left out with all scans of the patient")
                guide, own = torch.from_numpy(np.array(case.guide)), grid_of(case, self.plan.spacing)
                voters = self._shaped(self._aligned(guide, own, leave=case.whose), mask=None)
                if voters:
                    vote = voting.shares(guide, voters, classes=self.plan.classes)
                    asked = voting.asked_for(voters, classes=self.plan.classes)
                    worth.append(met(vote, case, plan=self.plan, asked=asked))
                    alike.append(self._likeness(guide, voters, certain(case)))
            mean = float(np.mean(worth)) if worth else ALONE
            self._known = Known(mean, tuple(alike))
        return self._known

    def __call__(
        self,
        case: Prepared,
        *,
        mode: Mode = "auto",
        seconds: float | None = None,
        tick: Callable[[float], None] = lambda share: None,
    ) -> Personalized:
        """Personalise to one scan.

        Parameters
        ----------
        case : Prepared
            The scan on the model's grid; a label is not looked at.
        mode : {"auto", "always"}
            Whether the guard may refuse.
        seconds : float, optional
            Budget; rounds and refinement that do not fit into it are left out.
        tick : callable
            Gets the share that is done.

        Raises
        ------
        KeyboardInterrupt
            If a signal asks to stop: a scan that is half refined has no answer.
        """
        known, begin = self.known, time.monotonic()  # what is found out once is on no scan's budget
        image, own = torch.from_numpy(np.array(case.image)), grid_of(case, self.plan.spacing)
        before, first, steady = self._views(image)
        if not labelled(before, self.plan).any():
            return Personalized(before, before, "before", "the first mask is empty: nothing to align by", {})
        if mode == "auto" and (refused := uncalibrated(known)):
            return Personalized(before, before, "before", refused, {"consistency": steady})
        guide = directions.guide(image, self.plan.kind)
        mask, voters, aligned = first, list[voting.Voter](), self._aligned(guide, own)
        for turn in range(self.config.rounds):
            tick(0.1 + 0.4 * turn / self.config.rounds)
            voters = self._shaped(aligned, mask=mask) or voters
            if not voters:
                return Personalized(before, before, "before", "every atlas folds on this scan", {"consistency": steady})
            vote, agreement = self._vote(guide, voters, first)
            reliable = min(agreement / max(known.worth, 1e-3), 0.95)
            share = Rating(known.worth, reliable, agreement, assumed=not known.likeness).weights
            mask = self.config.memory * mask + (1 - self.config.memory) * self._fused(vote, first, share)
            if seconds is not None and time.monotonic() - begin > 0.4 * seconds:
                break
        evidence = {
            "consistency": steady, "agreement": agreement, "atlases_worth": known.worth, "likeness_floor": known.floor,
            "likeness": self._likeness(guide, voters, mask),
            "reached": voting.reached(voters, labelled(mask, self.plan)),
        }  # fmt: skip
        refused = self._refusal(evidence)
        if refused and mode == "auto":
            return Personalized(before, before, "before", refused, evidence)
        after = mask
        tick(0.5)
        if self.config.steps:
            network = self._refined(case, voters, mask, until=None if seconds is None else begin + seconds)
            after = self._fused(vote, (first + self._answer(image, network)) / 2, share)
        evidence["changed"] = 1 - self._dice(before, after)
        return Personalized(before, after, "after", refused or FITTING, evidence)

    # ------------------------------------------------------------------------------------------------- first mask

    def _answer(self, image: Tensor, segmenter: nn.Module) -> Tensor:
        """Class probabilities."""
        return belief(image, self.plan, predictor=infer.network_predictor(segmenter, self.hardware))

    def _views(self, image: Tensor) -> tuple[Tensor, Tensor, float]:
        """Answer to the scan, mean over it and its disturbed copies, and the Dice of each of those with the mean."""
        predictor = infer.network_predictor(self.segmenter, self.hardware)
        found = views(image, self.plan, predictor=predictor, count=self.config.views)
        mean = torch.stack(found).mean(0)
        steady = [self._dice(one, mean) for one in found[1:]]
        return found[0], mean, float(np.mean(steady)) if steady else 1.0

    def _dice(self, one: Tensor, other: Tensor) -> float:
        """Of two answers."""
        return mean_dice(chosen(one, self.plan), chosen(other, self.plan))

    def _fused(self, vote: Tensor, answer: Tensor, share: tuple[float, float]) -> Tensor:
        """What atlases and segmenters say together."""
        both = share[0] * vote + share[1] * answer
        return after_none(both[1:]) if self.plan.overlapping else both

    # ---------------------------------------------------------------------------------------------------- atlases

    def _aligned(self, guide: Tensor, own: Geometry, *, leave: str | None = None) -> _Aligned:
        """The atlases most like a scan, without a patient's, affinely onto it; and where a network lets them start."""
        grid = with_at_most(own, MOST_VOXELS)
        fixed = resample(guide, grid.shape)
        found = []
        for atlas in self._candidates(guide, leave=leave):
            other = grid_of(atlas, self.plan.spacing)
            whole = torch.from_numpy(np.array(atlas.guide))
            matrix = affine.fit(guide[:1], whole[:1], grids=(own, other), levels=AFFINE_LEVELS)
            moving = affine.onto(whole, other, grid=grid, matrix=matrix)
            found.append((float(ncc(fixed[None, :1], moving[None, :1])), atlas, matrix, moving))
        best = sorted(found, key=lambda row: -row[0])[: self.config.atlases]
        moving = torch.stack([row[3] for row in best])
        atlases = [(atlas, matrix) for _, atlas, matrix, _ in best]
        return _Aligned(own, grid, fixed, moving, atlases, self._start(fixed, moving))

    def _candidates(self, guide: Tensor, *, leave: str | None) -> list[Prepared]:
        """Atlases to fit to a scan: all of them, or where they are many those with the thumbnails most like its own."""
        pool = [i for i, atlas in enumerate(self.atlases) if atlas.whose != leave]
        most = max(MOST_FITTED, self.config.atlases)
        if len(pool) > most:
            small = draft.most_alike(draft.thumbnail(guide), [self._thumbnails[i] for i in pool], most=most)
            pool = [pool[i] for i in small]
        return [self.atlases[i] for i in pool]

    def _shaped(self, aligned: _Aligned, *, mask: Tensor | None) -> list[voting.Voter]:
        """The atlases in the shape of the scan; those that fold are left out."""
        own, grid, fixed, moving, atlases, start = aligned
        masks = None
        if mask is not None and self.config.anatomy > 0:
            masks = self._masks(mask, atlases, grid=grid)
        config = dataclasses.replace(COLD if start is None else WARMED, anatomy=self.config.anatomy)
        device = self.hardware.device
        u = deform(
            fixed.to(device).expand(len(atlases), -1, -1, -1, -1).contiguous(), moving.to(device), config=config,
            start=start, masks=None if masks is None else (masks[0].to(device), masks[1].to(device)),
        ).cpu()  # fmt: skip
        return [
            draft.voter(atlas, u[i : i + 1], matrix=matrix, grids=(own, grid_of(atlas, self.plan.spacing)))
            for i, (atlas, matrix) in enumerate(atlases)
            if fields.folding(u[i : i + 1]) <= draft.MOST_FOLDING
        ]

    def _start(self, fixed: Tensor, moving: Tensor) -> Tensor | None:
        """The registration network's answer, where the model has one."""
        registrar = self.model.others.get("registrar")
        if registrar is None:
            return None
        network = cast(Registrar, registrar.to(self.hardware.device).eval())
        return torch.cat([register_images(network, fixed, moving=one) for one in moving]).to(self.hardware.device)

    def _masks(
        self, mask: Tensor, atlases: Sequence[tuple[Prepared, Array]], *, grid: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Soft maps of the largest structures, of the scan and of each affinely aligned atlas."""
        classes = mask[1:].sum((1, 2, 3)).argsort(descending=True)[:MOST_MASKS] + 1
        still = resample(mask[classes], grid.shape).expand(len(atlases), -1, -1, -1, -1)
        moving = [
            affine.onto(certain(atlas)[classes], grid_of(atlas, self.plan.spacing), grid=grid, matrix=matrix)
            for atlas, matrix in atlases
        ]
        return still.contiguous(), torch.stack(moving)

    def _likeness(self, guide: Tensor, voters: Sequence[voting.Voter], mask: Tensor) -> float:
        """Mean local correlation of the scan and its deformed atlases, around the structures."""
        near = torch.nn.functional.max_pool3d((1 - mask[0])[None, None], 5, stride=1, padding=2)
        found = [float(lncc(guide[None, :1], voter.guide[None, :1], weight=near)) for voter in voters]
        return float(np.mean(found))

    def _vote(self, guide: Tensor, voters: Sequence[voting.Voter], first: Tensor) -> tuple[Tensor, float]:
        """What atlases say, of labels that none was asked for what the first mask does; Dice of the two elsewhere."""
        vote = voting.shares(guide, voters, classes=self.plan.classes)
        asked = voting.asked_for(voters, classes=self.plan.classes)
        taken = 0 * first[:1] if self.plan.overlapping else (first * ~asked).sum(0, keepdim=True)
        return torch.where(asked, vote * (1 - taken), first), self._dice(first * asked, vote)

    def _refusal(self, evidence: Mapping[str, float]) -> str:
        """Why the first mask is kept; empty where nothing speaks for that."""
        return uncalibrated(self.known) or objection(evidence)

    # ------------------------------------------------------------------------------------------------- refinement

    def _refined(
        self, case: Prepared, voters: Sequence[voting.Voter], mask: Tensor, *, until: float | None
    ) -> nn.Module:
        """A copy of the segmenter, taught by the deformed atlases and, as often, by the scan where they are sure."""
        cases = self._lessons(case, voters, mask)
        network = copy.deepcopy(self.segmenter).train().requires_grad_(True)
        train = dataclasses.replace(self.model.settings.train, lr=self.config.lr, warmup_steps=5, average=0.9)
        settings = dataclasses.replace(self.model.settings, train=train)
        phase = segment.supervised(
            cases, network, plan=self.plan, settings=settings, hardware=self.hardware, name="personalize"
        )
        state, steps, begin = State([network], train), self.config.steps, time.monotonic()
        for share in (min(1.0, TRIED / steps), 1.0):
            state = fit([phase], state, limits=Limits(steps=steps, until=share), config=train, seed=0)
            if state.interrupted:  # what is half refined is no answer to write; scans finished before stay
                raise KeyboardInterrupt
            if until is not None:  # as many as there is time for, those that showed how long one takes included
                left = (until - time.monotonic()) / max((time.monotonic() - begin) / state.step, 1e-9)
                steps = min(steps, state.step + max(1, int(left)))
        return state.average_of(network).eval()

    def _lessons(self, case: Prepared, voters: Sequence[voting.Voter], mask: Tensor) -> list[Prepared]:
        """The deformed atlases and, as often, the scan with what is sure of its mask."""
        classes, lessons = self.plan.classes, []
        for v in voters:
            drawn = voting.asked_for([v], classes=classes).flatten().numpy()
            shaped = dataclasses.replace(case, id=v.name, image=v.image.numpy(), drawn=drawn)
            lessons.append(labelled_as(shaped, index_of(v.label), table=v.table))
        sure, table = confident(mask, self.plan)
        bare = dataclasses.replace(case, drawn=np.ones(classes, np.bool_))
        return lessons + [labelled_as(bare, sure, table=table)] * len(lessons)

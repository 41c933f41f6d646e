"""Inference-specific learning: labelled scans in the shape of the one to segment, and a segmenter refined on them.

Chen, Liu, Li, Han, Xing: "Inference-specific learning for improved medical image segmentation", Medical Physics 52(7),
2025, doi 10.1002/mp.17883. Only the abstract was readable, so this is a re-implementation of its three stages, not of
its code: a first mask; the training scans deformed to the scan at hand, supervised by that mask; a copy of the
segmenter refined on them; with a moving average of the mask throughout, renewed once while the copy is refined.

What is ours: the first mask is the mean over disturbed views of the scan; all atlases are deformed at once; the
answer is what atlases and segmenters say together, by what each is worth (log odds of being right, as in
`methods.pseudo`; a first mask that is unsteady over those views is worth less), or half-way there where the model is at
home; the scan itself is refined on too, where they agree; and a guard that keeps the first mask where the evidence, all
of it without a label, speaks against the change. The model that was given is never changed.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewscan.errors import ConfigError, ResourceError
from fewscan.learn import infer
from fewscan.learn.alignment import grid_of
from fewscan.learn.answers import after_none, certain, chosen, confident, labelled
from fewscan.learn.batches import Prepared, labelled_as
from fewscan.learn.checkpoint import Model
from fewscan.learn.config import TrainConfig
from fewscan.learn.engine import Limits, Phase, fit
from fewscan.learn.hardware import Hardware
from fewscan.learn.networks import layers
from fewscan.learn.state import State
from fewscan.learn.views import belief, views
from fewscan.methods import segment, voting
from fewscan.methods.evidence import Known, mean_dice, met, objection, one_each, reliable, setback, uncalibrated
from fewscan.methods.pseudo import BEST, Rating, index_of
from fewscan.methods.shaping import Shaper
from fewscan.space.similarity import lncc

TRIED = 5  # steps of the refinement after which it is known how long one takes
FITTING = "atlases and scan fit each other"
UNLAID = "no atlas can be laid onto this scan: each lies elsewhere, is of another size, or folds"
DIVERGED = "the refinement diverged: its loss was no longer finite"

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
        Of deformation, the first by the images alone.
    memory : float
        Share of the mask that a round keeps.
    anatomy : float
        Weight of the mask against the image in the deformation; 0 aligns by intensity alone, affinely too. Atlases that
        are pulled hard onto the mask repeat its faults, and their vote adds nothing.
    steps : int
        Of refinement; 0 leaves it out.
    lr : float
        Its learning rate.
    layers : {"all", "decoder", "last", "norms"}
        What it changes of the network.

    Raises
    ------
    ConfigError
        If a value makes no sense.
    """

    atlases: int = 5
    views: int = 3
    rounds: int = 2
    memory: float = 0.5
    anatomy: float = 0.2
    steps: int = 40
    lr: float = 5e-4
    layers: str = "all"

    def __post_init__(self) -> None:
        if self.layers not in ("all", "decoder", "last", "norms"):
            raise ConfigError(f"refinement changes all, decoder, last or norms of the network, not {self.layers!r}")
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


class _Said(NamedTuple):
    """What deformed atlases say of a scan: they themselves, their vote, its and the segmenter's weight, the mask."""

    voters: Sequence[voting.Voter]
    vote: Tensor
    share: tuple[float, float]
    mask: Tensor


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
        self.say = say
        self.shaper = Shaper(model, atlases, most=config.atlases, anatomy=config.anatomy, hardware=hardware)
        self.segmenter = model.segmenter.to(hardware.device).eval()
        self._known: Known | None = None

    @property
    def known(self) -> Known:
        """Found out when it is first asked for."""
        if self._known is None:
            worth, alike = [], []
            left_out = one_each(self.shaper.atlases, most=self.config.atlases)
            for i, case in enumerate(left_out, start=1):
                self.say(f"what the atlases are worth: {i} of {len(left_out)}, left out with all scans of the patient")
                guide, own = torch.from_numpy(np.array(case.guide)), grid_of(case, self.plan.spacing)
                whole = certain(case) if (np.array(case.label) >= 0).all() else None  # as the mask of a scan will be
                aligned = self.shaper.aligned(guide, own, leave=case.whose, mask=whole)
                voters = self.shaper.shaped(aligned, mask=None)
                if voters:
                    vote = voting.shares(guide, voters, classes=self.plan.classes)
                    asked = voting.asked_for(voters, classes=self.plan.classes)
                    worth.append(met(vote, case, plan=self.plan, asked=asked))
                    alike.append(self._likeness(guide, voters, certain(case)))
            self._known = Known(tuple(worth), tuple(alike))
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
            The scan on the model's grid; a label is not looked at, nor are atlases of the same patient.
        mode : {"auto", "always"}
            Whether the guard may refuse.
        seconds : float, optional
            Budget, with a prediction by the model itself after it; further rounds, steps of refinement, or all of it
            are left out where they do not fit. The first views and the first round are always done.
        tick : callable
            Gets the share that is done.

        Raises
        ------
        KeyboardInterrupt
            If a signal asks to stop: a scan that is half refined has no answer.
        """
        known, begin = self.known, time.monotonic()  # what is found out once is on no scan's budget
        image = torch.from_numpy(np.array(case.image))
        before, first, steady = self._views(image, self.segmenter)
        if not labelled(before, self.plan).any():
            return Personalized(before, before, "before", "the first mask is empty: nothing to align by", {})
        if mode == "auto" and (refused := uncalibrated(known)):
            return Personalized(before, before, "before", refused, {"consistency": steady})
        looked = (time.monotonic() - begin) * (1 + 1 / (1 + self.config.views))  # again for the copy, and to predict
        half, until = (None, None) if seconds is None else (begin + seconds / 2, begin + seconds - looked)
        found, evidence, refused = self._atlases_say(case, first, steady=steady, mode=mode, until=half, tick=tick)
        if found is None:
            return Personalized(before, before, "before", refused, evidence)
        tick(0.5)
        after = self._fused(found, first)
        in_time = self.config.steps and (until is None or time.monotonic() < until)
        if lessons := self._lessons(case, found.voters, found.mask) if in_time else []:
            try:
                network, evidence["steps"] = self._refined(case, found, first, lessons=lessons, until=until, tick=tick)
            except ResourceError:  # which advises those who train
                return Personalized(before, before, "before", DIVERGED, evidence)
            _, answer, evidence["consistency_after"] = self._views(image, network)
            after = self._fused(found, (first + answer) / 2)
        after = self._mixed(before, after, evidence["strength"])
        evidence["changed"] = 1 - self._dice(before, after)
        refused = refused or setback(evidence)
        if refused and mode == "auto":
            return Personalized(before, before, "before", refused, evidence)
        return Personalized(before, after, "after", refused or FITTING, evidence)

    # ------------------------------------------------------------------------------------------------- first mask

    def _answer(self, image: Tensor, segmenter: nn.Module) -> Tensor:
        """Class probabilities."""
        return belief(image, self.plan, predictor=infer.network_predictor(segmenter, self.hardware))

    def _views(self, image: Tensor, segmenter: nn.Module) -> tuple[Tensor, Tensor, float]:
        """Answer to the scan, mean over it and its disturbed copies, and the Dice of each of those with the mean."""
        predictor = infer.network_predictor(segmenter, self.hardware)
        found = views(image, self.plan, predictor=predictor, count=self.config.views)
        mean = sum(found[1:], start=found[0].clone()) / len(found)
        steady = [self._dice(one, mean) for one in found[1:]]
        return found[0], mean, float(np.mean(steady)) if steady else 1.0

    def _dice(self, one: Tensor, other: Tensor) -> float:
        """Of two answers."""
        return mean_dice(chosen(one, self.plan), chosen(other, self.plan))

    def _fused(self, found: _Said, answer: Tensor) -> Tensor:
        """What atlases and segmenters say together."""
        return self._mixed(found.vote, answer, found.share[1])

    def _mixed(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        """The mean of two answers, of which the second counts by its share."""
        both = torch.lerp(one, other, share)
        return after_none(both[1:]) if self.plan.overlapping else both

    def _averaged(self, mask: Tensor, newer: Tensor) -> Tensor:
        """The moving average of the scan's mask."""
        return self.config.memory * mask + (1 - self.config.memory) * newer

    # ---------------------------------------------------------------------------------------------------- atlases

    def _atlases_say(
        self, case: Prepared, first: Tensor, *, steady: float, mode: Mode, until: float | None,
        tick: Callable[[float], None],
    ) -> tuple[_Said | None, dict[str, float], str]:  # fmt: skip
        """Rounds of deformation and vote; nothing where that is refused; the evidence, and what speaks against it.

        The first round deforms by the images alone, as when the atlases' worth was found out, so that their vote is a
        second opinion and the evidence near comparable: only the affine part has looked at the mask. It settles what
        each side weighs; later rounds are supervised by the mask, so that agreement with it says nothing.
        """
        guide, own = torch.from_numpy(np.array(case.guide)), grid_of(case, self.plan.spacing)
        known, refused = self.known, ""
        evidence = {"atlases_worth": known.worth, "likeness_floor": known.floor, "consistency": steady}
        aligned = self.shaper.aligned(guide, own, leave=case.whose, mask=first)
        found = _Said([], first, (0.0, 1.0), first)
        for turn in range(self.config.rounds):
            tick(0.1 + 0.4 * turn / self.config.rounds)
            begin = time.monotonic()
            voters = self.shaper.shaped(aligned, mask=found.mask if turn else None) or found.voters
            if not voters:
                return None, evidence, UNLAID
            vote, agreement = self._vote(guide, voters, first)
            if turn == 0:
                likeness = self._likeness(guide, voters, self._mixed(vote, first, 0.5))
                worth = known.worth_at(likeness)
                own_worth = min(agreement / max(worth, 1e-3), reliable(steady), BEST)
                share = Rating(worth, own_worth, agreement, assumed=not known.likeness).weights
            newer = found._replace(voters=voters, vote=vote, share=share)
            found = newer._replace(mask=self._averaged(found.mask, self._fused(newer, first)))
            evidence["rounds"] = turn + 1
            if turn == 0:
                evidence |= {
                    "agreement": agreement, "likeness": likeness, "strength": known.strength(agreement),
                    "reached": voting.reached(voters, labelled(first, self.plan)),
                }  # fmt: skip
                refused = uncalibrated(known) or objection(evidence)
                if refused and mode == "auto":
                    return None, evidence, refused
            if until is not None and 2 * time.monotonic() - begin > until:  # as long again would be too long
                break
        return found, evidence, refused

    def _likeness(self, guide: Tensor, voters: Sequence[voting.Voter], mask: Tensor) -> float:
        """Mean local correlation of the scan and its deformed atlases, around the structures."""
        inside = labelled(mask, self.plan).float()[None, None]
        near = torch.nn.functional.max_pool3d(inside, 5, stride=1, padding=2)
        found = [float(lncc(guide[None, :1], voter.guide[None, :1], weight=near)) for voter in voters]
        return float(np.mean(found))

    def _vote(self, guide: Tensor, voters: Sequence[voting.Voter], first: Tensor) -> tuple[Tensor, float]:
        """What atlases say, of labels that none was asked for what the first mask does; Dice of the two elsewhere."""
        vote = voting.shares(guide, voters, classes=self.plan.classes)
        asked = voting.asked_for(voters, classes=self.plan.classes)
        taken = 0 * first[:1] if self.plan.overlapping else (first * ~asked).sum(0, keepdim=True)
        return torch.where(asked, vote * (1 - taken), first), self._dice(first * asked, vote)

    # ------------------------------------------------------------------------------------------------- refinement

    def _refined(
        self, case: Prepared, found: _Said, first: Tensor, *, lessons: Sequence[Prepared], until: float | None,
        tick: Callable[[float], None],
    ) -> tuple[nn.Module, int]:  # fmt: skip
        """A copy of the segmenter, taught by the deformed atlases and, as often, by the scan where they are sure.

        Half-way, what the copy answers by then is taken into the moving average that the scan is labelled by. The
        number of steps is told too.
        """
        image, mask = torch.from_numpy(np.array(case.image)), found.mask
        network = copy.deepcopy(self.segmenter).train().requires_grad_(True)
        train = dataclasses.replace(self.model.settings.train, lr=self.config.lr, warmup_steps=5, average=0.9)
        state, steps, spent = State([network], train), self.config.steps, 0.0
        phase = self._phase(network, lessons, train)
        for share in sorted({min(0.5, TRIED / steps), 0.5, 1.0}):
            begin = time.monotonic()
            state = fit(
                [phase], state, limits=Limits(steps=steps, until=share), config=train, seed=0,
                observe=lambda status: tick(0.5 + 0.5 * status.step / (status.steps or 1)),
            )  # fmt: skip
            spent += time.monotonic() - begin
            if state.interrupted:  # what is half refined is no answer to write; scans finished before stay
                raise KeyboardInterrupt
            if share == 0.5 and state.step < steps and (until is None or time.monotonic() < until):
                answer = self._answer(image, state.average_of(network).eval())
                mask = self._averaged(mask, self._fused(found, (first + answer) / 2))
                phase = self._phase(network, self._lessons(case, found.voters, mask), train)
            if until is not None:  # as many as there is time for, those that showed how long one takes included
                left = (until - time.monotonic()) / max(spent / state.step, 1e-9)
                steps = min(steps, state.step + max(1, int(left)))
        return state.average_of(network).eval(), state.step

    def _phase(self, network: nn.Module, lessons: Sequence[Prepared], train: TrainConfig) -> Phase:
        """Of the engine: lessons for the part of the network that refinement may change."""
        settings = dataclasses.replace(self.model.settings, train=train)
        phase = segment.supervised(
            lessons, network, plan=self.plan, settings=settings, hardware=self.hardware, name="personalize"
        )
        which = None if self.config.layers == "all" else layers(network, self.config.layers)
        return dataclasses.replace(phase, learns=which)

    def _lessons(self, case: Prepared, voters: Sequence[voting.Voter], mask: Tensor) -> list[Prepared]:
        """The deformed atlases and, as often, the scan with what is sure of its mask; none where no atlas shows any.

        What nobody looked at teaches nothing: sparse labels may lie wholly beyond the scan.
        """
        classes, lessons = self.plan.classes, []
        for v in voters:
            drawn = voting.asked_for([v], classes=classes).flatten().numpy()
            shaped = dataclasses.replace(case, id=v.name, image=v.image.numpy(), drawn=drawn)
            lessons.append(labelled_as(shaped, index_of(v.label), table=v.table))
        sure, table = confident(mask, self.plan)
        bare = dataclasses.replace(case, drawn=np.ones(classes, np.bool_))
        lessons = [lesson for lesson in lessons if any(lesson.counts)]
        own = labelled_as(bare, sure, table=table)
        return lessons + ([own] * len(lessons) if any(own.counts) else [])

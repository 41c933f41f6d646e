"""Labels for unlabelled scans while both networks learn: what atlases and segmenter say together.

Xu & Niethammer 2019 let a single warped label map teach the segmenter. Ours: several atlases vote, and the segmenter
with them, by what each is worth.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.data.io import atomic
from fewscan.learn import infer
from fewscan.learn.batches import Prepared
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar
from fewscan.learn.session import Session
from fewscan.learn.views import belief
from fewscan.methods import draft
from fewscan.methods.evidence import ALONE, mean_dice
from fewscan.methods.voting import Voter, fuse
from fewscan.space.deformable import DeformConfig
from fewscan.space.volume import IGNORE

SURE = 0.5  # least share of the fused vote from which a pseudo-label counts
BEST = 0.95  # most that a Dice estimated without a label is believed to be
SLACK = 0.01  # Dice by which atlases may agree less on a scan than on the labelled ones left out
COMPARED = 3  # scans from which atlases and segmenter are rated
LABELLING = 0.1  # most of a budget that the labelling of one round may take
FULL = DeformConfig()  # where there is time to deform every atlas in earnest
Index = NDArray[np.int16]


class Drafted(NamedTuple):
    """What the atlases say of a scan.

    Parameters
    ----------
    vote : pair of (X, Y, Z) uint16 and float32
        Class index, and its share of the vote.
    nearest : Voter
        The atlas most like the scan, in its shape.
    harmony : float
        Mean Dice between every two of the atlases; NaN of a single one.
    """

    vote: tuple[NDArray[np.uint16], NDArray[np.float32]]
    nearest: Voter
    harmony: float


class Rating(NamedTuple):
    """What atlases and segmenter are worth on scans without labels.

    Parameters
    ----------
    atlases, segmenter : float
        Expected Dice.
    agreement : float
        Dice between the two, which tells the latter.
    assumed : bool
        Whether the former could not be measured.
    """

    atlases: float
    segmenter: float
    agreement: float
    assumed: bool

    @property
    def weights(self) -> tuple[float, float]:
        """Of both in a fused vote: the log odds of being right, as of independent voters; they sum to one.

        Examples
        --------
        >>> Rating(0.85, 0.4, 0.34, assumed=False).weights
        (1.0, 0.0)
        """
        odds = [max(0.0, math.log(d / (1 - d))) for d in (min(max(x, 0.01), BEST) for x in self[:2])]
        whole = sum(odds)
        return (odds[0] / whole, odds[1] / whole) if whole > 0 else (0.5, 0.5)

    def __str__(self) -> str:
        """For the log."""
        return (
            f"expected Dice of the atlases {self.atlases:.2f}{' (assumed)' if self.assumed else ''}, of the segmenter "
            f"{self.segmenter:.2f} (they agree by {self.agreement:.2f})"
        )


class Labeller:
    """Atlases and segmenter of a run; what the atlases said of a scan is kept on disk until the run ends.

    Parameters
    ----------
    session : Session
        Of the run.
    wholes : sequence of Whole
        All its cases on the registrar's grid.
    path : callable
        Name to file, for what is kept.
    """

    def __init__(self, session: Session, wholes: Sequence[Whole], *, path: Callable[[str], Path]) -> None:
        self.session, self.path, self.wholes = session, path, {case.id: case for case in wholes}
        self.cases = {case.id: case for case in (*session.labelled, *session.unlabelled)}
        self.number = {name: i for i, name in enumerate(self.cases)}  # a name may hold what a file's may not
        refine = session.settings.joint.refine
        self.effort = DeformConfig(shrink=(2, 1), steps=(refine * 3 // 4, refine - refine * 3 // 4))
        self.worth: float | None = None
        self.least = math.nan  # harmony from which the atlases of a scan are believed
        self.measured = session.bounds.seconds is None  # a run bounded by steps must repeat bit for bit

    def begin(self, registrar: Registrar, predictor: infer.Predictor, *, count: int) -> None:
        """A round starts.

        Parameters
        ----------
        registrar : Registrar
            As it is now.
        predictor : callable
            The segmenter, as it is now.
        count : int
            Scans to label, between which the time is shared.
        """
        self.registrar, self.predictor, self.count = registrar, predictor, count
        self.started = self.session.fraction()

    def spent(self) -> float:
        """Share of the run that this round's labelling has taken."""
        return self.session.fraction() - self.started

    def drafted(self, case: Prepared) -> bool:
        """Whether the atlases were asked already."""
        return self._file(case).is_file()

    def draft(self, case: Prepared) -> Drafted | None:
        """The vote of the other labelled scans, None where all fold; how long the first takes sets the effort."""
        file = self._file(case)
        if file.is_file():
            with contextlib.suppress(ValueError, OSError, KeyError, zipfile.BadZipFile), np.load(file) as stored:
                nearest = Voter(
                    str(stored["name"]), torch.from_numpy(stored["image"]), stored["shaped"], None, case.kind
                )
                return Drafted((stored["label"], stored["sure"].astype(np.float32)), nearest, float(stored["harmony"]))
        own = case.whose if case.label is not None else ""  # left out with all scans of the patient
        others = [w for w in self.wholes.values() if w.labelled and self.cases[w.id].whose != own]
        effort, before = self.effort if self.measured else FULL, self.spent()
        voters = draft.shaped(
            self.wholes[case.id], others, cases=self.cases, registrar=self.registrar, config=effort,
            most=self.session.settings.joint.atlases,
        )  # fmt: skip
        if not self.measured and (self.spent() - before) * self.count < LABELLING:
            self.effort = FULL
        self.measured = True
        if not voters:
            return None
        label, sure = fuse(torch.from_numpy(np.array(case.guide[:1])), voters, fusion="local")
        sure, nearest = sure.astype(np.float16), voters[0]
        alike = harmony([index_of(one.label) for one in voters], classes=self.session.plan.classes)
        image, shaped, name = nearest.image.numpy(), nearest.label, np.array(nearest.name)
        with atomic(file) as temporary, Path(temporary).open("wb") as stream:
            np.savez(stream, label=label, sure=sure, image=image, shaped=shaped, name=name, harmony=np.array(alike))
        return Drafted((label, sure.astype(np.float32)), nearest, alike)

    def believed(self, drafted: Drafted) -> bool:
        """Whether the atlases agree on a scan about as well as they do on labelled ones left out.

        Registration fails on some scans, and on those the atlases contradict each other.

        Parameters
        ----------
        drafted : Drafted
            From `draft`, after `rating`.
        """
        return not drafted.harmony < self.least

    def _file(self, case: Prepared) -> Path:
        """Where the atlases' answer is kept."""
        return self.path(f"draft{self.number[case.id]}")

    def belief(self, case: Prepared) -> Tensor:
        """The segmenter's probabilities."""
        return belief(torch.from_numpy(np.array(case.image)), self.session.plan, predictor=self.predictor)

    def rating(self, scans: Sequence[Prepared]) -> Rating:
        """What atlases and segmenter are worth.

        Labelled scans left out tell what the atlases are worth, and how well they agree among themselves where they
        are. Were the errors of atlases and segmenter independent, their agreement on scans without labels would be the
        product of both, which tells what the segmenter is worth.

        Parameters
        ----------
        scans : sequence of Prepared
            Without labels; the first `COMPARED` whose atlases are believed are looked at.
        """
        if self.worth is None and len(self.session.labelled) > 1:
            self._leave_out()
        agreements: list[float] = []
        for case in scans[: 4 * COMPARED]:
            drafted = self.draft(case) if len(agreements) < COMPARED else None
            if drafted is not None and self.believed(drafted):
                theirs = torch.from_numpy(np.maximum(index_of(drafted.vote[0]), 0))
                agreements.append(mean_dice(self.belief(case).argmax(0), theirs))
        atlases = ALONE if self.worth is None else self.worth
        agreement = float(np.mean(agreements)) if agreements else 0.0
        return Rating(atlases, min(agreement / max(atlases, 1e-3), BEST), agreement, assumed=self.worth is None)

    def _leave_out(self) -> None:
        """What the atlases are worth on labelled scans, and the least harmony with which they are."""
        votes, alike = [], []
        for case in self.session.labelled[:COMPARED]:
            if (drafted := self.draft(case)) is not None:
                assert case.label is not None
                found, truth = index_of(drafted.vote[0]), np.array(case.label)
                votes.append(mean_dice(*(torch.from_numpy(np.maximum(x, 0)) for x in (found, truth))))
                alike.append(drafted.harmony)
        self.worth = float(np.mean(votes)) if votes else None
        self.least = min(alike, default=math.nan) - SLACK  # NaN where no two atlases were left


def harmony(labels: Sequence[Index], *, classes: int) -> float:
    """Mean Dice between every two label maps, over the classes that one of them holds; NaN of fewer than two.

    Parameters
    ----------
    labels : sequence of (X, Y, Z) int16
        Class indices; voxels at -1 in one of two are left out.
    classes : int
        With background.
    """
    scores = []
    for one, other in itertools.combinations([label.ravel().astype(np.int64) for label in labels], 2):
        seen = (one >= 0) & (other >= 0)
        counts = np.bincount(one[seen] * classes + other[seen], minlength=classes**2).reshape(classes, classes)
        sizes = (counts.sum(0) + counts.sum(1))[1:]
        scores.append(float(np.mean(2 * np.diag(counts)[1:][sizes > 0] / sizes[sizes > 0])) if sizes.any() else 1.0)
    return float(np.mean(scores)) if scores else math.nan


def fused(
    label: NDArray[np.uint16], sure: NDArray[np.float32], *, belief: Tensor | None, trust: tuple[float, float]
) -> Index:
    """Class index where atlases and segmenter together are sure, else -1; the atlases alone without a belief.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Class indices that won the atlases' vote, `IGNORE` where none was looked at.
    sure : (X, Y, Z) float32
        Their share of it.
    belief : (K, X, Y, Z) float, optional
        The segmenter's probabilities.
    trust : (float, float)
        Weights of atlases and segmenter, which sum to one.
    """
    index, share = torch.from_numpy(index_of(label)).long(), torch.from_numpy(sure)
    heard = (index >= 0) & (share > 0)
    if belief is None:
        return torch.where(heard & (share >= SURE), index, -1).to(torch.int16).numpy()
    both = belief * trust[1]
    both.scatter_add_(0, index.clamp(min=0)[None], (trust[0] * share)[None])
    top, winner = both.max(0)
    return torch.where(heard & (top >= SURE), winner, -1).to(torch.int16).numpy()


def index_of(label: NDArray[np.uint16]) -> Index:
    """Class indices, -1 where none was looked at.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Class indices, `IGNORE` where none was looked at.
    """
    return np.where(label == IGNORE, -1, label.astype(np.int32)).astype(np.int16)

"""What a cohort is made of: protocols, numbers of people, who is scanned how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from fewscan.errors import ConfigError
from fewscan.tracts.anatomy import Variation
from fewscan.tracts.bundles import TARGETS

Split = Literal["train", "val", "pool", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "pool", "test")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a population is scanned; of two numbers each subject draws one between.

    Parameters
    ----------
    name : str
        Short.
    directions : (int, int)
        Number.
    b : (float, float)
        s/mm2.
    snr : float
        Of the unweighted signal.
    slice_mm : float
        Thickness; 0 for the grid's own.
    bias : float
        Largest change of the signal by a smooth field, as a share.
    angle_deg, shift_mm : float
        Largest misalignment about and along each axis.
    """

    name: str
    directions: tuple[int, int]
    b: tuple[float, float]
    snr: float
    slice_mm: float = 0.0
    bias: float = 0.0
    angle_deg: float = 0.0
    shift_mm: float = 0.0


A = Protocol(name="A", directions=(32, 32), b=(1000.0, 1000.0), snr=30.0)
B = Protocol(
    name="B", directions=(15, 20), b=(700.0, 800.0), snr=12.0, slice_mm=5.0, bias=0.3, angle_deg=3.0, shift_mm=2.0
)


HARD = Variation(sigma_mm=12.0, rms_mm=8.0)
"""People who differ more, and in smaller parts, than those made otherwise."""


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """What to make.

    Parameters
    ----------
    train, val : int
        Healthy people scanned by the first protocol.
    pool : int
        Patients scanned by the second, to adapt with.
    test : int
        People who are scanned four times.
    seed : int
        Of everything.
    protocols : (Protocol, Protocol)
        Of the healthy and of the patients.
    variation : Variation
        How much people differ.
    radius_mm : (float, float)
        Of tumour cores.
    far_mm : float
        How far the edge of a far tumour keeps from its target bundle, at least.
    bundles : tuple of str
        Which to write.

    Raises
    ------
    ConfigError
        If a number cannot be.
    """

    train: int = 24
    val: int = 6
    pool: int = 8
    test: int = 12
    seed: int = 0
    protocols: tuple[Protocol, Protocol] = (A, B)
    variation: Variation = field(default_factory=Variation)
    radius_mm: tuple[float, float] = (8.0, 22.0)
    far_mm: float = 30.0
    bundles: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.pool, self.test) < 0 or self.train + self.val + self.pool + self.test < 1:
            raise ConfigError(f"a cohort needs numbers of people of at least 0 and one person, got {asdict(self)}")
        if not 0 <= self.radius_mm[0] <= self.radius_mm[1]:
            raise ConfigError(f"radius_mm must be two ascending numbers of at least 0, got {self.radius_mm}")


@dataclass(frozen=True, kw_only=True)
class Render:
    """One scan of one person.

    Parameters
    ----------
    split : {"train", "val", "pool", "test"}
        Where it belongs.
    person : int
        Number of the anatomy; no two splits share one.
    protocol : int
        0 or 1.
    tumour : bool
        Whether the person has one.
    """

    split: Split
    person: int
    protocol: int
    tumour: bool

    def folder(self, config: CohortConfig) -> str:
        """Where it lies below the cohort.

        Parameters
        ----------
        config : CohortConfig
            Names the protocols.
        """
        state = "tumour" if self.tumour else "healthy"
        return f"{self.split}/p{self.person:03d}_{config.protocols[self.protocol].name}_{state}"


def plan(config: CohortConfig) -> list[Render]:
    """Every scan of a cohort.

    Parameters
    ----------
    config : CohortConfig
        What to make.

    Examples
    --------
    >>> [r.folder(CohortConfig()) for r in plan(CohortConfig(train=1, val=0, pool=1, test=1))][:3]
    ['train/p000_A_healthy', 'pool/p001_B_tumour', 'test/p002_A_healthy']
    """
    kinds: dict[Split, list[tuple[int, bool]]] = {
        "train": [(0, False)],
        "val": [(0, False)],
        "pool": [(1, True)],
        "test": [(0, False), (0, True), (1, False), (1, True)],
    }
    found, person = [], 0
    for split in SPLITS:
        for _ in range(getattr(config, split)):
            found += [Render(split=split, person=person, protocol=p, tumour=t) for p, t in kinds[split]]
            person += 1
    return found

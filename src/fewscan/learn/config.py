"""Settings: small, frozen, validated, written down beside the weights. One preset serves every task."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fewscan.errors import ConfigError

T = TypeVar("T")


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie between {low:g} and {high:g}, got {value:g}")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Shape of the segmenter.

    Parameters
    ----------
    name : str
        Builder in `learn.networks.NETWORKS`.
    widths : tuple of int
        Filters per level, finest first; the plan uses as many levels as the patch allows.
    finest : int
        Convolutions per block at the finest level.
    """

    name: str = "unet"
    widths: tuple[int, ...] = (16, 32, 64, 128, 160)
    finest: int = 2

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ConfigError(f"network.widths needs at least two levels of at least one filter, got {self.widths}")
        _check("network.finest", self.finest, 1, 4)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the networks learn.

    Parameters
    ----------
    lr : float
        Peak learning rate of AdamW.
    weight_decay : float
        Decoupled weight decay.
    warmup_steps : int
        Steps over which the learning rate rises to its peak.
    clip : float
        Largest norm of the gradient.
    average : float
        Decay of the moving average of the weights, which is what is kept at the end.
    batch : int
        Patches per step; 0 leaves it to the plan (1 on a CPU, 2 on a GPU).
    foreground : float
        Share of patches centred on a label drawn at random rather than on any voxel looked at.
    patch_voxels : int
        Voxels per patch; 0 leaves it to the plan.
    """

    lr: float = 3e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 50
    clip: float = 12.0
    average: float = 0.99
    batch: int = 0
    foreground: float = 0.67
    patch_voxels: int = 0

    def __post_init__(self) -> None:
        _check("train.lr", self.lr, 1e-8, 1)
        _check("train.weight_decay", self.weight_decay, 0, 1)
        _check("train.warmup_steps", self.warmup_steps, 0, 100_000)
        _check("train.clip", self.clip, 1e-6, 1e6)
        _check("train.average", self.average, 0, 0.999999)
        _check("train.batch", self.batch, 0, 1024)
        _check("train.foreground", self.foreground, 0, 1)
        _check("train.patch_voxels", self.patch_voxels, 0, 1 << 27)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How strongly training patches are varied; amounts are the largest that are drawn.

    Parameters
    ----------
    rotate_deg : float
        Rotation about each axis.
    scale : float
        Relative change of size, per axis.
    shift : float
        Translation, as a share of the patch.
    elastic : float
        Displacement of the control points of a smooth random field, as a share of their spacing.
    blur, low_resolution, bias, gamma, contrast, noise : float
        Largest strength of each intensity change, in units of the image's standard deviation where that applies.
    probability : float
        Chance of each intensity change.
    mirror : {"auto", "never"}
        Left-right mirroring: auto allows it only where the plan has proved it harmless.
    """

    rotate_deg: float = 20.0
    scale: float = 0.2
    shift: float = 0.12
    elastic: float = 0.25
    blur: float = 1.0
    low_resolution: float = 2.0
    bias: float = 0.5
    gamma: float = 0.8
    contrast: float = 0.4
    noise: float = 0.4
    probability: float = 0.5
    mirror: str = "auto"

    def __post_init__(self) -> None:
        _check("augment.rotate_deg", self.rotate_deg, 0, 180)
        _check("augment.scale", self.scale, 0, 0.9)
        _check("augment.probability", self.probability, 0, 1)
        for name in ("shift", "elastic", "blur", "bias", "gamma", "contrast", "noise"):
            _check(f"augment.{name}", getattr(self, name), 0, 100)
        _check("augment.low_resolution", self.low_resolution, 1, 8)
        if self.mirror not in ("auto", "never"):
            raise ConfigError(f"augment.mirror must be auto or never, got {self.mirror!r}")


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How the registration network learns.

    Parameters
    ----------
    voxels : int
        Most voxels of the grid on which whole scans are registered; 0 leaves it to the method.
    widths : tuple of int
        Filters per level; the first level already is at half resolution.
    lr : float
        Peak learning rate.
    smoothness : float
        Weight of the diffusion of the velocity.
    anatomy : float
        Weight of label overlap against image similarity.
    inverse : float
        Weight of inverse consistency; 0 saves the second pass.
    labelled : float
        Share of pairs whose moving scan is labelled.
    radius : int
        Half width of the correlation window, voxels.
    """

    voxels: int = 0
    widths: tuple[int, ...] = (16, 32, 64, 64)
    lr: float = 1e-3
    smoothness: float = 0.1
    anatomy: float = 1.0
    inverse: float = 0.0
    labelled: float = 0.5
    radius: int = 3

    def __post_init__(self) -> None:
        if len(self.widths) < 1 or min(self.widths) < 1:
            raise ConfigError(f"pair.widths needs at least one level of at least one filter, got {self.widths}")
        _check("pair.voxels", self.voxels, 0, 1 << 27)
        _check("pair.lr", self.lr, 1e-8, 1)
        for name in ("smoothness", "anatomy", "inverse"):
            _check(f"pair.{name}", getattr(self, name), 0, 1e6)
        _check("pair.labelled", self.labelled, 0, 1)
        _check("pair.radius", self.radius, 1, 20)


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """How registration and segmentation teach each other.

    Parameters
    ----------
    apart : float
        Share of the run in which each network is trained by itself.
    rounds : int
        Times the unlabelled scans get new pseudo-labels in what is left.
    registrar : float
        Share of the time in which the registration network learns.
    unlabelled : float
        Share of segmentation patches from pseudo-labelled scans.
    atlases : int
        Labelled scans that vote on each unlabelled one, the most similar first.
    scans : int
        Most unlabelled scans that get pseudo-labels in a round; which ones changes from round to round.
    pool : int
        Most unlabelled scans that a run uses at all, drawn by the seed.
    refine : int
        Steps by which the registrar's answer is optimised before an atlas votes; the full number of `fewscan register`
        where the budget allows it.
    agree : bool
        Pseudo-labels from atlases and segmenter together; else from the atlases alone.
    warped : bool
        Also learn from labelled scans in the shape of unlabelled ones.
    decide : bool
        Train a registration network only where unlabelled scans promise more than time does; else always.
    teach : {"both", "segmenter", "registrar"}
        Which network the other one helps; "both" is the method, the others are its one-way ablations.
    """

    apart: float = 0.4
    rounds: int = 2
    registrar: float = 0.3
    unlabelled: float = 0.5
    atlases: int = 5
    scans: int = 64
    pool: int = 200
    refine: int = 20
    agree: bool = True
    warped: bool = True
    decide: bool = True
    teach: str = "both"

    def __post_init__(self) -> None:
        _check("joint.apart", self.apart, 0.05, 0.95)
        _check("joint.rounds", self.rounds, 1, 20)
        _check("joint.registrar", self.registrar, 0.02, 0.9)
        _check("joint.unlabelled", self.unlabelled, 0, 1)
        _check("joint.atlases", self.atlases, 1, 100)
        _check("joint.scans", self.scans, 1, 100_000)
        _check("joint.pool", self.pool, 1, 100_000)
        _check("joint.refine", self.refine, 0, 1000)
        if self.teach not in ("both", "segmenter", "registrar"):
            raise ConfigError(f"joint.teach must be both, segmenter or registrar, got {self.teach!r}")


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """How a trained segmenter is adapted to another population.

    Parameters
    ----------
    layers : {"auto", "all", "decoder", "last", "norms"}
        Weights that learn; those that the new data call for always do.
    lr : float
        Peak learning rate of weights that came from the trained model.
    warm : float
        Share of the run in which only weights that are new, or were put together anew, learn; at the rate of training.
    folds : int
        Most folds of the cross-validation that compares with the trained model.
    guard : bool
        Whether the trained model is kept where the adapted one is no better; else the latter is, and gets all the time.
    """

    layers: str = "auto"
    lr: float = 3e-4
    warm: float = 0.1
    folds: int = 3
    guard: bool = True

    def __post_init__(self) -> None:
        if self.layers not in ("auto", "all", "decoder", "last", "norms"):
            raise ConfigError(f"transfer.layers must be auto, all, decoder, last or norms, got {self.layers!r}")
        _check("transfer.lr", self.lr, 1e-8, 1)
        _check("transfer.warm", self.warm, 0, 0.9)
        _check("transfer.folds", self.folds, 2, 100)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run, the preset unless changed.

    Parameters
    ----------
    network : NetworkConfig
        The segmenter.
    train : TrainConfig
        How it learns.
    augment : AugmentConfig
        How patches are varied.
    pair : PairConfig
        How the registration network learns.
    joint : JointConfig
        How the two teach each other.
    transfer : TransferConfig
        How a trained segmenter is adapted.

    Examples
    --------
    >>> Settings().train.lr
    0.003
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)


def override(settings: Settings, changes: Mapping[str, str]) -> Settings:
    """Settings with some values replaced, as ``--set train.lr=1e-3`` asks.

    Parameters
    ----------
    settings : Settings
        Where to start from.
    changes : mapping of str to str
        Dotted name to value in text.

    Raises
    ------
    ConfigError
        If a name is unknown (the nearest known one is named) or a value is of the wrong type.

    Examples
    --------
    >>> override(Settings(), {"train.lr": "1e-3"}).train.lr
    0.001
    >>> override(Settings(), {"train.rl": "1e-3"})
    Traceback (most recent call last):
    ...
    fewscan.errors.ConfigError: unknown setting 'train.rl'; did you mean 'train.lr'?
    """
    known = {
        f"{part.name}.{leaf.name}": getattr(getattr(settings, part.name), leaf.name)
        for part in dataclasses.fields(settings)
        for leaf in dataclasses.fields(getattr(settings, part.name))
    }
    parts: dict[str, dict[str, Any]] = {}
    for name, text in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {name!r}; {hint}")
        part, leaf = name.split(".")
        parts.setdefault(part, {})[leaf] = _parse(name, text, known[name])
    replaced = {part: dataclasses.replace(getattr(settings, part), **leaves) for part, leaves in parts.items()}
    return dataclasses.replace(settings, **replaced)


def _parse(name: str, text: str, default: object) -> object:
    """Text to the type of the default."""
    try:
        if isinstance(default, tuple):
            return tuple(int(item) for item in text.replace("-", ",").split(","))
        if isinstance(default, bool):
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
    except (ValueError, KeyError):
        kind = "a list of whole numbers" if isinstance(default, tuple) else f"a {type(default).__name__}"
        raise ConfigError(f"{name} must be {kind}, got {text!r}") from None
    return text


def to_dict(settings: object) -> dict[str, Any]:
    """Plain dictionary of a config, ready for JSON.

    Parameters
    ----------
    settings : dataclass
        Any config of this module.
    """
    return dataclasses.asdict(settings)  # type: ignore[call-overload,no-any-return]


def settings_from_dict(data: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Undo `to_dict`, for the resolved copy beside the weights.

    Parameters
    ----------
    data : mapping
        As `to_dict` wrote it.

    Raises
    ------
    ConfigError
        If a name is unknown.
    """
    try:
        network, pair = dict(data["network"]), dict(data.get("pair", {}))
        if "widths" in pair:
            pair["widths"] = tuple(pair["widths"])
        return Settings(
            network=NetworkConfig(**network | {"widths": tuple(network["widths"])}),
            train=TrainConfig(**data["train"]),
            augment=AugmentConfig(**data["augment"]),
            pair=PairConfig(**pair),
            joint=JointConfig(**data.get("joint", {})),
            transfer=TransferConfig(**data.get("transfer", {})),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the stored settings are not of this version of fewscan: {error}") from None

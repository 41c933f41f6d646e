"""From a trained model to a network for other scans: which weights are taken over, put together anew, or new.

Labels and channels belong together by name. The trained model's network, voxel size and patch are kept unless the new
scans forbid it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewscan.data.dataset import load
from fewscan.data.painting import plain_name
from fewscan.errors import ModelError
from fewscan.learn import heads, overlap
from fewscan.learn.batches import resample_index
from fewscan.learn.channels import laid, said
from fewscan.learn.checkpoint import Model
from fewscan.learn.memory import allowed_bytes, estimate_bytes, make_plan
from fewscan.learn.plan import LARGEST_GRID, PATCH_VOXELS, Plan, to_index
from fewscan.learn.request import Request
from fewscan.space.geometry import Shape, with_spacing
from fewscan.space.volume import Case, Kind, Volume

SURVIVES = 0.85  # Dice of a label with itself after a trip to the model's voxel size and back, below which it is lost
LARGER = 1.5  # a patch may exceed what is usual on this machine by so much: it is the model's


@dataclass(frozen=True, kw_only=True)
class Grafted:
    """Where each weight of a network came from.

    Parameters
    ----------
    kept, adapted, new : tuple of str
        Names of the weights taken over as they were, put together from rows or columns of the trained ones, and drawn
        at random.
    labels, channels : mapping of str to str
        Of the new data: the trained model's label, or channels, that it starts from; "" where there is none.
    dropped : tuple of str
        Labels of the trained model that the new data do not have.
    """

    kept: tuple[str, ...]
    adapted: tuple[str, ...]
    new: tuple[str, ...]
    labels: Mapping[str, str]
    channels: Mapping[str, str]
    dropped: tuple[str, ...]

    @property
    def fresh(self) -> frozenset[str]:
        """Names of the weights that have to be learnt before the others may follow."""
        return frozenset((*self.adapted, *self.new))

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON: counts where everything was kept, names elsewhere."""
        return {
            "kept": len(self.kept), "adapted": list(self.adapted), "new": list(self.new),
            "labels": dict(self.labels), "channels": dict(self.channels), "dropped": list(self.dropped),
        }  # fmt: skip

    def __str__(self) -> str:
        """For the log."""
        parts = [f"{len(self.kept)} weights kept, {len(self.adapted)} adapted, {len(self.new)} new"]
        alone = [name for name, source in self.labels.items() if not source]
        parts += [f"labels unknown to the model: {', '.join(alone)}"] if alone else []
        parts += [f"labels given up: {', '.join(self.dropped)}"] if self.dropped else []
        mixed = [f"{name} from {source or 'nothing'}" for name, source in self.channels.items() if source != name]
        parts += [f"channels: {', '.join(mixed)}"] if mixed else []
        return "; ".join(parts)


def label_sources(names: Sequence[str], base: Sequence[str]) -> list[int | None]:
    """For each label, the place of the same one among the trained model's; None where it does not know it.

    Parameters
    ----------
    names, base : sequence of str
        Label names, without background.

    Examples
    --------
    >>> label_sources(["Left kidney", "spleen"], ["liver", "kidney_left"])
    [1, None]
    """
    known = {plain_name(name): i for i, name in reversed(list(enumerate(base)))}
    return [known.get(plain_name(name)) for name in names]


def columns(wanted: Sequence[str], there: Sequence[str]) -> list[int] | None:
    """Places of the wanted channels among those that are there; by order where no name is known and as many are there.

    Parameters
    ----------
    wanted, there : sequence of str
        Channel names.

    Returns
    -------
    list of int or None
        None where one is missing.

    Examples
    --------
    >>> columns(["t1"], ["flair", "T1"]), columns(["image"], ["t2"]), columns(["t1", "t2"], ["t1"])
    ([1], [0], None)
    """
    known = label_sources(wanted, there)
    if len(wanted) == len(there) and all(i is None for i in known):
        return list(range(len(there)))
    found = [i for i in known if i is not None]
    return found if len(found) == len(wanted) else None


def columns_of(channels: Sequence[str], plan: Plan, *, kind: Kind) -> list[int] | None:
    """Places of a model's channels among those of scans; components of directions belong together by order.

    Parameters
    ----------
    channels : sequence of str
        Of the scans.
    plan : Plan
        Of the model.
    kind : {"scalar", "peaks", "tensor"}
        Of the scans.

    Returns
    -------
    list of int or None
        None where one is missing, or the channels are of another kind.
    """
    if plan.kind == kind == "scalar":
        return columns(plan.channels, channels)
    alike = (plan.kind, len(plan.channels)) == (kind, len(channels))
    return list(range(len(plan.channels))) if alike else None


def arranged(image: Volume, plan: Plan, *, case: str) -> Volume:
    """A scan with the channels that a model takes, in its order and by its names.

    Parameters
    ----------
    image : Volume
        Scan.
    plan : Plan
        Of the model.
    case : str
        Id of the scan, for the message.

    Raises
    ------
    ModelError
        If a channel of the model is missing.
    """
    places = columns_of(image.channels, plan, kind=image.kind)
    if places is None:
        raise ModelError(
            f"case {case} has the channels {', '.join(image.channels)}, the model takes {', '.join(plan.channels)}; "
            "name the channels alike"
        )
    return replace(image, data=image.data[places], channels=plan.channels)


def channel_sources(names: Sequence[str], base: Sequence[str]) -> list[tuple[int, ...]]:
    """For each channel, the places of those of the trained model from which it starts: their weights are averaged.

    A channel starts from the one that `columns` finds for it, any other from the average of all.

    Parameters
    ----------
    names, base : sequence of str
        Channel names.

    Examples
    --------
    >>> channel_sources(["T1"], ["image"]), channel_sources(["flair", "t1"], ["T1"])
    ([(0,)], [(0,), (0,)])
    """
    found = columns(names, base) or label_sources(names, base)
    return [tuple(range(len(base))) if i is None else (i,) for i in found]


def plan_of(request: Request) -> Plan:
    """The plan of a run that starts from a model: its network, voxel size, patch and normalisation, the data's labels.

    The voxel size is the data's own where a label would not survive the model's, or a scan would take more than 32
    patches. The patch shrinks to the scans, to the memory allowed and to what a step can take on this machine.

    Parameters
    ----------
    request : Request
        With a base.

    Raises
    ------
    ResourceError
        If even the smallest patch needs more memory than allowed.
    ModelError
        If the data hold channels of another kind than the model takes.
    """
    assert request.base is not None
    base, data = request.base.plan, request.dataset
    vectors = base.kind != "scalar"
    if base.kind != data.kind or (vectors and len(base.channels) != len(data.channels)):
        raise ModelError(
            f"{data.root}: {len(data.channels)} channel(s) of {said(data.kind)}, the model takes {len(base.channels)} "
            f"of {said(base.kind)}; it cannot start from one for the other"
        )
    own = make_plan(request)
    own = replace(own, channels=base.channels) if vectors else own
    extents, survived = [], dict[int, list[float]]()
    for files in request.dataset.labelled:  # one in memory at a time
        case = load(files, request.dataset)
        extents.append(np.array(case.image.geometry.shape) * case.image.geometry.spacing)
        for k, overlapped in _survival(case, own, base.spacing).items():
            survived.setdefault(k, []).append(overlapped)
    extent = np.median(extents, 0)  # mm
    many = np.prod(extent / base.spacing) > LARGEST_GRID * np.prod(base.patch)
    lost = any(float(np.mean(row)) < SURVIVES for row in survived.values())
    spacing = own.spacing if many or lost else base.spacing
    sources = channel_sources(own.channels, base.channels)
    before = [plain_name(base.names[value]) for value in base.names]
    sole = {before[k - 1] for k in base.sole}
    plan = replace(
        own, spacing=spacing, widths=base.widths, kernels=base.kernels, strides=base.strides,
        patch=_patch(base, extent / np.array(spacing)),
        scaling=tuple(base.scaling[s[0]] if len(s) == 1 else own.scaling[c] for c, s in enumerate(sources)),
        mirror=own.mirror and base.mirror, pairs=own.pairs if base.mirror else (),
        sole=tuple(
            k for k, name in enumerate(own.names.values(), start=1)
            if k in own.sole and (plain_name(name) in sole or plain_name(name) not in before)
        ),
    )  # fmt: skip
    return _small_enough(plan, request)


def _survival(case: Case, own: Plan, spacing: tuple[float, float, float]) -> dict[int, float]:
    """Dice of each label of a case with itself, to a voxel size and back."""
    assert case.label is not None
    found, there = dict[int, float](), with_spacing(case.image.geometry, spacing).shape
    x, y, z = case.label.data.shape
    if case.label.table is not None:
        first = overlap.coded(case.label, own.names)
        second = overlap.resampled(*overlap.resampled(*first, shape=there), shape=(x, y, z))
        for k in range(1, own.classes):
            a, b = overlap.mask(*first, k=k), overlap.mask(*second, k=k)
            if a.any():
                found[k] = 2 * float((a & b).sum()) / float(a.sum() + b.sum())
        return found
    index = to_index(case.label.data, own)
    back = resample_index(resample_index(index, there, classes=own.classes), (x, y, z), classes=own.classes)
    for k in np.unique(index[index > 0]).tolist():
        a, b = index == k, back == k
        found[k] = 2 * float((a & b).sum()) / float(a.sum() + b.sum())
    return found


def _patch(base: Plan, extent: np.ndarray[Any, Any]) -> Shape:
    """The trained model's patch, smaller where the scans are."""
    factor = np.prod(np.array(base.strides), axis=0)
    whole = np.maximum(np.ceil(extent / factor - 1e-6), 2) * factor
    x, y, z = (int(min(p, n)) for p, n in zip(base.patch, whole, strict=True))
    return x, y, z


def _small_enough(plan: Plan, request: Request) -> Plan:
    """The plan with a patch for this machine, its longest side in mm cut step by step."""
    kind = "cpu" if request.hardware.device.type == "cpu" else "gpu"
    most, allowed = LARGER * (request.settings.train.patch_voxels or PATCH_VOXELS[kind]), allowed_bytes(request)
    factor = np.prod(np.array(plan.strides), axis=0)
    while np.prod(plan.patch) > most or (allowed is not None and estimate_bytes(plan) > allowed):
        patch = np.array(plan.patch)
        sides = np.where(patch > 2 * factor, patch * plan.spacing, 0)
        if not sides.any():
            break  # `make_plan` has found a patch that fits, and this one is hardly larger
        patch[int(sides.argmax())] -= factor[int(sides.argmax())]
        plan = replace(plan, patch=(int(patch[0]), int(patch[1]), int(patch[2])))
    return plan


def changes(plan: Plan, base: Plan) -> list[str]:
    """What the new data forbade to keep, in words.

    Parameters
    ----------
    plan : Plan
        From `plan_of`.
    base : Plan
        The trained model's.
    """

    def text(values: Sequence[float]) -> str:
        return "x".join(f"{v:.3g}" for v in values)

    found = []
    if plan.overlapping != base.overlapping:
        start = "mask starts from its class" if plan.overlapping else "class starts from its mask"
        found.append(f"{laid(plan.overlapping)} instead of {laid(base.overlapping)}, as in the data: each {start}")
    if plan.spacing != base.spacing:
        found.append(
            f"voxels of {text(plan.spacing)} mm instead of {text(base.spacing)} mm: a label would be lost on the "
            "model's, or a scan take too many patches"
        )
    if plan.patch != base.patch:
        found.append(
            f"patches of {text(plan.patch)} voxels instead of {text(base.patch)}: the scans or this machine are smaller"
        )
    if base.mirror and not plan.mirror:
        found.append("no left-right mirroring: the labelled cases do not show that it is harmless")
    return found


def graft(network: nn.Module, base: Model, *, plan: Plan) -> Grafted:
    """Give a fresh network the weights of a trained one, matched by name and shape.

    Rows of the last layer go by label name (`heads.carried`), columns of the first by channel (`channel_sources`).

    Parameters
    ----------
    network : nn.Module
        Fresh, of the plan; changed in place.
    base : Model
        Trained; unchanged.
    plan : Plan
        Of the fresh network.

    Raises
    ------
    ModelError
        If the two networks are not of one kind.
    """
    own, trained = network.state_dict(), base.segmenter.state_dict()
    if own.keys() != trained.keys():
        raise ModelError(f"{base.path} holds another kind of network than the settings call for; leave network.* alone")
    names, before = list(plan.names.values()), list(base.plan.names.values())
    labels = label_sources(names, before)
    channels = channel_sources(plan.channels, base.plan.channels)
    entries = channels if plan.kind == "scalar" else [(i,) for i in range(plan.width)]
    rows = [None if i is None else i + 1 for i in labels]
    kinds: dict[str, list[str]] = {"kept": [], "adapted": [], "new": []}
    for name, fresh in own.items():
        source = trained[name].to(fresh)
        if name == network.ENTRY:
            answer = torch.stack([source[:, list(places)].mean(1) for places in entries], 1)
        elif name in (network.HEAD or ()):  # type: ignore[operator]
            overlaps = {"before": base.plan.overlapping, "after": plan.overlapping}
            answer = heads.carried(source, fresh, rows=rows, **overlaps)
        else:
            answer = source if source.shape == fresh.shape else fresh
        kinds[_kind(answer, source, fresh)].append(name)
        own[name] = answer
    network.load_state_dict(own)
    return Grafted(
        kept=tuple(kinds["kept"]), adapted=tuple(kinds["adapted"]), new=tuple(kinds["new"]),
        labels={n: "" if i is None else before[i] for n, i in zip(names, labels, strict=True)},
        channels={
            n: " + ".join(base.plan.channels[i] for i in places)
            for n, places in zip(plan.channels, channels, strict=True)
        },
        dropped=tuple(name for i, name in enumerate(before) if i not in labels),
    )  # fmt: skip


def _kind(answer: Tensor, source: Tensor, fresh: Tensor) -> str:
    if answer.shape == source.shape and torch.equal(answer, source):
        return "kept"
    return "new" if torch.equal(answer, fresh) else "adapted"


def renumbered(names: Mapping[int, str], wanted: Mapping[int, str]) -> dict[int, str]:
    """Labels in their order, those that both have with the wanted number.

    Parameters
    ----------
    names : mapping of int to str
        The trained model's labels.
    wanted : mapping of int to str
        The new data's.

    Examples
    --------
    >>> renumbered({1: "liver", 2: "spleen"}, {1: "Spleen"})
    {2: 'liver', 1: 'spleen'}
    """
    numbers = {plain_name(name): value for value, name in wanted.items()}
    answer: dict[int, str] = {}
    for value, name in names.items():
        taken = set(numbers.values()) | answer.keys()
        if plain_name(name) in numbers:
            value = numbers[plain_name(name)]
        elif value in taken:
            value = next(v for v in range(1, 2**16) if v not in taken)
        answer[value] = name
    return answer

"""Label map file in, a folder of surfaces out, with a certificate of what can be printed, and pictures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewscan.data.dicom_labels import is_label
from fewscan.data.io import peek, read_image, read_labels
from fewscan.data.label_maps import names_itself
from fewscan.deliver import mesh_files, printable, rendered, solids
from fewscan.deliver.confidence import Classes
from fewscan.deliver.mesh import Surface, surfaces
from fewscan.deliver.mesh_files import Item, Space
from fewscan.deliver.printable import Printer
from fewscan.deliver.rendered import VIEWS, Colour
from fewscan.deliver.solids import Additions
from fewscan.deliver.structures import colour
from fewscan.deliver.surface import Mesh, in_threads
from fewscan.errors import ConfigError, DataError, FewscanError
from fewscan.learn.checkpoint import USE, versions, write_json
from fewscan.learn.request import Observer
from fewscan.naming import label_names, recorded_names
from fewscan.space.geometry import check_same
from fewscan.space.volume import IGNORE, Labelmap

RECORD = "certificate.json"
PICTURES = "pictures"
MODELS = {"3mf": "model.3mf", "glb": "model.glb"}
OWN = re.compile(rf"[\w.-]+\.(?:stl|ply)|model\.(?:3mf|glb)|{PICTURES}/[\w.-]+\.png")
"""What a file of ours may be called; a record that names anything else is not believed."""
MOST_PICTURES = 24  # parts that get a picture of their own
Purpose = Literal["print", "vr", "view"]


@dataclass(frozen=True)
class Kind:
    """What one purpose needs.

    Parameters
    ----------
    suffixes : tuple of str
        Files to write.
    faces : int
        At most so many together unless told; 0 for all.
    judged : bool
        Whether parts are examined for printing.
    """

    suffixes: tuple[str, ...]
    faces: int = 0
    judged: bool = False


PURPOSES: dict[str, Kind] = {
    "print": Kind(("stl", "3mf", "glb"), judged=True),
    "vr": Kind(("glb",), faces=200_000),
    "view": Kind(("glb", "ply")),
}


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How surfaces are made.

    Parameters
    ----------
    smooth_mm : float, optional
        Standard deviation of the smoothing along the surface; None takes 2.5 times the coarsest voxel edge, 0 leaves
        the voxels' faces.
    faces : int, optional
        At most about so many triangles over all parts; None follows the purpose, 0 keeps all. Walls between
        structures then match to the distance that the certificate names.
    merge : bool
        All labels as one part.
    space : {"RAS", "LPS"}
        Of the coordinates in STL, 3MF and PLY.

    Raises
    ------
    ConfigError
        If a value is impossible.
    """

    smooth_mm: float | None = None
    faces: int | None = None
    merge: bool = False
    space: Space = "RAS"

    def __post_init__(self) -> None:
        if self.smooth_mm is not None and not 0 <= self.smooth_mm < 1000:
            raise ConfigError(f"smooth_mm must be 0 or more and below 1000, got {self.smooth_mm}")
        if self.faces is not None and self.faces < 0:
            raise ConfigError(f"faces must be 0 or more, got {self.faces}")
        if self.space not in ("RAS", "LPS"):
            raise ConfigError(f"space must be RAS or LPS, got {self.space!r}")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """A part as it will be written, and what is known of it."""

    name: str
    stem: str
    mesh: Mesh
    colour: Colour
    found: dict[str, Any]
    confidence: NDArray[np.float64] | None = None


def mesh(
    labelmap: Path | str,
    out: Path | str,
    *,
    labels: Sequence[str] = (),
    purpose: Purpose = "print",
    config: MeshConfig | None = None,
    additions: Additions | None = None,
    printer: Printer | None = None,
    probabilities: Path | str | None = None,
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Turn a label map into surfaces and say whether they can be printed.

    Parameters
    ----------
    labelmap : path
        NIfTI, NRRD or MetaImage; its labels are called as in `fewscan.naming.label_names`.
    out : path
        Folder to write: a file for each part, ``model.3mf``, ``model.glb``, `RECORD` and a folder `PICTURES`.
    labels : sequence of str
        Values or names to mesh; all when empty.
    purpose : {"print", "vr", "view"}
        Decides on files and on how closely parts are examined.
    config : MeshConfig, optional
        How surfaces are made.
    additions : Additions, optional
        Hollowing, cuts, struts, tag.
    printer : Printer, optional
        Limits to examine against.
    probabilities : path, optional
        As `fewscan.predict` writes them; they are painted on PLY and GLB.
    observe : callable, optional
        Gets messages.

    Returns
    -------
    dict
        Content of the certificate; its ``printable`` is None where the purpose was not to print.

    Raises
    ------
    FewscanError
        If the file cannot be used, holds none of the labels, or the folder holds something else.
    """
    begin, folder = time.monotonic(), Path(out)
    kind, config = _kind(purpose), config or MeshConfig()
    additions, printer = additions or Additions(), printer or Printer()
    say = observe or (lambda _: None)
    whole = _read(Path(labelmap))
    colours = {value: colour(place) for place, value in enumerate(sorted(whole.names))}  # a choice changes none
    label = _chosen(whole, labels, path=Path(labelmap))
    sure = None if probabilities is None else _probabilities(Path(probabilities), label, of=Path(labelmap))
    if config.merge:
        sure = None if sure is None else sure.merged(label.names, whole=not labels)
        label, colours = _merged(label), {1: colour(0)}
    made: list[str] = []
    found = surfaces(label, smooth_mm=config.smooth_mm, say=made.append)
    moved = 0.0
    faces = kind.faces if config.faces is None else config.faces
    if faces:
        meshes, moved = solids.simplified([surface.mesh for surface in found], faces=faces)
        found = [replace(surface, mesh=mesh) for surface, mesh in zip(found, meshes, strict=True)]
    for sentence in made:
        say(sentence)
    parts = _parts(found, label, kind=kind, additions=additions, printer=printer, sure=sure, colours=colours)
    record = {
        "printable": all(part.found["printable"] for part in parts) if kind.judged else None,
        "purpose": purpose, "unit": "mm", "space": config.space, "use": USE,
        "parts": {part.name: part.found for part in parts}, "remarks": made,
        "smooth_mm": config.smooth_mm, "walls_match_within_mm": round(2 * moved, 3),
        "additions": {k: v if k != "tag" else True for k, v in asdict(additions).items() if v},
        "printer": asdict(printer), "methods": dict(printable.METHODS), "versions": versions(),
    }  # fmt: skip
    _write(parts, folder, record, kind=kind, space=config.space, painted=sure is not None)
    record["seconds"] = round(time.monotonic() - begin, 2)
    write_json(record, folder / RECORD)
    return record


def _kind(purpose: str) -> Kind:
    if purpose not in PURPOSES:
        raise ConfigError(f"a mesh is for one of {', '.join(PURPOSES)}, got {purpose!r}")
    return PURPOSES[purpose]


# ------------------------------------------------------------------------------------------------------------ reading


def _read(path: Path) -> Labelmap:
    """The label map, its labels named by whoever lists them."""
    if path.is_dir() or is_label(path):
        what, folder = ("a folder", path) if path.is_dir() else ("a DICOM file", path.parent)
        near = [file for pattern in ("*.nii.gz", "*/*.nii.gz") for file in sorted(folder.glob(pattern))]
        first = next((file for file in near if not file.name.endswith("_probabilities.nii.gz")), "seg.nii.gz")
        raise DataError(f"{path}: is {what}; give one label map in NIfTI, NRRD or MetaImage, such as {first}")
    names, ignore = label_names(path)
    names = None if names_itself(path) else names
    label = read_labels(path, ignore=ignore)
    data = np.where(label.data == IGNORE, 0, label.data)
    return Labelmap(
        data, label.geometry, {v: (names or {}).get(v, name) for v, name in label.names.items() if v != ignore}
    )


def _chosen(label: Labelmap, labels: Sequence[str], *, path: Path) -> Labelmap:
    """The map with the wanted labels alone."""
    wanted = []
    for word in labels:
        value = next((v for v, name in label.names.items() if word in (name, str(v))), None)
        if value is None:
            held = ", ".join(f"{v} ({name})" for v, name in list(label.names.items())[:20]) or "none"
            raise DataError(f"{path}: holds no label {word!r}; it holds {held}")
        wanted.append(value)
    if not label.names:
        raise DataError(f"{path}: holds no label, every voxel is 0; give a label map that is not empty")
    names = {v: label.names[v] for v in wanted} if wanted else dict(label.names)
    data = label.data
    if wanted:
        keep = np.zeros(IGNORE + 1, bool)
        keep[wanted] = True
        data = np.where(keep[data], data, 0)
    return Labelmap(data, label.geometry, names)


def _merged(label: Labelmap) -> Labelmap:
    return Labelmap((label.data > 0).astype(np.uint16), label.geometry, {1: "merged"})


def _probabilities(path: Path, label: Labelmap, *, of: Path) -> Classes:
    """Probabilities of a label map's classes: in the order recorded with it, else in that of the listed values."""
    count = peek(path).channels
    found = read_image(path, channels=[f"class {i}" for i in range(count)])
    check_same(found.geometry, label.geometry, what=f"{path} and the label map")
    order = [*recorded_names(of)] or sorted(label_names(of)[0] or range(1, count))
    strange = [f"{v} ({name})" for v, name in label.names.items() if v not in order]
    if len(order) != count - 1 or strange:
        held = f", and {', '.join(strange)} is none of them" if strange else ""
        raise DataError(
            f"{path}: holds {count} classes with the background, {of.name} is of {len(order)} labels{held}; they must "
            "belong together, so give the probabilities that were written with this label map"
        )
    return Classes(found, {value: place for place, value in enumerate(order, start=1)})


# ------------------------------------------------------------------------------------------------------------- making


def _parts(
    found: Sequence[Surface],
    label: Labelmap,
    *,
    kind: Kind,
    additions: Additions,
    printer: Printer,
    sure: Classes | None,
    colours: Mapping[int, Colour],
) -> list[_Part]:
    """Every surface measured, with what was asked for added, mended and examined."""
    stems = _stems([surface.name for surface in found])

    def make(number: int) -> list[_Part]:
        surface = found[number]
        measured = {
            "label": surface.value, "mask_ml": round(surface.voxel_mm3 / 1000, 4),
            "volume_error": round(surface.mesh.volume_mm3 / surface.voxel_mm3 - 1, 6),
            "deviation": printable.deviation(surface.mesh, label, value=surface.value),
            "cut_off": _touches(surface, label),
        }  # fmt: skip
        try:
            pieces, done = solids.add(surface.mesh, additions)
        except FewscanError as error:
            raise type(error)(f"{surface.name}: {error}") from None
        made = []
        for index, piece in enumerate(pieces):
            mended, changed = printable.repaired(printable.as_written(piece))
            facts = measured | {"changed": [*done, *changed]}
            facts |= _examined(mended, facts, printer) if kind.judged else {"faces": len(mended.faces)}
            known = None if sure is None else sure.on(mended, surface.value)
            tail = (f", piece {index + 1}", f"_piece{index + 1}") if len(pieces) > 1 else ("", "")
            made.append(
                _Part(
                    name=surface.name + tail[0], stem=stems[number] + tail[1], mesh=mended,
                    colour=colours[surface.value], found=facts, confidence=known,
                )
            )  # fmt: skip
        return made

    return [part for parts in in_threads(make, range(len(found))) for part in parts]


def _examined(mesh: Mesh, known: dict[str, Any], printer: Printer) -> dict[str, Any]:
    """Figures and verdict of a part."""
    facts = known | printable.figures(mesh, printer)
    faults, remarks = printable.judged(facts, printer)
    if known["cut_off"]:
        remarks.append("it reaches the border of the scan and is closed there by a flat face")
    return facts | {"printable": not faults, "faults": faults, "remarks": remarks}


def _touches(surface: Surface, label: Labelmap) -> bool:
    """Whether a label reaches the border of its grid, so that what is beyond is cut off."""
    inverse = np.linalg.inv(label.geometry.affine)
    index = surface.mesh.points @ inverse[:3, :3].T + inverse[:3, 3]
    return bool((index.min(0) < 0).any() or (index.max(0) > np.array(label.geometry.shape) - 1).any())


def _stems(names: Sequence[str]) -> list[str]:
    """File names without suffix: letters, digits, dots and dashes; told apart by a number where two become alike."""
    taken: set[str] = {"model"}
    stems = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name).strip("._") or "label"
        stem, number = plain, 2
        while stem.lower() in taken:  # some disks do not tell capitals apart
            stem, number = f"{plain}_{number}", number + 1
        taken.add(stem.lower())
        stems.append(stem)
    return stems


# ------------------------------------------------------------------------------------------------------------ writing


def _write(
    parts: Sequence[_Part], folder: Path, record: dict[str, Any], *, kind: Kind, space: Space, painted: bool
) -> None:
    """Write every file, after those of an earlier run are gone; the record names them first and says what they are."""
    suffixes = [*kind.suffixes, *(["ply"] if painted and "ply" not in kind.suffixes else [])]
    alone = [suffix for suffix in suffixes if suffix not in MODELS]
    files = [f"{part.stem}.{suffix}" for part in parts for suffix in alone]
    files += [MODELS[suffix] for suffix in suffixes if suffix in MODELS]
    shown = parts if 1 < len(parts) <= MOST_PICTURES else []
    pictures = [f"{PICTURES}/all_{view}.png" for view in VIEWS] + [
        f"{PICTURES}/part_{i + 1}.png" for i in range(len(shown))
    ]
    own = _claim(folder, [*files, *pictures])
    folder.mkdir(parents=True, exist_ok=True)
    record |= {"files": files, "pictures": pictures}
    write_json({"use": USE, "files": files, "pictures": pictures}, folder / RECORD)  # from here on the folder is ours
    for path in own:
        path.unlink(missing_ok=True)
    items = [Item(name=p.name, mesh=p.mesh, colour=p.colour, confidence=p.confidence) for p in parts]
    for part, item in zip(parts, items, strict=True):
        part.found["files"] = [f"{part.stem}.{suffix}" for suffix in alone]
        if "stl" in alone:
            mesh_files.write_stl(part.mesh, folder / f"{part.stem}.stl", space=space)
        if "ply" in alone:
            mesh_files.write_ply(item, folder / f"{part.stem}.ply", space=space)
    if "3mf" in suffixes:
        mesh_files.write_3mf(items, folder / MODELS["3mf"], space=space)
    if "glb" in suffixes:
        mesh_files.write_glb(items, folder / MODELS["glb"])
    colours = [part.colour for part in parts]
    for view in VIEWS:
        pixels = rendered.picture([part.mesh for part in parts], view, colours=colours)
        rendered.write_picture(pixels, folder / PICTURES / f"all_{view}.png")
    for number, part in enumerate(shown):
        part.found["picture"] = f"{PICTURES}/part_{number + 1}.png"
        pixels = rendered.picture([part.mesh], "front", colours=[part.colour])
        rendered.write_picture(pixels, folder / part.found["picture"])


def _claim(folder: Path, wanted: Sequence[str]) -> list[Path]:
    """Files that an earlier run left; refuses where anything else is in the way."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the meshes")
    if (folder / PICTURES).exists() and not (folder / PICTURES).is_dir():
        raise ConfigError(f"{folder / PICTURES} is a file where pictures are to lie; give another -o")
    named: set[str] = set()
    if (folder / RECORD).is_file():
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            named = {str(name) for key in ("files", "pictures") for name in content[key]}
        except (OSError, ValueError, TypeError, KeyError):
            raise ConfigError(f"{folder / RECORD} was not written by fewscan mesh; give another -o") from None
    own = {name for name in named if OWN.fullmatch(name)}
    for name in wanted:
        if (folder / name).exists() and name not in own:
            raise ConfigError(f"{folder / name} exists and was not written by fewscan mesh; give another -o")
    return [folder / name for name in sorted(own) if (folder / name).is_file()]

"""Writers of surface files: STL, 3MF, GLB and PLY, each whole or not at all.

STL, 3MF and PLY keep millimetres in RAS or LPS and say so inside; GLB is in metres with Y up, as glTF 2.0 asks: the
patient stands and looks at the viewer. Names are those of labels; nothing else about a patient is written.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from fewscan.data.io import atomic
from fewscan.deliver.surface import Mesh
from fewscan.errors import DataError
from fewscan.learn.checkpoint import USE
from fewscan.space.geometry import Array

Space = Literal["RAS", "LPS"]
UP = np.array([[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]]) / 1000
"""RAS millimetres to glTF metres: X to the patient's left, Y to the head, Z to the front."""
FLOAT, UINT = 5126, 5125  # component types of glTF
VERTICES, INDICES = 34962, 34963  # targets of its buffer views
CONTENT_TYPES = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="model" ContentType="application/vnd.ms-package.3dmanufacturing-3dmodel+xml"/></Types>'
)
RELATIONS = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Target="/3D/3dmodel.model" Id="rel0" '
    'Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"/></Relationships>'
)
CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
UNSURE, MIDDLING, SURE = np.array([230.0, 97, 1]), np.array([247.0, 247, 247]), np.array([33.0, 102, 172])
STAMP = (1980, 1, 1, 0, 0, 0)  # of files in a zip, so that the same parts give the same bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class Item:
    """A named surface with a colour.

    Parameters
    ----------
    name : str
        Of the part.
    mesh : Mesh
        RAS+ mm.
    colour : (3,) int
        Red, green, blue, 0 to 255.
    confidence : (V,) float, optional
        0 to 1 for each vertex.
    """

    name: str
    mesh: Mesh
    colour: tuple[int, int, int]
    confidence: Array | None = None


def in_space(points: Array, space: Space) -> NDArray[np.float32]:
    """RAS+ places in the space of a file; half a turn, which leaves what is outside outside.

    Parameters
    ----------
    points : (V, 3) float
        RAS+ mm.
    space : {"RAS", "LPS"}
        Of the file.
    """
    return (points * ([-1, -1, 1] if space == "LPS" else [1, 1, 1])).astype(np.float32)


def write_stl(mesh: Mesh, path: Path, *, space: Space) -> None:
    """Write a binary STL file.

    Parameters
    ----------
    mesh : Mesh
        RAS+ mm.
    path : Path
        File to write.
    space : {"RAS", "LPS"}
        Written into the header too.
    """
    row = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("extra", "<u2")])
    rows = np.zeros(len(mesh.faces), row)
    rows["corners"] = in_space(mesh.points, space)[mesh.faces]
    a, b, c = (rows["corners"][:, i].astype(np.float64) for i in range(3))
    normal = np.cross(b - a, c - a)
    rows["normal"] = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    header = f"fewscan; unit mm; space {space}; {USE}".encode().ljust(80)
    with atomic(path) as part, part.open("wb") as file:
        file.write(header + struct.pack("<I", len(rows)))
        file.write(rows.tobytes())


def write_3mf(items: Sequence[Item], path: Path, *, space: Space) -> None:
    """Write a 3MF file (3MF Core Specification 1.3): millimetres, a named and coloured object for each part.

    Parameters
    ----------
    items : sequence of Item
        Parts.
    path : Path
        File to write.
    space : {"RAS", "LPS"}
        Written into the metadata too.
    """
    colours = "".join(
        f'<base name={quoteattr(item.name)} displaycolor="#{bytes(item.colour).hex().upper()}FF"/>' for item in items
    )
    with atomic(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as package:
        for name, text in (("[Content_Types].xml", CONTENT_TYPES), ("_rels/.rels", RELATIONS)):
            package.writestr(zipfile.ZipInfo(name, STAMP), text, zipfile.ZIP_DEFLATED)
        with package.open(zipfile.ZipInfo("3D/3dmodel.model", STAMP), "w", force_zip64=True) as model:
            model.write(
                f'<?xml version="1.0" encoding="UTF-8"?>\n<model unit="millimeter" xml:lang="en-US" xmlns="{CORE}">'
                f'<metadata name="Application">fewscan</metadata>'
                f'<metadata name="Description">Space {space}, {USE}</metadata>'
                f'<resources><basematerials id="1">{colours}</basematerials>'.encode()
            )
            for number, item in enumerate(items):
                head = f'<object id="{number + 2}" type="model" name={quoteattr(item.name)} pid="1" pindex="{number}">'
                model.write(f"{head}<mesh><vertices>".encode())
                model.write(_rows('<vertex x="%.9g" y="%.9g" z="%.9g"/>', in_space(item.mesh.points, space)))
                model.write(b"</vertices><triangles>")
                model.write(_rows('<triangle v1="%d" v2="%d" v3="%d"/>', item.mesh.faces))
                model.write(b"</triangles></mesh></object>")
            built = "".join(f'<item objectid="{number + 2}"/>' for number in range(len(items)))
            model.write(f"</resources><build>{built}</build></model>".encode())


def _rows(form: str, values: NDArray[Any]) -> bytes:
    """The values in the form, one row after another; in one go, which is several times as fast as row by row."""
    return (form * len(values) % tuple(values.ravel().tolist())).encode()


def write_glb(items: Sequence[Item], path: Path) -> None:
    """Write a binary glTF 2.0 file: metres, Y up, a named node and a material for each part; confidence as colour.

    Parameters
    ----------
    items : sequence of Item
        Parts.
    path : Path
        File to write.
    """
    buffer, views, accessors, nodes, meshes, materials = bytearray(), [], [], [], [], []

    def put(values: NDArray[Any], *, kind: str, target: int, bounds: bool = False) -> int:
        component = UINT if values.dtype == np.uint32 else FLOAT
        views.append({"buffer": 0, "byteOffset": len(buffer), "byteLength": values.nbytes, "target": target})
        buffer.extend(values.tobytes())
        accessor: dict[str, Any] = {
            "bufferView": len(views) - 1, "componentType": component, "count": len(values), "type": kind
        }  # fmt: skip
        if bounds:
            accessor |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        accessors.append(accessor)
        return len(accessors) - 1

    for number, item in enumerate(items):
        places = (item.mesh.points @ UP.T).astype(np.float32)
        attributes = {
            "POSITION": put(places, kind="VEC3", target=VERTICES, bounds=True),
            "NORMAL": put(_upright(item.mesh), kind="VEC3", target=VERTICES),
        }
        if item.confidence is not None:
            shades = (painted(item.confidence) / 255).astype(np.float32)
            attributes["COLOR_0"] = put(shades, kind="VEC3", target=VERTICES)
        corners = put(item.mesh.faces.astype(np.uint32).ravel(), kind="SCALAR", target=INDICES)
        colour = [1.0, 1.0, 1.0] if item.confidence is not None else [_linear(c / 255) for c in item.colour]
        shine = {"baseColorFactor": [*colour, 1.0], "metallicFactor": 0.0, "roughnessFactor": 0.7}
        materials.append({"name": item.name, "pbrMetallicRoughness": shine})
        meshes.append(
            {"name": item.name, "primitives": [{"attributes": attributes, "indices": corners, "material": number}]}
        )
        nodes.append({"name": item.name, "mesh": number})
    content = {
        "asset": {"version": "2.0", "generator": "fewscan", "extras": {"unit": "m", "up": "Y", "use": USE}},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": nodes,
        "meshes": meshes,
        "materials": materials,
        "buffers": [{"byteLength": len(buffer)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    buffer.extend(b"\0" * (-len(buffer) % 4))
    with atomic(path) as part, part.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(buffer)))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(buffer), b"BIN\0"))
        file.write(buffer)


def read_glb(path: Path) -> list[Item]:
    """Read what `write_glb` wrote: its parts in RAS millimetres, with confidence where it is painted on them.

    Parameters
    ----------
    path : Path
        File of our own.

    Raises
    ------
    DataError
        If it is damaged, or another program's.
    """
    try:
        raw = path.read_bytes()
        length = struct.unpack_from("<I", raw, 12)[0]
        content, body = json.loads(raw[20 : 20 + length]), memoryview(raw)[28 + length :]
        if content["asset"]["generator"] != "fewscan":
            raise ValueError("another program wrote it")

        def take(number: int) -> NDArray[Any]:
            accessor = content["accessors"][number]
            start = content["bufferViews"][accessor["bufferView"]]["byteOffset"]
            width = {"SCALAR": 1, "VEC3": 3}[accessor["type"]]
            kind = np.uint32 if accessor["componentType"] == UINT else np.float32
            return np.frombuffer(body, kind, accessor["count"] * width, start).reshape(-1, width)

        items, back = [], np.linalg.inv(UP).T
        for mesh, material in zip(content["meshes"], content["materials"], strict=True):
            (part,) = mesh["primitives"]
            surface = Mesh(take(part["attributes"]["POSITION"]) @ back, take(part["indices"]).reshape(-1, 3))
            red, green, blue = (round(255 * _shown(c)) for c in material["pbrMetallicRoughness"]["baseColorFactor"][:3])
            shades = part["attributes"].get("COLOR_0")
            sure = None if shades is None else _sure(take(shades) * 255.0)
            items.append(Item(name=str(mesh["name"]), mesh=surface, colour=(red, green, blue), confidence=sure))
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise DataError(f"{path}: not a model of fewscan mesh ({error}); make it again") from None
    return items


def _linear(share: float) -> float:
    """A colour as screens take it to one as light adds up, which glTF asks for (sRGB, IEC 61966-2-1)."""
    return round(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4, 4)


def _shown(light: float) -> float:
    """The inverse of `_linear`."""
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def _upright(mesh: Mesh) -> NDArray[np.float32]:
    """Normals of vertices with Y up; any direction where faces cancel out, for they must have length 1."""
    turned = mesh.normals @ (UP.T * 1000)
    return np.where((turned != 0).any(1, keepdims=True), turned, [0.0, 1.0, 0.0]).astype(np.float32)


def painted(confidence: Array) -> NDArray[np.float64]:
    """(V, 3): red, green, blue 0 to 255, from orange where confidence is 0 to blue where it is 1.

    Parameters
    ----------
    confidence : (V,) float
        0 to 1.
    """
    share = np.clip(confidence, 0, 1)[:, None]
    found: NDArray[np.float64] = np.where(
        share < 0.5, UNSURE + 2 * share * (MIDDLING - UNSURE), MIDDLING + (2 * share - 1) * (SURE - MIDDLING)
    )
    return found


def _sure(shades: NDArray[np.float64]) -> Array:
    """The inverse of `painted`: red rules below the middle, and falls faster than green above it."""
    red, green = shades[:, 0], shades[:, 1]
    less, more = (green - UNSURE[1]) / (MIDDLING - UNSURE)[1] / 2, (1 + (red - MIDDLING[0]) / (SURE - MIDDLING)[0]) / 2
    found: Array = np.clip(np.where(red >= green, less, more), 0, 1)
    return found


def write_ply(item: Item, path: Path, *, space: Space) -> None:
    """Write a binary PLY file with a colour for each vertex, and its confidence where there is one.

    Parameters
    ----------
    item : Item
        A part.
    path : Path
        File to write.
    space : {"RAS", "LPS"}
        Written into the header too.
    """
    fields: list[Any] = [("places", "<f4", 3), ("colour", "u1", 3)]
    lines = [f"property float {axis}" for axis in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    if item.confidence is not None:
        fields.append(("confidence", "<f4"))
        lines.append("property float confidence")
    vertices = np.zeros(len(item.mesh.points), np.dtype(fields))
    vertices["places"] = in_space(item.mesh.points, space)
    vertices["colour"] = item.colour
    if item.confidence is not None:
        vertices["colour"], vertices["confidence"] = np.rint(painted(item.confidence)), item.confidence
    faces = np.zeros(len(item.mesh.faces), np.dtype([("count", "u1"), ("corners", "<i4", 3)]))
    faces["count"], faces["corners"] = 3, item.mesh.faces
    head = ["ply", "format binary_little_endian 1.0", f"comment fewscan, unit mm, space {space}, {USE}"]
    head += [f"element vertex {len(vertices)}", *lines]
    head += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    with atomic(path) as part, part.open("wb") as file:
        file.write("\n".join(head).encode())
        file.write(vertices.tobytes())
        file.write(faces.tobytes())

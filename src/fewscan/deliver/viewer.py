"""The report's interactive viewer: scenes as inert text in the page, decoded when a reader opens it.

Nothing is fetched: NiiVue's built file lies in `VENDOR` and goes into the page too, gzipped. A viewer that is not
opened costs a reader nothing but the size of the page.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from html import escape
from importlib import resources
from typing import Any, Literal

import numpy as np

from fewscan.deliver import markup, pictures, sections
from fewscan.deliver.embedding import Limits, packed, thinned
from fewscan.deliver.scenes import Content, Scene, said
from fewscan.errors import FewscanError
from fewscan.space.volume import Labelmap

Extent = Literal["full", "thin", "none"]
EXTENTS: tuple[Extent, ...] = ("full", "thin", "none")
MOST_BYTES = 25_000_000
"""Of a page with a thin viewer; scenes that do not fit are left out, and the page says so."""

STILLS = 3  # scenes that are drawn
VENDOR, NIIVUE, LICENCES = "vendor", "niivue-0.69.0.min.js", "LICENSES.txt"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
WITHOUT = "Without scripts there is no viewer; the pictures on this page show the same."


@dataclass
class _Embedded:
    """Scenes as text, and what is to be said of them."""

    blocks: list[str] = field(default_factory=list)
    stills: list[str] = field(default_factory=list)
    thin: dict[str, list[str]] = field(default_factory=dict)  # what was taken away, of which scenes
    lost: list[str] = field(default_factory=list)
    left: int = 0


def embedded(scenes: Sequence[Scene], *, extent: Extent, room: int = MOST_BYTES, stills: bool = False) -> str:
    """The viewer with its scenes in the page; nothing where there is nothing to show.

    Parameters
    ----------
    scenes : sequence of Scene
        In the order of interest.
    extent : {"full", "thin", "none"}
        Scenes as they are, however large; thinned to fit into ``room``; or no viewer.
    room : int
        Bytes for all of it.
    stills : bool
        Also draw still pictures of the first scenes, for print and for browsers that cannot show a viewer.
    """
    if extent == "none" or not scenes:
        return ""
    code = _code()
    found = _embed(scenes, extent=extent, room=room - len(code), stills=stills)
    if not found.blocks:
        return ""
    size = (len(code) + sum(map(len, found.blocks))) / 1e6
    what = "one scene" if len(found.blocks) == 1 else f"{len(found.blocks)} scenes"
    viewer = _section(f"{what}, {size:.1f} MB inside this page", found.blocks, notes=_notes(found), code=code)
    return "".join(found.stills) + viewer


def served(scenes: Sequence[Scene]) -> str:
    """The viewer of a page that `fewscan.deliver.serve` serves: scenes are read when they are looked at, as they are.

    Parameters
    ----------
    scenes : sequence of Scene
        In the order of interest.
    """
    if not scenes:
        return ""
    blocks = [_block({"title": scene.title, "at": f"scene/{i}"}) for i, scene in enumerate(scenes)]
    notes = ["Every scene is read from disk when it is looked at, and shown whole."]
    what = "one scene" if len(blocks) == 1 else f"{len(blocks)} scenes"
    return _section(f"{what}, from this machine's disk", blocks, notes=notes, code=_code())


def described(title: str, *, remarks: Sequence[str], layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a page must know of a scene.

    Parameters
    ----------
    title : str
        Its name.
    remarks : sequence of str
        What is missing in it.
    layers : iterable of mapping
        `Packed.about` of each, with its content as ``data`` (base 64) or its place as ``at``.
    """
    return {"title": title, "remarks": list(remarks), "layers": list(layers)}


def _embed(scenes: Sequence[Scene], *, extent: Extent, room: int, stills: bool) -> _Embedded:
    found, taken = _Embedded(), 0
    for scene in scenes:
        thin: list[str] = []
        try:
            content = scene.load()
            if extent == "thin":
                content, thin = thinned(content, Limits())
            files = packed(content, level=6 if extent == "thin" else 4)
        except FewscanError as error:
            found.lost.append(f"{scene.title}: {said(error)}")
            continue
        layers = [{**file.about, "data": base64.b64encode(file.content).decode()} for file in files]
        block = _block(described(scene.title, remarks=content.remarks, layers=layers))
        if extent == "thin" and taken + len(block) > room:
            found.left += 1
            continue
        taken += len(block)
        found.blocks.append(block)
        if stills and len(found.stills) < STILLS:
            found.stills += _still(scene.title, content)
        if thin:
            found.thin.setdefault(", ".join(thin), []).append(scene.title)
    return found


def _still(title: str, content: Content) -> list[str]:
    """Outlines of the first labels on three planes of the first scan."""
    label = next((layer.data for layer in content.layers if layer.kind == "labels"), None)
    if content.geometry is None or label is None:
        return []
    scan = next((layer.data for layer in content.layers if layer.kind == "scan"), None)
    shown = Labelmap(label, content.geometry, content.names)
    planes = pictures.three_planes(replace(shown, data=np.zeros_like(label)), shown, image=scan)
    head = f"<header><h3>{escape(title)}</h3></header>"
    return [f'<div class="overlays"><article>{head}{sections.side_by_side(planes)}</article></div>']


def _notes(found: _Embedded) -> list[str]:
    notes = []
    if found.thin:
        notes.append(
            "This page holds less than the files: "
            + "; ".join(
                f"{'each scan' if len(titles) == len(found.blocks) > 1 else ', '.join(titles)}: {what}"
                for what, titles in found.thin.items()
            )
            + ". `fewscan view` shows the files as they are, `fewscan report --viewer full` puts them into the page."
        )
    if found.left:
        notes.append(f"{found.left} more did not fit into {MOST_BYTES / 1e6:.0f} MB; `fewscan view` shows them all.")
    return notes + [f"Not shown: {line}" for line in found.lost]


def _section(size: str, blocks: Sequence[str], *, notes: Sequence[str], code: str) -> str:
    told = "".join(f"<p class='hint'>{escape(note)}</p>" for note in notes)
    licence = markup.fold("Licence of the viewer", f"<pre class='matrix'>{escape(_vendored(LICENCES).decode())}</pre>")
    return (
        '<div class="viewer"><p class="start"><button type="button" hidden>Open the viewer</button> '
        f"<span>{escape(size)}: slices, 3D, masks</span></p><noscript><p class='hint'>{WITHOUT}</p></noscript>"
        f'<p class="hint said" role="status"></p><div class="stage" tabindex="0" hidden></div>'
        f"{told}{licence}{''.join(blocks)}"
        f'<script type="text/plain" class="code">{code}</script></div>'
    )


def _block(scene: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(scene, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" class="scene">{text}</script>'


@cache
def _code() -> str:
    """NiiVue, gzipped, in base 64."""
    content = _vendored(NIIVUE)
    assert hashlib.sha256(content).hexdigest() == NIIVUE_SHA256, "the vendored NiiVue was changed"
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _vendored(name: str) -> bytes:
    return resources.files("fewscan.deliver").joinpath(VENDOR, name).read_bytes()

"""What is written is read back by readers written here: places, units, names, colours, outward faces."""

import json
import struct
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
from shapes import ball, box

from fewscan.deliver.confidence import on_surface
from fewscan.deliver.mesh import surfaces
from fewscan.deliver.mesh_files import CORE, Item, write_3mf, write_glb, write_ply, write_stl
from fewscan.deliver.surface import Mesh
from fewscan.space.volume import Volume


def read_stl(path):
    raw = path.read_bytes()
    count = struct.unpack_from("<I", raw, 80)[0]
    assert len(raw) == 84 + 50 * count
    rows = np.frombuffer(raw, np.dtype([("n", "<f4", 3), ("p", "<f4", (3, 3)), ("x", "<u2")]), offset=84)
    return raw[:80].decode(), rows["n"], rows["p"]


def read_glb(path):
    raw = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", raw)
    assert (magic, version, length) == (b"glTF", 2, len(raw))
    size = struct.unpack_from("<I", raw, 12)[0]
    return json.loads(raw[20 : 20 + size]), raw[28 + size :]


def accessor(content, binary, number):
    found = content["accessors"][number]
    view = content["bufferViews"][found["bufferView"]]
    values = np.frombuffer(binary, {5126: "<f4", 5125: "<u4"}[found["componentType"]], offset=view["byteOffset"],
                           count=view["byteLength"] // 4)  # fmt: skip
    return values.reshape(found["count"], -1)


@pytest.mark.parametrize(("space", "first"), [("RAS", [1, 2, 3]), ("LPS", [-1, -2, 3])])
def test_stl_says_unit_and_space_and_faces_outwards(tmp_path, space, first):
    write_stl(box((10, 20, 30), at=(1, 2, 3)), tmp_path / "a.stl", space=space)
    header, normals, corners = read_stl(tmp_path / "a.stl")
    assert "unit mm" in header
    assert f"space {space}" in header
    nearest = corners.reshape(-1, 3)[np.abs(corners.reshape(-1, 3)).sum(1).argmin()]
    assert nearest.tolist() == first
    out = corners.mean(1) - corners.reshape(-1, 3).mean(0)
    assert (np.einsum("ij,ij->i", normals, out) > 0).all()
    assert Mesh(corners.reshape(-1, 3).astype(float), np.arange(36).reshape(12, 3)).volume_mm3 == pytest.approx(6000)


def test_3mf_holds_named_coloured_parts_in_millimetres(tmp_path):
    items = [
        Item(name='left "femur" <1>', mesh=box(), colour=(255, 16, 0)),
        Item(name="tibia", mesh=box(at=(20, 0, 0.125)), colour=(1, 2, 3)),
    ]
    write_3mf(items, tmp_path / "m.3mf", space="LPS")
    with zipfile.ZipFile(tmp_path / "m.3mf") as package:
        assert {"[Content_Types].xml", "_rels/.rels", "3D/3dmodel.model"} == set(package.namelist())
        model = ElementTree.fromstring(package.read("3D/3dmodel.model"))
    tag = "{" + CORE + "}"
    assert model.attrib["unit"] == "millimeter"
    assert [o.attrib["name"] for o in model.iter(f"{tag}object")] == ['left "femur" <1>', "tibia"]
    assert [b.attrib["displaycolor"] for b in model.iter(f"{tag}base")] == ["#FF1000FF", "#010203FF"]
    assert [i.attrib["objectid"] for i in model.iter(f"{tag}item")] == ["2", "3"]
    second = list(model.iter(f"{tag}object"))[1]
    assert min(float(v.attrib["x"]) for v in second.iter(f"{tag}vertex")) == -30
    assert len(list(second.iter(f"{tag}triangle"))) == 12
    assert "LPS" in next(m.text for m in model.iter(f"{tag}metadata") if m.attrib["name"] == "Description")
    before = (tmp_path / "m.3mf").read_bytes()
    write_3mf(items, tmp_path / "m.3mf", space="LPS")
    assert (tmp_path / "m.3mf").read_bytes() == before


def test_glb_is_in_metres_with_the_head_up_and_the_face_to_the_viewer(tmp_path):
    mesh = box((100, 200, 300))  # 100 mm to the right, 200 to the front, 300 to the head
    write_glb([Item(name="liver", mesh=mesh, colour=(255, 0, 0))], tmp_path / "m.glb")
    content, binary = read_glb(tmp_path / "m.glb")
    assert [node["name"] for node in content["nodes"]] == ["liver"]
    assert content["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] == [1, 0, 0, 1]
    part = content["meshes"][0]["primitives"][0]
    places = accessor(content, binary, part["attributes"]["POSITION"]).astype(float)
    np.testing.assert_allclose(places.min(0), [-0.1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(places.max(0), [0, 0.3, 0.2], atol=1e-6)
    faces = accessor(content, binary, part["indices"]).reshape(-1, 3).astype(np.int32)
    assert Mesh(places, faces).volume_mm3 == pytest.approx(0.006)
    lengths = np.linalg.norm(accessor(content, binary, part["attributes"]["NORMAL"]), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_confidence_is_high_where_probabilities_fall_sharply_and_painted(tmp_path):
    label = ball(radius_mm=8, side=24)
    mesh = surfaces(label)[0].mesh
    x = np.arange(24)[:, None, None]
    inside = label.data.astype(float)
    probs = np.where(x < 12, inside, 0.5)  # sure on one side, knows nothing on the other
    volume = Volume(np.stack([1 - probs, probs]) * 255, label.geometry, label.geometry, ("background", "ball"))
    volume = Volume(volume.data.astype(np.uint8), label.geometry, label.geometry, ("background", "ball"))
    sure = on_surface(mesh, volume, channel=1)
    assert sure[mesh.points[:, 0] < 9].min() > 0.8
    assert sure[mesh.points[:, 0] > 14].max() < 0.05
    item = Item(name="ball", mesh=mesh, colour=(1, 2, 3), confidence=sure)
    write_ply(item, tmp_path / "a.ply", space="RAS")
    head, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert b"comment fewscan, unit mm, space RAS" in head
    row = np.dtype([("p", "<f4", 3), ("c", "u1", 3), ("s", "<f4")])
    vertices = np.frombuffer(body, row, count=len(mesh.points))
    np.testing.assert_allclose(vertices["s"], sure, atol=1e-6)
    assert len(body) == len(mesh.points) * 19 + len(mesh.faces) * 13
    red, blue = vertices["c"][:, 0].astype(int), vertices["c"][:, 2].astype(int)
    assert (blue[sure > 0.9] > red[sure > 0.9]).all()
    assert (red[sure < 0.1] > blue[sure < 0.1]).all()
    write_glb([item], tmp_path / "m.glb")
    content, binary = read_glb(tmp_path / "m.glb")
    shades = accessor(content, binary, content["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"])
    np.testing.assert_allclose(shades * 255, vertices["c"], atol=1)

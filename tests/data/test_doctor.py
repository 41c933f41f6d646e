"""Each fault is found and named; `fix` repairs copies and leaves the originals alone."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantom import write_dataset
from rich.console import Console

from fewscan import api
from fewscan.data.dataset import find, load
from fewscan.data.doctor import Checkup, examine
from fewscan.data.repair import fix
from fewscan.data.sample import sample_path
from fewscan.errors import DataError
from fewscan.learn.request import Request
from fewscan.space.geometry import Geometry
from fewscan.tables import show_checkup


def check(root: Path) -> Checkup:
    return examine(find(root))


def codes(checkup: Checkup) -> set[tuple[str, str, str]]:
    return {(f.severity, f.code, f.case) for f in checkup.findings}


def digest(root: Path) -> dict[str, str]:
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def shifted(scans: Any, mm: float, **changes: Any) -> Geometry:
    affine = scans.geometry.affine.copy()
    affine[0, 3] += mm
    return Geometry(changes.get("shape", scans.shape), affine)


def contradict(path: Path) -> None:
    image = nib.load(path)
    image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine @ np.diag([-1, 1, 1, 1]), 1)
    nib.save(image, path)


def infect(scans: Any, path: str) -> None:
    data = scans.image(2).astype(np.float32)
    data[0, 0, 0], data[3, 3, 3] = np.nan, np.inf
    scans.write_image(path, data)


def test_good_data_has_no_findings(scans: Any) -> None:
    checkup = check(scans.pairs(3, unlabelled=1))
    assert (checkup.findings, checkup.usable) == ((), True)
    assert [(r.case, r.role) for r in checkup.rows][-1] == ("case_d", "unlabelled")
    assert checkup.rows[0].labels_ml["label 1"] == pytest.approx(
        (find(scans.root) and scans.label(0).sum()) * 2.4 / 1000
    )
    assert json.loads(json.dumps(checkup.to_json()))["usable"] is True


def test_the_embedded_sample_has_nothing_but_its_two_intensity_regimes() -> None:
    assert codes(check(sample_path())) == {("warning", "intensity-outlier", "")}


FAULTS: dict[str, tuple[Callable[[Any], object], tuple[str, str, str]]] = {
    "grid": (
        lambda s: s.write_label("labels/case_b.nii.gz", grid=shifted(s, 3)),
        ("error", "grid-differs", "case_b"),
    ),
    "nan": (lambda s: infect(s, "images/case_b.nii.gz"), ("error", "not-finite", "case_b")),
    "several": (
        lambda s: s.write_image("images/case_b.nii.gz", np.stack([s.image(), s.image(1)])),
        ("error", "several-volumes", "case_b"),
    ),
    "forms": (lambda s: contradict(s.root / "images/case_b.nii.gz"), ("error", "ambiguous-header", "case_b")),
    "truncated": (
        lambda s: (s.root / "images/case_b.nii.gz").write_bytes((s.root / "images/case_b.nii.gz").read_bytes()[:200]),
        ("error", "image-unreadable", "case_b"),
    ),
    "not whole": (
        lambda s: nib.save(
            nib.Nifti1Image(np.full(s.shape, 0.5, np.float32), s.geometry.affine), s.root / "labels/case_b.nii.gz"
        ),
        ("error", "label-unreadable", "case_b"),
    ),
    "not listed": (
        lambda s: s.write_label("labels/case_b.nii.gz", s.label(1, (1, 7))),
        ("error", "label-not-listed", "case_b"),
    ),
    "constant": (
        lambda s: s.write_image("images/case_b.nii.gz", np.ones(s.shape, np.int16)),
        ("error", "constant", "case_b"),
    ),
    "empty": (
        lambda s: s.write_label("labels/case_b.nii.gz", np.zeros(s.shape, np.uint16)),
        ("warning", "label-empty", "case_b"),
    ),
    "full": (
        lambda s: s.write_label("labels/case_b.nii.gz", np.ones(s.shape, np.uint16)),
        ("warning", "label-full", "case_b"),
    ),
    "duplicate": (
        lambda s: s.write_image("images/case_b.nii.gz", s.image(0)),
        ("warning", "duplicate-image", "case_b"),
    ),
    "leak": (lambda s: s.write_image("test/images/case_z.nii.gz", s.image(0)), ("error", "duplicate-image", "case_z")),
    "spacing": (
        lambda s: (
            s.write_image("images/case_b.nii.gz", seed=1, grid=Geometry(s.shape, np.diag([9.0, 1, 1, 1]))),
            s.write_label("labels/case_b.nii.gz", seed=1, grid=Geometry(s.shape, np.diag([9.0, 1, 1, 1]))),
        ),
        ("warning", "spacing-outlier", "case_b"),
    ),
    "intensity": (
        lambda s: s.write_image("images/case_b.nii.gz", s.image(1).astype(np.float32) * 1e4),
        ("warning", "intensity-outlier", "case_b"),
    ),
    "sparse": (
        lambda s: s.write_label("labels/case_b.nii.gz", s.label(1) * (np.arange(9) % 4 == 2).astype(np.uint16)),
        ("note", "blank-slices", "case_b"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(scans: Any, fault: str) -> None:
    scans.pairs(5)
    (scans.root / "labels.json").write_text('{"1": "organ"}')
    break_it, expected = FAULTS[fault]
    break_it(scans)
    checkup = check(scans.root)
    assert expected in codes(checkup), checkup.findings
    assert checkup.usable == (expected[0] != "error")
    assert all(f.message and f.remedy for f in checkup.findings)
    assert {f.case for f in checkup.findings} <= {"case_b", "case_z", ""}


def test_swapped_sides_are_an_error_when_the_other_cases_agree(scans: Any) -> None:
    scans.shape = (24, 10, 9)
    for index, case in enumerate("abcd"):
        label = np.zeros(scans.shape, np.uint16)
        label[2:6, 3 : 7 + index % 3, 2:7], label[16:20, 3:7, 2:7] = 1, 2
        label[2, 3, 2 + index] = 0
        scans.write_image(
            f"images/{case}.nii.gz", np.random.default_rng(index).integers(0, 99, scans.shape).astype("i2")
        )
        scans.write_label(f"labels/{case}.nii.gz", label[::-1] if case == "c" else label)
    (scans.root / "labels.json").write_text('{"1": "left kidney", "2": "right kidney"}')
    assert codes(check(scans.root)) == {("error", "left-right", "c")}
    (scans.root / "labels.json").write_text('{"1": "liver", "2": "spleen"}')
    assert codes(check(scans.root)) == {("warning", "left-right", "c")}
    (scans.root / "labels.json").write_text('{"1": "right kidney", "2": "left kidney"}')
    assert ("error", "left-right", "c") not in codes(check(scans.root))


def test_no_label_anywhere_is_a_warning(scans: Any) -> None:
    assert codes(check(scans.pairs(0, unlabelled=2))) == {("warning", "no-labels", "")}


@pytest.mark.parametrize("fault", ["grid", "nan", "forms", "not listed"])
def test_fix_repairs_a_copy_and_leaves_the_original(scans: Any, tmp_path_factory: Any, fault: str) -> None:
    scans.pairs(3)
    (scans.root / "labels.json").write_text('{"1": "organ"}')
    FAULTS[fault][0](scans)
    before, out = digest(scans.root), tmp_path_factory.mktemp("out") / "fixed"
    checkup = check(scans.root)
    changes = fix(checkup.dataset, checkup, out=out)
    assert digest(scans.root) == before
    assert {c.case for c in changes} == {"case_b"}
    assert all(c.source and c.what and c.why for c in changes)
    assert json.loads((out / "changes.json").read_text())[0]["case"] == "case_b"
    again = check(out)
    assert again.usable
    assert len(again.dataset.labelled) == 3
    for case in again.dataset.cases:
        load(case, again.dataset)


def test_a_label_on_a_finer_grid_lands_where_it_was(scans: Any, tmp_path_factory: Any) -> None:
    scans.pairs(2)
    fine = np.repeat(scans.label(1), 2, axis=0)
    affine = scans.geometry.affine @ np.diag([0.5, 1, 1, 1])
    affine[:3, 3] = scans.geometry.affine[:3, 3] - [0.25, 0, 0]
    scans.write_label("labels/case_b.nii.gz", fine, grid=Geometry(fine.shape, affine))
    checkup, out = check(scans.root), tmp_path_factory.mktemp("out") / "fixed"
    fix(checkup.dataset, checkup, out=out)
    fixed = find(out)
    label = load(fixed.cases[1], fixed).label
    assert label is not None
    np.testing.assert_array_equal(label.data, scans.label(1))


def test_what_cannot_be_repaired_is_left_out_and_said(scans: Any, tmp_path_factory: Any) -> None:
    scans.pairs(3)
    FAULTS["truncated"][0](scans)
    checkup, out = check(scans.root), tmp_path_factory.mktemp("out") / "fixed"
    changes = fix(checkup.dataset, checkup, out=out)
    assert [(c.case, c.what, c.written) for c in changes] == [("case_b", "left out", "")]
    assert [c.id for c in find(out).cases] == ["case_a", "case_c"]


def test_fix_never_writes_where_something_lies(scans: Any, tmp_path_factory: Any) -> None:
    checkup = check(scans.pairs(1))
    full = tmp_path_factory.mktemp("full")
    (full / "precious.txt").write_text("x")
    with pytest.raises(DataError, match="holds something already"):
        fix(checkup.dataset, checkup, out=full)
    with pytest.raises(DataError, match="lies inside the data"):
        fix(checkup.dataset, checkup, out=scans.root / "fixed")
    assert [p.name for p in full.iterdir()] == ["precious.txt"]


def test_nothing_is_left_behind_when_nothing_can_be_repaired(scans: Any, tmp_path_factory: Any) -> None:
    scans.pairs(1)
    (scans.root / "images/case_a.nii.gz").write_bytes(b"broken")
    checkup, parent = check(scans.root), tmp_path_factory.mktemp("out")
    with pytest.raises(DataError, match="no case could be repaired"):
        fix(checkup.dataset, checkup, out=parent / "fixed")
    assert list(parent.iterdir()) == []


def test_the_copy_says_nothing_of_cases_left_out_and_can_be_read(scans: Any, tmp_path_factory: Any) -> None:
    scans.pairs(3)
    scans.write_label("labels/case_b.nii.gz", scans.label(1, (1, 2)))
    scans.write_image("images/case_b.nii.gz", np.full(scans.shape, 7, np.int16))
    (scans.root / "drawn.json").write_text('{"case_a": ["label 1", "label 2"], "case_b": ["label 1"]}')
    checkup, out = check(scans.root), tmp_path_factory.mktemp("out") / "fixed"
    fix(checkup.dataset, checkup, out=out)
    assert json.loads((out / "drawn.json").read_text()) == {"case_a": ["label 1"]}
    assert [c.id for c in find(out).cases] == ["case_a", "case_c"]


def test_a_fault_of_a_held_out_case_spares_the_case_of_the_same_name(scans: Any, tmp_path_factory: Any) -> None:
    scans.pairs(2)
    scans.write_image("test/images/case_a.nii.gz", np.full(scans.shape, 7, np.int16))
    checkup, out = check(scans.root), tmp_path_factory.mktemp("out") / "fixed"
    fix(checkup.dataset, checkup, out=out)
    fixed = find(out)
    assert ([c.id for c in fixed.cases], fixed.test) == (["case_a", "case_b"], ())


def test_a_copy_of_several_channels_is_read_as_it_was(scans: Any, tmp_path_factory: Any) -> None:
    for case in "abc":
        for channel in range(2):
            scans.write_image(f"images/{case}_{channel:04d}.nii.gz", seed=channel + 2 * ord(case))
    scans.write_label("labels/a.nii.gz")
    checkup, out = check(scans.root), tmp_path_factory.mktemp("out") / "fixed"
    fix(checkup.dataset, checkup, out=out)
    assert [(c.id, len(c.images)) for c in find(out).cases] == [("a", 2), ("b", 2), ("c", 2)]


def test_faults_of_held_out_scans_hinder_no_training_but_a_leak_does(scans: Any, tmp_path_factory: Any) -> None:
    scans.pairs(2)
    scans.write_image("test/images/t1.nii.gz", seed=5)
    scans.write_label("test/labels/t1.nii.gz", seed=5, grid=shifted(scans, 3))
    (scans.root / "test/images/t2.nii.gz").write_bytes((scans.root / "images/case_a.nii.gz").read_bytes()[:-200])
    checkup = check(scans.root)
    assert codes(checkup) == {("warning", "grid-differs", "t1"), ("warning", "image-unreadable", "t2")}
    assert checkup.usable
    out = tmp_path_factory.mktemp("copy") / "fixed"
    changes = fix(checkup.dataset, checkup, out=out)
    assert {(c.case, c.what) for c in changes} >= {("t2", "left out")}
    assert codes(check(out)) == set(), "held-out scans are repaired like others"
    scans.write_image("test/images/t2.nii.gz", seed=0)
    checkup = check(scans.root)
    assert ("error", "duplicate-image", "t2") in codes(checkup)
    assert not checkup.usable


def test_sides_that_are_swapped_in_a_held_out_case_are_a_warning(scans: Any) -> None:
    scans.shape = (24, 10, 9)
    scans.pairs(3)
    (scans.root / "labels.json").write_text(json.dumps({"1": "left knee", "2": "right knee"}))
    for case, (one, other) in (("a", (1, 2)), ("b", (1, 2)), ("c", (1, 2)), ("t", (2, 1))):
        label = np.zeros(scans.shape, np.uint16)
        label[2:8, 2:7, 2:7], label[14:20, 2:7, 2:7] = one, other
        scans.write_label(f"{'test/' if case == 't' else ''}labels/case_{case}.nii.gz", label)
    scans.write_image("test/images/case_t.nii.gz", seed=7)
    checkup = check(scans.root)
    assert ("warning", "left-right", "case_t") in codes(checkup)
    assert checkup.usable


def test_a_label_map_that_belongs_to_no_image_is_named(scans: Any) -> None:
    scans.pairs(2)
    (scans.root / "labels/case_b.nii.gz").rename(scans.root / "labels/kase_b.nii.gz")
    [found] = check(scans.root).findings
    assert (found.severity, found.code, found.path) == (
        "warning",
        "label-unmatched",
        str(scans.root / "labels/kase_b.nii.gz"),
    )
    assert f"{found.message}; {found.remedy}".startswith(
        "label map kase_b.nii.gz belongs to no image; rename it like one"
    )


@pytest.mark.parametrize("fault", ["nan", "several", "forms", "truncated", "constant"])
def test_a_faulty_unlabelled_scan_is_left_out_and_costs_the_others_nothing(
    scans: Any, tmp_path_factory: Any, fault: str
) -> None:
    scans.pairs(3)
    (scans.root / "labels/case_b.nii.gz").unlink()
    break_it, (_, code, _) = FAULTS[fault]
    break_it(scans)
    checkup = check(scans.root)
    assert codes(checkup) == {("warning", code, "case_b")}
    assert checkup.usable
    assert "training leaves this unlabelled scan out" in checkup.findings[0].remedy
    assert [case.id for case in checkup.sound.cases] == ["case_a", "case_c"]
    out = tmp_path_factory.mktemp("copy") / "fixed"
    fix(checkup.dataset, checkup, out=out)
    again = find(out)
    assert len(again.labelled) == 2
    assert len(again.unlabelled) == (code in ("not-finite", "ambiguous-header")), "what can be repaired is"


def test_training_leaves_a_faulty_unlabelled_scan_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=2)
    said: list[str] = []
    asked: list[Request] = []

    def method(request: Request) -> Any:
        asked.append(request)
        raise DataError("far enough")

    def heard(event: Any) -> None:
        said.extend([event] if isinstance(event, str) else [])

    def trained(**how: Any) -> tuple[str, int]:
        with pytest.raises(DataError, match="far enough"):
            api.train(
                data,
                tmp_path / "model",
                device="cpu",
                observe=lambda s: said.append(s) if isinstance(s, str) else None,
                **how,
            )
        return asked[-1].method, len(asked[-1].dataset.cases)

    for name in ("segment", "joint"):
        monkeypatch.setitem(api.METHODS, name, method)
    assert (trained(), said) == (("joint", 3), [])
    one, other = (case.images[0] for case in find(data).unlabelled)
    one.write_bytes(one.read_bytes()[:200])
    assert trained() == trained(dry_run=True) == ("joint", 2)
    assert said == [f"warning: {one} is left out, as `fewscan check` says"] * 2
    other.write_bytes(b"broken")
    assert trained() == ("segment", 1), "nothing is left to learn jointly from"


def test_without_a_label_check_says_that_training_would_refuse_and_how_to_name_one(scans: Any) -> None:
    for case in ("p1", "p1 contour"):
        scans.write_image(f"{case}.nii.gz")
    checkup = check(scans.root)
    screen = Console(file=io.StringIO(), width=500)
    show_checkup(checkup.to_json(), screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "No labelled case: training would refuse this." in shown
    assert "Nothing stands in the way" not in shown
    assert "NAME_seg.nii.gz beside its scan NAME.nii.gz, or like the scan, in labels/" in shown
    assert "seen were p1.nii.gz, p1 contour.nii.gz" in shown
    with pytest.raises(DataError, match=r"no labelled case to learn from; a label map is called NAME_seg\.nii\.gz"):
        api.train(scans.root, scans.root.with_name("model"), steps=1, device="cpu", method="segment")

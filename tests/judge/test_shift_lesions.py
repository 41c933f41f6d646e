"""The shift card where there are lesions: who is compared, what too few can tell, what reaches the advice."""

from dataclasses import replace

import numpy as np
import pytest
from phantom import phantom, write_dataset

from fewscan import api, shifting, surroundings
from fewscan.data import dataset as datasets
from fewscan.data.io import write_labelmap
from fewscan.deliver import card
from fewscan.errors import DataError
from fewscan.learn.hardware import pick
from fewscan.shifting import shift as make_card
from fewscan.space.volume import Volume


def card_of(model, source, target):
    return shifting._Card(model, source, target, {}, pick("cpu"), 0, None, 0.0)


def lesioned(root, *, source, target):
    """Two data sets and masks of all cases of the second: (source, target, folder of masks)."""
    old, new = (api.open(write_dataset(root / n, labelled=k)) for n, k in (("source", source), ("target", target)))
    (root / "masks").mkdir()
    for case in new.cases:
        write_mask(root / "masks" / f"{case.id}.nii.gz")
    return old, new, root / "masks"


def write_mask(path, *, voxels=True):
    geometry = phantom(0)[2]
    lesion = np.zeros(geometry.shape, np.uint8)
    lesion[14:18, 4:8, 6:10] = voxels
    write_labelmap(lesion, path, native=geometry)


@pytest.mark.parametrize(("source", "healthy"), [(3, 1), (9, 5)])
def test_every_spare_healthy_scan_is_a_control_and_too_few_are_said(untrained, tmp_path, monkeypatch, source, healthy):
    old, new, masks = lesioned(tmp_path, source=source, target=3)
    excesses = iter([1.0, 1.1, 1.2, np.nan, 0.1, 0.2, 0.1, 0.2, 0.1])  # three ill, then healthy; one beside no tissue

    def around(image, lesion, *, templates):
        assert (lesion.shape, lesion.any()) == (image.geometry.shape, True)
        rest = dict.fromkeys(("volume change", "volume change, far", "displacement_mm", "turned_deg"), 0.1)
        return rest | {"excess": next(excesses)}

    monkeypatch.setattr(shifting, "deformation_around", around)
    work = replace(card_of(untrained, old, new), lesions=shifting._masks(masks, new))
    found = shifting._lesions(work, {})
    assert len(found["control"]) == (3 if source == 3 else 6)  # as many as lesions, or all that are spare of eight
    assert (found["patients"], found["tellable"], found["deformed"]) == ([healthy, 3], source == 9, source == 9)
    assert ["tissue around it may be deformed" in row["why"] for row in found["cases"].values()] == [source == 9] * 3
    said = card._caveats({"lesion": found})
    told = "Around lesions of 3 patients, beside the same places of 1 patient without, chance explains any deformation"
    assert (said[:1] and told in said[0]) if source == 3 else said == []


def test_templates_are_of_two_people_and_no_control_is_of_them(untrained, tmp_path, monkeypatch):
    old, new, masks = lesioned(tmp_path, source=9, target=3)
    old = replace(old, cases=tuple(replace(c, patient=p) for c, p in zip(old.cases, "aaaabbbcd", strict=True)))
    whose = {float(datasets.load(case, old).image.data.sum()): case.patient for case in old.cases}
    guides = []
    monkeypatch.setattr(shifting, "placed", lambda *a: None)
    monkeypatch.setattr(shifting, "deformation_around", lambda i, _, templates: guides.append(templates) or {})
    for seed in range(4):
        work = replace(card_of(untrained, old, new), lesions=shifting._masks(masks, new), seed=seed)
        found = shifting._around(work)
        people = {whose[float(template.data.sum())] for template in guides[-1]}
        assert len(people) == 2
        assert set(found.patients[0]) == set("abcd") - people


@pytest.mark.parametrize(("people", "said"), [(1, "1 patient;"), (2, "2 patients;")])
def test_too_few_healthy_people_cost_the_deformation_and_not_the_card(untrained, tmp_path, people, said):
    old, new, masks = lesioned(tmp_path, source=people, target=3)
    record = make_card(untrained, old, new, tmp_path / "card.html", lesions=masks)
    lesion = record["lesion"]
    assert (lesion["tellable"], lesion["deformed"], lesion["registered"]) == (False, False, 0)
    assert sorted(lesion["cases"]) == ["case_00", "case_01", "case_02"]
    assert all(row["pushed_mm"] for row in lesion["cases"].values())
    lines = card.lines(record)
    assert f"The source has {said} to tell whether tissue around lesions is deformed takes at least 3" in " ".join(
        lines
    )
    assert "rule of thumb; fewscan transfer measures it" in lines[-1]
    assert lines[-1] in (tmp_path / "card.html").read_text()


def test_a_peak_that_one_protocol_never_shows_costs_no_registration():
    """The third peak is zero everywhere in the scan with the lesion, and not in the healthy one."""

    def peaks(seed, *, third):
        image, _, geometry = phantom(seed, shape=(14, 14, 14), spacing=(3.0, 3.0, 3.0))
        data = np.zeros((9, *image.shape), np.float32)
        data[0], data[4], data[8] = image / 100, image / 200, third * image / 400
        return Volume(data, geometry, geometry, tuple(f"c{i}" for i in range(9)), "peaks")

    lesion = np.zeros((14, 14, 14), bool)
    lesion[2:4, 2:4, 2:4] = True
    found = surroundings.deformation_around(peaks(0, third=0), lesion, templates=[peaks(1, third=1)])
    assert np.isfinite(list(found.values())).all()


def test_masks_that_tell_nothing_are_listed_and_two_of_one_case_refused(untrained, tmp_path, monkeypatch):
    old, new, masks = lesioned(tmp_path, source=3, target=3)
    write_mask(masks / "case_01.nii.gz", voxels=False)
    write_mask(masks / "case_0O.nii.gz")  # mistyped
    (masks / "notes.txt").write_text("no mask")
    rest = dict.fromkeys(("volume change", "volume change, far", "excess", "displacement_mm", "turned_deg"), 0.1)
    monkeypatch.setattr(shifting, "deformation_around", lambda *a, **k: rest)
    record = make_card(untrained, old, new, tmp_path / "card.html", lesions=masks)
    assert (record["lesion"]["unused"], record["lesion"]["empty"]) == (["case_0O.nii.gz"], ["case_01"])
    assert sorted(record["lesion"]["cases"]) == ["case_00", "case_02"]
    page = (tmp_path / "card.html").read_text()
    for said in ("the target were not used: case_0O.nii.gz.", "taken for no lesion: case_01."):
        assert said in page
        assert said in " ".join(card.lines(record))
    write_mask(masks / "case_02_seg.nii.gz")
    with pytest.raises(DataError, match=r"case_02_seg\.nii\.gz: case_02\.nii\.gz is a mask of case_02 too; leave one"):
        shifting._masks(masks, new)


def test_pushed_structures_reach_the_advice(untrained, tmp_path, monkeypatch):
    old, new, masks = lesioned(tmp_path, source=3, target=3)
    rest = dict.fromkeys(("volume change", "volume change, far", "excess", "displacement_mm", "turned_deg"), 0.1)
    monkeypatch.setattr(shifting, "deformation_around", lambda *a, **k: rest)
    away = {"distance_mm": {}, "dice_near": np.nan, "dice_far": np.nan}
    pushed = iter([{"ball": 2.0, "rod": np.nan}, {"ball": 5.0, "rod": 1.0}, {"ball": 3.5, "rod": 1.0}])
    monkeypatch.setattr(shifting, "structures", lambda *a, **k: away | {"pushed_mm": next(pushed)})
    record = make_card(untrained, old, new, tmp_path / "card.html", lesions=masks)
    assert record["lesion"]["pushed_mm"] == {"ball": 5.0, "rod": 1.0}
    assert "around lesions ball may be pushed by up to 5 mm; case_01 and case_02 need a human." in record["advice"]

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewscan import api
from fewscan.data import io
from fewscan.errors import DataError, GeometryError
from fewscan.judge.evaluate import compare, evaluate, merge
from fewscan.judge.metrics import METRICS, Score
from fewscan.judge.pairing import case_id
from fewscan.judge.results import CaseScore, Evaluation, read_evaluation
from fewscan.space.geometry import Geometry

GRID = Geometry((10, 9, 8), np.diag([1.0, 1.0, 2.0, 1.0]))


def anatomy(shift=0):
    data = np.zeros(GRID.shape, np.uint8)
    data[2 + shift : 5 + shift, 2:6, 2:6] = 1
    data[5 + shift : 8 + shift, 2:6, 2:6] = 2
    return data


@pytest.fixture
def folders(tmp_path):
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    predictions.mkdir()
    labels.mkdir()
    for i, shift in enumerate([0, 1, 2, 0]):
        io.write_labelmap(anatomy(), labels / f"case_{i}.nii.gz", native=GRID)
        io.write_labelmap(anatomy(shift), predictions / f"case_{i}.nii.gz", native=GRID)
    (tmp_path / "labels.json").write_text('{"1": "front", "2": "back"}')
    return predictions, labels


def test_worst_and_best_case_and_label_names_are_found(folders):
    found = evaluate(*folders)
    summary = found.to_json()["summary"]
    assert found.names == ("front", "back")
    assert summary["worst"] == "case_2"
    assert summary["best"] in {"case_0", "case_3"}
    assert found.values("dice") == pytest.approx([1, 2 / 3, 1 / 3, 1])
    assert summary["dice"]["mean"] == pytest.approx(0.75)
    assert summary["dice"]["low"] < 0.75 < summary["dice"]["high"]
    assert summary["hd95_mm"]["mean"] == pytest.approx(0.75)


def test_saving_and_reading_changes_nothing_and_the_file_is_strict_json(folders, tmp_path):
    found = evaluate(*folders, names={1: "front", 2: "back", 9: "never there"})
    found.save(tmp_path / "evaluation.json")
    content = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda s: pytest.fail(s))
    assert content["cases"][0]["labels"]["never there"]["dice"] is None
    assert set(METRICS) < content["summary"].keys()
    assert content["rules"]["absent"]
    assert read_evaluation(tmp_path / "evaluation.json").to_json(root=tmp_path) == content


def test_one_series_of_a_mixed_folder_is_found_again(folders, tmp_path):
    found = evaluate(*folders)
    series = tmp_path / "scans" / "p1@4"
    series.with_name("p1").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    cases = tuple(replace(case, image=series) for case in found.cases)
    replace(found, cases=cases).save(tmp_path / "run" / "evaluation.json")
    assert read_evaluation(tmp_path / "run" / "evaluation.json").cases[0].image == series


def test_an_evaluation_that_travels_names_no_folder_and_one_that_stays_finds_its_files(folders, tmp_path):
    predictions, labels = folders
    (tmp_path / "run").mkdir()
    predictions = predictions.rename(tmp_path / "run" / "predictions")
    path = tmp_path / "run" / "evaluation.json"
    evaluate(predictions, labels).save(path)
    content = json.loads(path.read_text())
    assert str(tmp_path) not in path.read_text()
    assert content["cases"][0]["prediction"] == "predictions/case_0.nii.gz"
    assert content["cases"][0]["reference"] == "case_0.nii.gz"
    assert read_evaluation(path).cases[0].reference == labels / "case_0.nii.gz"
    assert "never hand this file on" in (tmp_path / "run" / "files.local.json").read_text()
    (tmp_path / "run" / "files.local.json").unlink()
    assert read_evaluation(path).cases[0].reference == Path("case_0.nii.gz")
    assert read_evaluation(path).cases[0].prediction == predictions / "case_0.nii.gz"


def test_two_evaluations_in_one_folder_keep_their_files_apart(folders, tmp_path):
    predictions, labels = folders
    (tmp_path / "out").mkdir()
    evaluate(predictions, labels).save(tmp_path / "out" / "before.json")
    evaluate(labels, labels).save(tmp_path / "out" / "after.json")
    assert read_evaluation(tmp_path / "out" / "before.json").cases[0].prediction.parent == predictions
    assert read_evaluation(tmp_path / "out" / "after.json").cases[0].prediction.parent == labels


def test_slices_left_blank_in_a_reference_are_not_judged(tmp_path):
    grid = Geometry((10, 9, 13), np.eye(4))
    whole = np.zeros(grid.shape, np.uint8)
    whole[2:8, 2:7] = 1
    sparse = np.zeros_like(whole)
    sparse[..., ::4] = whole[..., ::4]
    io.write_labelmap(whole, tmp_path / "p.nii.gz", native=grid)
    io.write_labelmap(sparse, tmp_path / "r.nii.gz", native=grid)
    assert evaluate(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz").values("dice") == [1.0]


def test_scans_beside_their_label_maps_are_no_references(tmp_path):
    out, scans = tmp_path / "out", tmp_path / "scans"
    out.mkdir()
    scans.mkdir()
    for case in ("a", "b"):
        io.write_labelmap(anatomy(), out / f"{case}.nii.gz", native=GRID)
        io.write_image(500 * anatomy().astype(np.int16), scans / f"{case}.nii.gz", native=GRID)
    io.write_labelmap(anatomy(1), scans / "a_seg.nii.gz", native=GRID)
    found = evaluate(out, scans)
    assert [case.reference.name for case in found.cases] == ["a_seg.nii.gz"]
    assert found.unmatched == {"predictions": ("b",), "references": ()}


def test_names_and_the_ignore_value_are_found_two_folders_up(folders, tmp_path):
    predictions, labels = folders
    (tmp_path / "labels.json").write_text('{"1": "front", "2": "ignore"}')
    (tmp_path / "test").mkdir()
    found = evaluate(predictions, labels.rename(tmp_path / "test" / "labels"))
    assert found.names == ("front",)
    assert {case.ignore for case in found.cases} == {2}


def test_only_the_names_given_are_judged(folders):
    assert evaluate(*folders, names={2: "back"}).names == ("back",)


def test_intervals_and_comparisons_are_over_patients(folders):
    predictions, labels = folders
    for folder in folders:
        for i, name in enumerate(["p1_L", "p1_R", "p2_ED", "p2_ES"]):
            (folder / f"case_{i}.nii.gz").rename(folder / f"{name}.nii.gz")
    found = evaluate(predictions, labels)
    assert found.spread("dice")["n"] == 4
    assert math.isnan(found.spread("dice")["low"])
    against = compare(evaluate(labels, labels), found).metrics["dice"]
    assert (against.n, against.wins) == (2, 2)
    assert against.difference == pytest.approx(0.25)


def test_a_prediction_in_another_axis_order_scores_the_same(folders):
    predictions, labels = folders
    before = evaluate(predictions, labels).to_json()
    flipped = GRID.affine.copy()
    flipped[0, 0], flipped[0, 3] = -1, GRID.shape[0] - 1
    for i, shift in enumerate([0, 1, 2, 0]):
        path = predictions / f"case_{i}.nii.gz"
        io.write_labelmap(anatomy(shift), path, native=Geometry(GRID.shape, flipped))
    assert evaluate(predictions, labels).to_json() == before


def test_what_has_no_partner_is_listed(folders):
    predictions, labels = folders
    (labels / "case_3.nii.gz").unlink()
    (predictions / "case_0.nii.gz").unlink()
    found = evaluate(predictions, labels)
    assert found.unmatched == {"predictions": ("case_3",), "references": ("case_0",)}
    assert [case.id for case in found.cases] == ["case_1", "case_2"]


def test_endings_and_formats_may_differ_and_probabilities_are_no_predictions(folders):
    predictions, labels = folders
    (predictions / "case_0.nii.gz").rename(predictions / "case_0_0000.nii.gz")
    (labels / "case_1.nii.gz").rename(labels / "case_1_seg.nii.gz")
    io.write_labelmap(anatomy(2), predictions / "case_2.nrrd", native=GRID)
    (predictions / "case_2.nii.gz").unlink()
    (predictions / "case_3.nii.gz").rename(predictions / "case_3_probabilities.nii.gz")
    found = evaluate(predictions, labels)
    assert found.values("dice") == pytest.approx([1, 2 / 3, 1 / 3])
    assert [case.id for case in found.cases] == ["case_0", "case_1", "case_2"]
    assert found.unmatched == {"predictions": (), "references": ("case_3",)}


def test_ids_that_look_like_channels_stay_apart(folders):
    predictions, labels = folders
    for folder in folders:
        for i in range(4):
            (folder / f"case_{i}.nii.gz").rename(folder / f"case_{i:04d}.nii.gz")
    assert [case.id for case in evaluate(predictions, labels).cases] == [f"case_{i:04d}" for i in range(4)]


def test_two_predictions_of_one_case_are_refused(folders):
    predictions, labels = folders
    io.write_labelmap(anatomy(), predictions / "case_0_seg.nii.gz", native=GRID)
    with pytest.raises(DataError, match=r"case_0\.nii\.gz already belongs to"):
        evaluate(predictions, labels)


def test_the_listed_ignore_value_is_not_judged(folders):
    predictions, labels = folders
    (labels.parent / "labels.json").write_text('{"1": "front", "2": "back", "9": "ignore"}')
    for i, shift in enumerate([0, 1, 2, 0]):
        label = np.where(anatomy() == anatomy(shift), anatomy(), 9).astype(np.uint8)
        io.write_labelmap(label, labels / f"case_{i}.nii.gz", native=GRID)
    assert evaluate(predictions, labels).values("dice") == pytest.approx([1, 1, 1, 1])


def test_two_files_are_compared_whatever_their_names(folders):
    predictions, labels = folders
    found = evaluate(predictions / "case_1.nii.gz", labels / "case_0.nii.gz")
    assert found.values("dice") == pytest.approx([2 / 3])
    assert math.isnan(read_json_number(found.to_json()["summary"]["dice"]["low"]))


def read_json_number(value):
    return math.nan if value is None else value


def test_nothing_to_compare_and_moved_grids_are_refused(folders, tmp_path):
    predictions, labels = folders
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of its 0 predictions"):
        evaluate(tmp_path / "empty", labels)
    with pytest.raises(DataError, match="does not exist"):
        evaluate(tmp_path / "nowhere", labels)
    moved = GRID.affine.copy()
    moved[:3, 3] = 5
    io.write_labelmap(anatomy(), predictions / "case_1.nii.gz", native=Geometry(GRID.shape, moved))
    with pytest.raises(GeometryError, match=r"case_1\.nii\.gz.*resample"):
        evaluate(predictions, labels)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("case_{}/image.nii.gz", "case_{}/seg.nii.gz"),
        ("images/case_{}.nii.gz", "labels/case_{}.nii.gz"),
        ("imagesTs/case_{}_0000.nii.gz", "labelsTs/case_{}.nii.gz"),
        (None, "manual/case_{}/anat/case_{}_dseg.nii.gz"),
        (None, "manual/case_{}/seg.nii.gz"),
    ],
)
def test_references_may_lie_in_any_layout(folders, tmp_path, image, label):
    predictions, data = folders[0], tmp_path / "data"
    (data / "imagesTr").mkdir(parents=True) if image and "Ts" in image else data.mkdir()
    for i in range(2):
        if image:
            io.write_image(anatomy()[None].astype(np.float32), data / image.format(i), native=GRID)
        io.write_labelmap(anatomy(), data / label.format(i, i), native=GRID)
    found = evaluate(predictions, data)
    assert found.values("dice") == pytest.approx([1, 2 / 3])
    assert [case.id for case in found.cases] == ["case_0", "case_1"]
    assert found.unmatched == {"predictions": ("case_2", "case_3"), "references": ()}
    assert [case.image for case in found.cases] == [image and data / image.format(i) for i in range(2)]


def test_files_that_hide_among_references_are_none(folders, tmp_path):
    for i in range(2):
        io.write_labelmap(anatomy(), tmp_path / "data" / f"case_{i}" / "seg.nii.gz", native=GRID)
        (tmp_path / "data" / f"case_{i}" / "._seg.nii.gz").write_bytes(b"of another system")
    assert [case.id for case in evaluate(folders[0], tmp_path / "data").cases] == ["case_0", "case_1"]


def test_references_of_bids_are_called_as_its_table_says(folders, tmp_path):
    data, scan = tmp_path / "data", "sub-01/anat/sub-01_T2w.nii.gz"
    io.write_image(anatomy()[None].astype(np.float32), data / scan, native=GRID)
    io.write_labelmap(anatomy(), data / "derivatives/hand/sub-01/sub-01_T2w_dseg.nii.gz", native=GRID)
    (data / "dseg.tsv").write_text("index\tname\n1\tmedial\n2\tlateral\n")
    (folders[0] / "case_1.nii.gz").rename(tmp_path / "sub-01.nii.gz")
    (tmp_path / "labels.json").unlink()
    found = evaluate(tmp_path / "sub-01.nii.gz", data)
    assert (found.names, found.cases[0].id) == (("medial", "lateral"), "sub-01")
    assert found.values("dice") == pytest.approx([2 / 3])


def test_references_of_held_out_scans_count_too(folders, tmp_path):
    data = tmp_path / "data"
    for i, place in enumerate(("", "test/")):
        io.write_image(anatomy()[None].astype(np.float32), data / f"{place}case_{i}.nii.gz", native=GRID)
        io.write_labelmap(anatomy(), data / f"{place}case_{i}_seg.nii.gz", native=GRID)
    assert evaluate(folders[0], data).values("dice") == pytest.approx([1, 2 / 3])
    (folders[1] / "test").mkdir()
    assert len(evaluate(*folders).cases) == 4, "label maps alone stay what they are"


def test_of_two_references_of_a_case_none_is_chosen(folders, tmp_path):
    for name in ("a/case_0_seg", "b/case_0_seg"):
        io.write_labelmap(anatomy(), tmp_path / "data" / f"{name}.nii.gz", native=GRID)
    with pytest.raises(DataError, match=r"b.case_0_seg\.nii\.gz and .*a.case_0_seg\.nii\.gz may both be the label map"):
        evaluate(folders[0], tmp_path / "data")


def test_two_runs_are_compared_on_shared_cases(folders):
    predictions, labels = folders
    better, worse = evaluate(labels, labels), evaluate(predictions, labels)
    (predictions / "case_3.nii.gz").unlink()
    found = compare(better, worse)
    assert found.metrics["dice"].difference == pytest.approx(0.25)
    assert (found.metrics["dice"].wins, found.metrics["dice"].losses) == (2, 0)
    assert set(found.labels) == {"front", "back"}
    assert compare(better, evaluate(predictions, labels)).only_a == ("case_3",)
    json.dumps(found.to_json(), allow_nan=False)


def run_of(**cases):
    """An evaluation whose cases hold these scores by label."""
    files = {"prediction": Path("p"), "reference": Path("r"), "tolerance_mm": 1.0}
    return Evaluation(cases=tuple(CaseScore(id=name, labels=labels, **files) for name, labels in cases.items()))


def scored(distance):
    return Score(status="scored", dice=0.9, surface_dice=0.9, hd95_mm=distance, assd_mm=distance, volume_error=0.1)


def test_a_run_that_misses_a_label_is_not_better_for_the_distance_that_it_lacks():
    missed = Score(status="missed", dice=0.0, surface_dice=0.0, volume_error=1.0)
    a = run_of(**{f"p{i}": {"big": scored(2.0), "small": missed} for i in range(8)})
    b = run_of(**{f"p{i}": {"big": scored(2.0), "small": scored(20.0)} for i in range(8)})
    found = compare(a, b).metrics
    assert (found["hd95_mm"].difference, found["hd95_mm"].n, found["hd95_mm"].p) == (0, 8, 1.0)
    assert found["dice"].difference == pytest.approx(-0.45)
    assert found["dice"].losses == 8


def test_a_label_that_is_rightly_left_out_wins_against_a_false_positive():
    extra, absent = Score(status="extra", dice=0.0, surface_dice=0.0), Score(status="absent")
    a = run_of(**{f"p{i}": {"tumour": extra if i < 6 else scored(1.0)} for i in range(9)})
    b = run_of(**{f"p{i}": {"tumour": absent if i < 6 else scored(1.0)} for i in range(9)})
    for found in (compare(a, b), compare(b, a)):
        for row in (found.metrics["dice"], found.metrics["surface_dice"], found.labels["tumour"]):
            assert (row.n, row.wins + row.losses, abs(row.difference)) == (9, 6, pytest.approx(6 / 9))
        assert found.metrics["hd95_mm"].n == 3
    assert compare(a, b).metrics["dice"].losses == 6
    assert compare(b, b).metrics["dice"].n == 3  # what is absent in both tells nothing


def test_labels_that_only_one_run_judged_enter_no_mean():
    a = run_of(**{f"p{i}": {"big": scored(2.0), "more": Score(status="missed", dice=0.0)} for i in range(3)})
    found = compare(a, run_of(**{f"p{i}": {"big": scored(2.0)} for i in range(3)}))
    assert found.metrics["dice"].difference == 0
    assert set(found.labels) == {"big"}


def test_labels_that_both_sides_name_and_number_otherwise_are_refused(folders):
    predictions, labels = folders
    with pytest.raises(
        DataError, match=r"labels: numbers its labels otherwise than .*front is 1, not 2, back is 2, not"
    ):
        evaluate(predictions, labels, known={1: "Back", 2: "front"})
    for known in ({1: "Front", 2: "back"}, {1: "avant", 2: "arrière"}, {}):
        assert evaluate(predictions, labels, known=known).names == ("front", "back")


def test_two_references_of_one_name_are_refused(folders):
    predictions, labels = folders
    io.write_labelmap(anatomy(2), labels / "case_2.nrrd", native=GRID)
    with pytest.raises(DataError, match=r"case_2\.nrrd: case_2\.nii\.gz has the same name in another format"):
        evaluate(predictions, labels)


def test_runs_without_a_common_case_are_refused_by_file_and_case(folders, tmp_path):
    _, labels = folders
    files = [tmp_path / f"{name}.json" for name in ("first", "second")]
    for file, case in zip(files, ("case_0", "case_1"), strict=True):
        scored = evaluate(labels, labels)
        replace(scored, cases=tuple(one for one in scored.cases if one.id == case)).save(file)
    said = r"first\.json and .*second\.json: the two runs share no case: the first judged case_0, the second case_1"
    with pytest.raises(DataError, match=said):
        api.compare(*files)


def test_folds_merge_into_one_evaluation_without_a_case_twice(folders):
    predictions, labels = folders
    whole, whole_names = evaluate(predictions, labels), {1: "front", 2: "back"}
    parts = [
        evaluate(predictions / f"case_{i}.nii.gz", labels / f"case_{i}.nii.gz", names=whole_names) for i in range(4)
    ]
    assert merge(parts).to_json()["summary"] == whole.to_json()["summary"]
    with pytest.raises(DataError, match="case_0 was judged twice"):
        merge([parts[0], parts[0]])


def test_read_evaluation_refuses_other_files(tmp_path):
    (tmp_path / "x.json").write_text('{"cases": 3}')
    with pytest.raises(DataError, match=r"x\.json: not an evaluation"):
        read_evaluation(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b_0000.nii.gz", "a.b"),
        ("sub-1_dseg.nii.gz", "sub-1"),
        ("p_labels.nrrd", "p"),
        ("p_01.mha", "p_01"),
        ("seg.nii", "seg"),
    ],
)
def test_case_id_drops_format_and_ending(name, expected):
    assert case_id(Path(name)) == expected

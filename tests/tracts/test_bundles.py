"""Bundles: figures of known masks, stated absences, streamlines as masks, TractSeg's layout."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from fewscan import cli, white_matter
from fewscan.data.bundles import ENDINGS, SEGMENTATIONS, bundle_files, read_bundle, write_bundles
from fewscan.data.io import write_image
from fewscan.deliver.verdict import remarks
from fewscan.errors import ConfigError, DataError, GeometryError
from fewscan.judge.metrics import Score
from fewscan.judge.results import read_evaluation
from fewscan.space.geometry import Geometry, ras_geometry
from fewscan.tables import bundle_scores
from fewscan.tracts import streamlines
from fewscan.tracts.bundles import (
    EVALUATION,
    RECORD,
    TABLE,
    BundleScore,
    evaluate_bundles,
    score_bundle,
    score_ends,
    summary,
)
from fewscan.tracts.streamlines import ends, read_streamlines, visited

NATIVE = Geometry((10, 12, 8), np.array([[-2.0, 0, 0, 9], [0, 2, 0, -11], [0, 0, 3, -10], [0, 0, 0, 1.0]]))


def box(*limits: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(NATIVE.shape, bool)
    mask[tuple(slice(*limit) for limit in limits)] = True
    return mask


ROD, HALF = box((2, 6), (2, 10), (2, 6)), box((4, 8), (2, 10), (2, 6))
EMPTY = np.zeros(NATIVE.shape, bool)


def lines() -> list[np.ndarray]:
    """Three curved streamlines, every other one the other way round."""
    t = np.linspace(0, 1, 9)[:, None]
    found = [np.c_[2 * np.sin(3 * t) + shift, -8.3 + 16 * t, -4 + 6 * t] for shift in (-1.0, 0.0, 1.0)]
    return [line[::-1] if n % 2 else line for n, line in enumerate(found)]


def save(path: Path, held: list[np.ndarray] | None = None) -> Path:
    tractogram = nib.streamlines.Tractogram(lines() if held is None else held, affine_to_rasmm=np.eye(4))
    header = {"voxel_to_rasmm": NATIVE.affine.astype(np.float32), "dimensions": NATIVE.shape,
              "voxel_sizes": NATIVE.spacing, "voxel_order": NATIVE.axis_codes}  # fmt: skip
    nib.streamlines.save(tractogram, str(path), header=header if path.suffix == ".trk" else None)
    return path


def test_figures_are_those_of_counting() -> None:
    found = score_bundle(HALF, ROD, geometry=ras_geometry(NATIVE))
    assert (found.stated, found.score.dice, found.overlap, found.overreach) == ("scored", 0.5, 0.5, 0.5)
    assert found.score.volume_ml == pytest.approx(4 * 8 * 4 * 12 / 1000)


@pytest.mark.parametrize(
    ("predicted", "reference", "stated", "dice"),
    [(EMPTY, ROD, "missed", 0.0), (None, ROD, "not predicted", 0.0), (ROD, EMPTY, "extra", 0.0),
     (EMPTY, EMPTY, "absent", math.nan), (None, EMPTY, "absent", math.nan)],
)  # fmt: skip
def test_an_empty_bundle_is_stated(
    predicted: np.ndarray | None, reference: np.ndarray, stated: str, dice: float
) -> None:
    found = score_bundle(predicted, reference, geometry=NATIVE)
    assert found.stated == stated
    np.testing.assert_equal(found.score.dice, dice)


def test_ends_are_paired_whichever_way_fits() -> None:
    first, last = box((2, 6), (2, 4), (2, 6)), box((2, 6), (8, 10), (2, 6))
    assert score_ends([last, first], [first, last], geometry=NATIVE) == (1.0, 0.0)
    dice, apart = score_ends([first, box((2, 6), (9, 11), (2, 6))], [first, last], geometry=NATIVE)
    assert dice == pytest.approx(0.75)
    assert apart == pytest.approx(1.0)  # one end 2 mm off, the other none


def test_an_end_that_is_missed_counts_and_has_no_distance() -> None:
    first, last = box((2, 6), (2, 4), (2, 6)), box((2, 6), (8, 10), (2, 6))
    for predicted, wanted in (([EMPTY, EMPTY], 0.0), ([EMPTY, first], 0.5), ([EMPTY, last], 0.5)):
        dice, apart = score_ends(predicted, [first, last], geometry=NATIVE)
        assert (dice, math.isnan(apart)) == (wanted, True)
    assert np.isnan(score_ends([first, last], [first, EMPTY], geometry=NATIVE)).all()


def case(folder: Path, **masks: np.ndarray) -> Path:
    write_bundles(masks, folder, native=NATIVE)
    return folder


def test_a_folder_of_cases_becomes_tables_that_state_what_is_missing(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        case(tmp_path / "reference" / name, CST_left=ROD, AF_left=ROD, UF_left=EMPTY)
    case(tmp_path / "predicted" / "p1", CST_left=HALF, AF_left=EMPTY, UF_left=EMPTY)
    case(tmp_path / "predicted" / "p2", CST_left=ROD)
    case(tmp_path / "predicted" / "p3", CST_left=ROD)
    found = evaluate_bundles(tmp_path / "predicted", tmp_path / "reference", out=tmp_path / "out")
    assert [found["p1"][n].stated for n in ("CST_left", "AF_left", "UF_left")] == ["scored", "missed", "absent"]
    assert [found["p2"][n].stated for n in ("CST_left", "AF_left", "UF_left")] == ["scored", "not predicted", "absent"]
    table = summary(found)
    assert (table["CST_left"]["dice"], table["CST_left"]["scored"]) == (0.75, 2)
    assert math.isnan(table["UF_left"]["dice"])
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert {key for key, names in record["unmatched"].items() if names} == {"predictions"}
    assert record["unmatched"]["predictions"] == ["p3"]
    assert record["cases"]["p2"]["AF_left"]["said"] == "in the reference, no file predicted"
    assert record["summary"]["UF_left"]["dice"] is None
    rows = (tmp_path / "out" / TABLE).read_text().splitlines()
    assert len(rows) == 7
    assert "p1,UF_left,empty in both: nothing to score,,,,0.0000,0.0000,,," in rows
    assert read_evaluation(tmp_path / "out" / EVALUATION).values("dice", label="CST_left") == [0.5, 1.0]


def test_figures_and_intervals_are_over_patients_of_whom_none_has_more_say() -> None:
    rows = {name: {"CST_left": BundleScore(stated="scored", score=Score(status="scored", dice=dice))}
            for name, dice in (("p1_ses-1", 0.9), ("p1_ses-2", 0.8), ("p2", 0.5))}  # fmt: skip
    found = summary(rows)["CST_left"]
    assert math.isnan(found["low"]), "two patients tell no interval, though they bring three cases"
    assert (found["dice"], found["patients"], found["scored"]) == (pytest.approx((0.85 + 0.5) / 2), 2, 3)
    assert "3 scored, of 2 patients" in next(iter(bundle_scores({"CST_left": found}).columns[-1].cells))


def test_bundles_that_were_never_asked_for_enter_no_mean(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        case(tmp_path / "reference" / name, CST_left=ROD, AF_left=ROD, UF_left=ROD)
    case(tmp_path / "predicted" / "p1", CST_left=ROD, AF_left=ROD)
    case(tmp_path / "predicted" / "p2", CST_left=ROD)
    found = evaluate_bundles(tmp_path / "predicted", tmp_path / "reference", out=tmp_path / "out")
    assert {row["UF_left"].stated for row in found.values()} == {"not predicted"}
    kept = read_evaluation(tmp_path / "out" / EVALUATION)
    assert kept.values("dice") == [1.0, 0.5]  # the arcuate that p2 lacks counts, since p1 shows that it was asked for
    assert kept.names == ("AF_left", "CST_left")
    assert kept.unmatched["bundles"] == ("UF_left",)
    table = summary(found)
    assert (table["AF_left"]["dice"], table["UF_left"]["not predicted"]) == (0.5, 2)
    assert all(math.isnan(table["UF_left"][key]) for key in ("dice", "overlap", "volume_ml"))
    assert "1 bundle of the reference predicted in no case: not judged." in remarks(kept, None)


def test_only_cases_that_were_named_themselves_are_paired_whatever_they_are_called(tmp_path: Path) -> None:
    one, other = (case(tmp_path / folder / name, CST_left=ROD) for folder, name in (("a", "p1"), ("b", "p2")))
    assert list(evaluate_bundles(one, other, out=tmp_path / "out")) == ["p2"]
    for pair in ((one.parent, other.parent), (one.parent, other), (one, other.parent)):
        with pytest.raises(DataError, match=r"cases \['p1'\] are not among \['p2'\]"):
            evaluate_bundles(*pair, out=tmp_path / "out")


def test_the_verb_shows_states_and_the_json_has_no_nan(tmp_path: Path) -> None:
    one = case(tmp_path / "a", CST_left=ROD, UF_left=EMPTY)
    words = ["tracts", "evaluate", str(one), str(one / SEGMENTATIONS), "-o", str(tmp_path / "o")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "1 absent" in done.output
    assert "research use" in done.output
    done = CliRunner().invoke(cli.app, [*words, "--json", "-"])
    assert json.loads(done.output)["summary"]["UF_left"]["dice"] is None


def test_a_case_without_a_bundle_in_common_is_stated_and_costs_the_others_nothing(tmp_path: Path) -> None:
    case(tmp_path / "reference" / "p1", CST_left=ROD)
    case(tmp_path / "reference" / "p2", UF_left=ROD)  # references may be partial
    for name in ("p1", "p2"):
        case(tmp_path / "predicted" / name, CST_left=HALF)
    found = evaluate_bundles(tmp_path / "predicted", tmp_path / "reference", out=tmp_path / "out")
    assert found["p2"]["UF_left"].stated == "not predicted"
    kept = read_evaluation(tmp_path / "out" / EVALUATION)
    assert ([one.id for one in kept.cases], kept.unmatched["cases"]) == (["p1"], ("p2",))
    assert kept.values("dice") == [0.5]
    assert "1 case with no bundle to compare: not judged." in remarks(kept, None)
    for name in ("p1", "p2"):
        case(tmp_path / "other" / name, ILF_left=HALF)
    with pytest.raises(DataError, match=r"p1: none of its bundles \['ILF_left'\] is among \['CST_left'\]"):
        evaluate_bundles(tmp_path / "other", tmp_path / "reference", out=tmp_path / "out")


def test_people_without_a_prediction_and_ends_that_nobody_predicted_are_said(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        case(tmp_path / "reference" / name, CST_left=ROD)
    ends_of = {f"CST_left_{end}": ROD for end in "be"}
    write_bundles(ends_of, tmp_path / "reference" / "p1", native=NATIVE, folder=ENDINGS)
    case(tmp_path / "predicted" / "p1", CST_left=ROD)
    words = ["tracts", "evaluate", str(tmp_path / "predicted"), str(tmp_path / "reference"), "-o", str(tmp_path / "o")]
    done = CliRunner().invoke(cli.app, words)
    assert "p2: in the reference, no prediction: in no mean" in done.output
    assert "p1: no ends predicted" in done.output
    told = json.loads(CliRunner().invoke(cli.app, [*words, "--json", "-"]).output)["unmatched"]
    assert (told["references"], told["ends"], told["cases"]) == (["p2"], ["p1"], [])
    write_bundles(ends_of, tmp_path / "predicted" / "p1", native=NATIVE, folder=ENDINGS)
    assert "no ends" not in CliRunner().invoke(cli.app, words).output


def test_cases_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        case(tmp_path / "reference" / name, CST_left=ROD)
        case(tmp_path / "predicted" / name.upper(), CST_left=ROD)
    with pytest.raises(DataError, match="are not among"):
        evaluate_bundles(tmp_path / "predicted", tmp_path / "reference", out=tmp_path / "out")
    with pytest.raises(DataError, match="none of its bundles"):
        evaluate_bundles(case(tmp_path / "x", CST=ROD), tmp_path / "reference" / "p1", out=tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no bundle found"):
        evaluate_bundles(tmp_path / "nothing", tmp_path / "reference", out=tmp_path / "out")
    write_bundles({"CST_left": ROD[1:]}, tmp_path / "y", native=Geometry((9, 12, 8), NATIVE.affine))
    with pytest.raises(GeometryError, match="grids differ"):
        evaluate_bundles(tmp_path / "y", tmp_path / "reference" / "p1", out=tmp_path / "out")


@pytest.mark.parametrize("suffix", [".trk", ".tck"])
def test_streamlines_come_back_in_world_millimetres(tmp_path: Path, suffix: str) -> None:
    found = read_streamlines(save(tmp_path / f"CST_left{suffix}"))
    for line, wanted in zip(found, lines(), strict=True):
        np.testing.assert_allclose(line, wanted, atol=1e-4)


def test_visited_voxels_are_those_of_a_dense_walk() -> None:
    mask, beyond = visited(lines(), ras_geometry(NATIVE))
    geometry, expected = ras_geometry(NATIVE), np.zeros(NATIVE.shape, bool)
    for line in lines():
        for a, b in pairwise(line):
            for share in np.linspace(0, 1, 200):
                place = np.linalg.inv(geometry.affine) @ [*(a + share * (b - a)), 1]
                expected[tuple(np.rint(place[:3]).astype(int))] = True
    assert beyond == 0
    assert not (mask & ~expected).any()
    assert (mask & expected).sum() > 0.95 * expected.sum()  # corners that are barely touched may be passed over


def test_streamlines_are_marked_a_few_at_a_time_and_only_their_own_points_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid, sizes = ras_geometry(NATIVE), list[int]()
    beside = [*lines(), np.array([[0.0, -8, -4], [0, -8, 60]]), np.array([[500.0, 0, 0], [0, 0, 0], [0, 500, 0]])]
    whole, beyond = visited(beside, grid)
    assert beyond == 3
    mark = streamlines._mark
    monkeypatch.setattr(streamlines, "CHUNK", 2)
    monkeypatch.setattr(
        streamlines, "_mark", lambda points, geometry: sizes.append(len(points)) or mark(points, geometry)
    )
    again = visited(beside, grid)
    dense = [len(streamlines._resampled(line, streamlines.STEP * 2)) for line in beside]
    assert sizes == [sum(dense[:2]), sum(dense[2:4]), dense[4], sum(map(len, beside))]
    assert np.array_equal(whole, again[0])


def test_ends_do_not_depend_on_which_way_streamlines_run() -> None:
    first, last = ends(lines(), ras_geometry(NATIVE))
    again = ends([line[::-1] for line in lines()], ras_geometry(NATIVE))
    assert np.array_equal(first, again[0])
    assert np.array_equal(last, again[1])
    upper, lower = (np.argwhere(mask)[:, 2].mean() for mask in (first, last))
    assert upper > lower
    assert not (first & last).any()


def test_masks_of_tractograms_lie_on_the_image_in_its_own_axes(tmp_path: Path) -> None:
    write_image(np.zeros(NATIVE.shape, np.float32), tmp_path / "peaks.nii.gz", native=NATIVE)
    save(tmp_path / "CST_left.trk")
    report = white_matter.masks([tmp_path / "CST_left.trk"], tmp_path / "case", like=tmp_path / "peaks.nii.gz")
    files = bundle_files(tmp_path / "case")
    mask, geometry = read_bundle(files["CST_left"])
    assert np.array_equal(mask, visited(lines(), geometry)[0])
    np.testing.assert_allclose(nib.load(files["CST_left"]).affine, NATIVE.affine)
    assert report["CST_left"]["streamlines"] == 3
    assert sorted(bundle_files(tmp_path / "case", folder="endings_segmentations")) == ["CST_left_b", "CST_left_e"]
    with pytest.raises(ConfigError, match="holds CST_left already"):
        white_matter.masks([tmp_path / "CST_left.trk"], tmp_path / "case", like=tmp_path / "peaks.nii.gz")
    files["CST_left"].unlink()  # ends that somebody drew are not replaced either
    with pytest.raises(ConfigError, match="endings_segmentations: holds CST_left_b already"):
        white_matter.masks([tmp_path / "CST_left.trk"], tmp_path / "case", like=tmp_path / "peaks.nii.gz")
    assert not files["CST_left"].exists()


@pytest.mark.parametrize("suffix", [".trk", ".tck"])
def test_a_tractogram_without_streamlines_says_that_the_bundle_is_absent(tmp_path: Path, suffix: str) -> None:
    write_image(np.zeros(NATIVE.shape, np.float32), tmp_path / "peaks.nii.gz", native=NATIVE)
    files = [save(tmp_path / f"CST_left{suffix}"), save(tmp_path / f"UF_left{suffix}", [])]
    report = white_matter.masks(files, tmp_path / "case", like=tmp_path / "peaks.nii.gz")
    assert report["UF_left"] == {"streamlines": 0, "volume_ml": 0.0, "points_beyond": 0}
    made = bundle_files(tmp_path / "case") | bundle_files(tmp_path / "case", folder=ENDINGS)
    assert {name: bool(read_bundle(file)[0].any()) for name, file in made.items()} == {
        "CST_left": True, "CST_left_b": True, "CST_left_e": True,
        "UF_left": False, "UF_left_b": False, "UF_left_e": False,
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "case").iterdir()) == [SEGMENTATIONS, ENDINGS]


def test_a_tractogram_that_cannot_be_used_leaves_no_mask_of_the_others(tmp_path: Path) -> None:
    write_image(np.zeros(NATIVE.shape, np.float32), tmp_path / "peaks.nii.gz", native=NATIVE)
    files = [save(tmp_path / "AF_left.trk"), save(tmp_path / "CST_left.trk", [line + 500 for line in lines()])]
    with pytest.raises(DataError, match="none of its streamlines lies on the grid"):
        white_matter.masks(files, tmp_path / "case", like=tmp_path / "peaks.nii.gz")
    assert not (tmp_path / "case").exists()
    dots = save(tmp_path / "UF_left.tck", [line[:1] for line in lines()])
    with pytest.raises(DataError, match="none of its 3 streamlines has two points"):
        white_matter.masks([dots], tmp_path / "case", like=tmp_path / "peaks.nii.gz")


def test_tractograms_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    write_image(np.zeros(NATIVE.shape, np.float32), tmp_path / "far.nii.gz",
                native=Geometry(NATIVE.shape, NATIVE.affine + _shift(500)))  # fmt: skip
    trk = save(tmp_path / "a.trk")
    with pytest.raises(DataError, match="none of its streamlines lies on the grid"):
        white_matter.masks([trk], tmp_path / "case", like=tmp_path / "far.nii.gz")
    (tmp_path / "b.trk").write_bytes(b"TRACK")
    for name, sentence in (("b.trk", "cannot be read"), ("c.tck", "no such file"), ("d.vtk", "not a tractogram")):
        with pytest.raises(DataError, match=sentence):
            read_streamlines(tmp_path / name)


def _shift(mm: float) -> np.ndarray:
    matrix = np.zeros((4, 4))
    matrix[:3, 3] = mm
    return matrix

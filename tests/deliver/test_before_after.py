"""What the report shows of personalised scans: both answers, what changed between them, and why one was kept."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from series import write_series
from test_report import EVIL, Structure

from fewscan.data import io, places
from fewscan.data.bundles import SEGMENTATIONS, write_bundles
from fewscan.deliver import before_after
from fewscan.deliver.report import read_run, write_report
from fewscan.deliver.scenes import scenes
from fewscan.space.geometry import Geometry

GRID = Geometry((24, 20, 16), np.diag([1.0, 1.0, 2.0, 1.0]))
FITTING = {"kept": "after", "reason": "atlases and scan fit each other", "evidence": {"agreement": 0.9, "reached": 1}}


def cube(*, high=10):
    data = np.zeros(GRID.shape, np.uint8)
    data[6:high, 6:12, 5:11] = 1
    return data


def before(name, dice, *, changed=0.4):
    return {"path": f"before/{name}", "volumes_ml": {EVIL: 0.288}, "dice": {EVIL: dice}, "voxels_changed": changed}


@pytest.fixture
def out(tmp_path):
    """Two personalised scans, one of which changed much, and one whose own answer was kept."""
    rows, noise = [], np.random.default_rng(0)
    for i, high in enumerate((11, 15, 10)):
        name = f"case_{i}.nii.gz"
        io.write_image(noise.normal(size=(1, *GRID.shape)).astype(np.float32), tmp_path / "in" / name, native=GRID)
        io.write_labelmap(cube(high=high), tmp_path / "out" / name, native=GRID)
        rows.append({"id": f"case_{i}", "path": name, "seconds": 1.0, "volumes_ml": {EVIL: 0.072 * (high - 6)}})
        rows[-1]["personalized"] = FITTING if i < 2 else {"kept": "before", "reason": "another <contrast>?"}
    for row, dice in zip(rows, (8 / 9, 8 / 13), strict=False):
        row["before"] = before(row["path"], dice)
        io.write_labelmap(cube(), tmp_path / "out" / row["before"]["path"], native=GRID)
    places.remember(
        tmp_path / "out" / "predictions.json",
        {row["id"]: {"image": tmp_path / "in" / row["path"]} for row in rows},
    )
    return written(tmp_path / "out", rows)


def written(folder, rows):
    (folder / "predictions.json").write_text(json.dumps({"labels": {"1": EVIL}, "predictions": rows}))
    return folder


def rows_of(folder):
    return json.loads((folder / "predictions.json").read_text())["predictions"]


def page_of(folder, *, images=()):
    return write_report(folder, folder.parent / "report.html", extent="none", images=images).read_text()


def test_both_answers_are_outlined_over_the_scan_with_a_legend_and_the_verdict(out):
    html = page_of(out)
    page = Structure(html)
    assert page.wrong == page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert html.count('class="prediction" d="M') == 2 * 3
    assert html.count('class="reference" d="M') == 2 * 2  # none in the sagittal cuts, see below
    assert html.count("data:image/png") == 2 * 3
    for text in (
        "the model's own answer",
        "40.0 % of the labelled voxels changed",
        "verdictagreement / worthreached",
        "atlases and scan fit each other0.901.00",
    ):
        assert text in page.text, text
    assert "not personalised: another <contrast>?" in page.text
    assert EVIL not in html
    assert ".compared:has(#show-own:not(:checked)) path.reference" in html
    assert {"show-own", "show-personalised"} <= set(page.ids)


def test_what_changed_most_comes_first_in_millilitres_and_dice(out):
    text = Structure(page_of(out)).text
    table = text[text.index("What personalisation changed") :]
    assert table.index("0.615") < table.index("0.889")
    assert "0.290.65+0.360.615" in table  # own, personalised, change, Dice
    assert "0.290.36+0.070.889" in table


def test_each_cut_shows_where_most_changed(out):
    html = page_of(out)
    first = html[html.index('aria-label="axial cut"') :]  # of case_1, whose cube grew from 4 to 9 voxels
    xs = {kind: [float(v.split()[0]) for v in path_of(first, kind)] for kind in ("reference", "prediction")}
    assert [max(x) - min(x) for x in xs.values()] == [4, 9]
    sagittal = html[html.index('aria-label="sagittal cut"') :]  # through what was added, where nothing was before
    assert path_of(sagittal, "reference") == []
    assert path_of(sagittal, "prediction")


def path_of(svg, kind):
    path = svg.split(f'class="{kind}" d="', 1)[1].split('"', 1)[0]
    return path.replace("M", "L").split("L")[1:]


def test_a_lost_scan_costs_the_grey_picture_and_a_lost_answer_the_outlines(out):
    (out.parent / "in").rename(out.parent / "elsewhere")
    html = page_of(out)
    assert "data:image/png" not in html
    assert html.count('class="prediction" d="M') == 2 * 3
    assert html.count("Outlines alone. The scan does not lie where it lay") == 2
    assert page_of(out, images=[out.parent / "elsewhere"]).count("data:image/png") == 2 * 3
    (out / "before" / "case_1.nii.gz").unlink()
    html = page_of(out)
    assert html.count('class="prediction" d="M') == 3
    assert "No picture: case_1.nii.gz" in html
    assert str(out.parent) not in html


def test_a_scan_on_another_grid_costs_the_grey_picture_alone(out):
    other = Geometry(GRID.shape, GRID.affine + np.diag([1.0, 0, 0, 0]))
    io.write_image(np.ones((1, *GRID.shape), np.float32), out.parent / "in" / "case_1.nii.gz", native=other)
    html = page_of(out)
    assert html.count('class="prediction" d="M') == 2 * 3
    assert html.count("data:image/png") == 3
    assert "Outlines alone. case_1, scan and prediction" in html


def test_one_series_of_a_mixed_folder_lies_under_the_outlines(out):
    noise = np.random.default_rng(0).integers(0, 100, GRID.shape)
    series = write_series(out.parent / "mixed", noise, GRID, tags={"SeriesNumber": 4})
    io.write_labelmap(cube(), out / "before" / "case_2.nii.gz", native=GRID)
    row = rows_of(out)[2] | {"personalized": FITTING, "before": before("case_2.nii.gz", 0.9)}
    written(out, [row])
    places.remember(out / "predictions.json", {"case_2": {"image": series.with_name("mixed@4")}})
    assert page_of(out).count("data:image/png") == 3


@pytest.mark.parametrize("place", ["../in/case_0.nii.gz", "/etc/hostname", "..", ""])
def test_no_file_outside_the_folder_is_read(out, place):
    written(out, [row | {"path": place} for row in rows_of(out)[:1]])
    html = page_of(out)
    assert "<svg" not in html
    assert "its file is not beside the record" in html
    assert scenes(read_run(out)) == []


def test_of_many_only_those_that_changed_most_are_drawn_and_that_is_said(out, monkeypatch):
    monkeypatch.setattr(before_after, "PICTURED", 1)
    html = page_of(out)
    assert html.count("<svg") == 3
    assert "Of 2 personalised scans the 1 that changed most are drawn." in html
    assert "<h3>case_1</h3>" in html
    assert "<h3>case_0</h3>" not in html


@pytest.mark.parametrize(
    "found", [3, {}, {"dice": EVIL, "volumes_ml": 3}, {"dice": {"a": None}, "voxels_changed": "x"}]
)
def test_a_damaged_record_is_shown_as_far_as_it_goes(out, found):
    written(out, [row | {"before": found} for row in rows_of(out)[:1]])
    page = Structure(page_of(out))
    assert page.wrong == page.open == []
    assert "personalised: atlases and scan fit each other" in page.text
    keys = re.findall(r'data-key="([^"]*)"', page_of(out))
    assert not [key for key in keys if "inf" in key or "nan" in key]  # which a script could not sort by


def test_the_viewer_can_show_the_answer_of_before(out):
    content = scenes(read_run(out))[0].load()
    shown = {layer.name: layer.shown for layer in content.layers}
    assert shown == {"scan": True, "prediction": True, "before": False}
    np.testing.assert_array_equal(content.layers[2].data, cube())
    assert [layer.name for layer in scenes(read_run(out))[2].load().layers] == ["scan", "prediction"]
    html = write_report(out, out.parent / "report.html").read_text()
    assert "x prediction or what to compare it with" in html


@pytest.fixture
def crossed(tmp_path):
    """A personalised scan of two bundles that are as they were, and their masks."""
    masks = {"a": cube() > 0, "b": np.roll(cube() > 0, 8, 0)}
    for place in (".", "before"):
        write_bundles(masks, tmp_path / "out" / place / "x", native=GRID)
    row = {"id": "x", "path": f"x/{SEGMENTATIONS}", "seconds": 1.0, "volumes_ml": {}, "personalized": FITTING}
    return written(tmp_path / "out", [row | {"before": before(f"x/{SEGMENTATIONS}", 0.9)}]), masks


def compared(out):
    one, other = before_after._both("x", Path("x") / SEGMENTATIONS, out)
    assert one.names == other.names
    return before_after._differing(one, other)


def test_bundles_that_overlap_are_compared_mask_by_mask(crossed):
    out, masks = crossed
    wide = cube(high=16) > 0
    write_bundles({"b": masks["a"]}, out / "before" / "x", native=GRID)
    write_bundles({"b": wide}, out / "x", native=GRID)
    np.testing.assert_array_equal(compared(out), masks["a"] != wide)


def test_a_bundle_without_a_mask_is_compared_as_an_empty_one(crossed):
    out, masks = crossed
    (out / "before" / "x" / SEGMENTATIONS / "a.nii.gz").unlink()
    np.testing.assert_array_equal(compared(out), masks["a"])
    html = page_of(out)
    assert html.count("<svg") == 3
    assert "No picture" not in html
    content = scenes(read_run(out))[0].load()
    assert content.names == {1: "a", 2: "b"}
    now, own = (layer.data for layer in content.layers)
    np.testing.assert_array_equal(now, masks["a"] + 2 * masks["b"])
    np.testing.assert_array_equal(own, 2 * masks["b"])
    (out / "x" / SEGMENTATIONS / "b.nii.gz").unlink()  # as many on either side, but others
    np.testing.assert_array_equal(compared(out), masks["a"] | masks["b"])


def test_an_answer_without_any_mask_costs_the_comparison_alone(crossed):
    out, masks = crossed
    for name in masks:
        (out / "before" / "x" / SEGMENTATIONS / f"{name}.nii.gz").unlink()
    assert re.search("No picture: [^<]*no masks are left there", page_of(out))
    content = scenes(read_run(out))[0].load()
    assert [layer.name for layer in content.layers] == ["prediction"]
    assert any("no masks are left there" in line for line in content.remarks)

"""The report's parts about registrations, drafts and joint training."""

import json
import re
import shutil

import pytest
from test_report import EVIL, Structure, page_of
from test_warps import scene

from fewscan.deliver.report import SECTIONS
from fewscan.deliver.verdict import drafted, registered
from fewscan.deliver.warps import LINES, write_pictures

RECORD = {
    "transform": "deformable",
    "similarity": {"name": "lncc", "before": 0.13, "affine": 0.2, "after": 0.33},
    "folding": 0.0,
    "volume_change": {"smallest": 0.5, "largest": 2.1},
    "displacement_mm": {"mean": 1.6, "largest": 4.6},
    "matrix": [[1.25, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    "grid": {"shape": [20, 24, 18], "spacing_mm": [1.0, 1.0, 2.0]},
    "kernels": "compiled",
    "seconds": 75.2,
    "fixed": "/home/ann/fixed.nii.gz",
    "moving": "moving.nii.gz",
    "dice": {
        "labels": {"ball": {"before": 0.9, "after": 0.85}, "rod": {"before": 0.5, "after": 0.75}},
        "mean": {"before": 0.7, "after": 0.8},
    },
}
DRAFT = {
    "fusion": "joint",
    "leave_one_out": {
        "n": 3,
        "dice": 0.81,
        "low": 0.74,
        "high": 0.86,
        "cases": {"a": {"ball": 0.8}, "b": {"ball": 0.82}},
    },
    "cases": {
        "c": {"sure": 0.91, "atlases": {"a": {"folding": 0.0, "voted": True}, "b": {"folding": 0.021, "voted": False}}},
        "d": {"sure": 0.62, "atlases": {"a": {"folding": 0.0, "voted": True}, "b": {"folding": 0.0, "voted": True}}},
    },
    "sentence": "1 scan(s) drafted into /home/ann/drafts/labels; correct them.",
    "seconds": 20,
}
GUARD = {
    "kept": "joint",
    "reason": "guard: kept the segmenter of joint training",
    "apart": {"consistency": 0.814, "labelled": 0.952},
    "joint": {"consistency": 0.821, "labelled": 0.977},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene") / "pictures"
    write_pictures(scene(), folder)
    return folder


@pytest.fixture
def registration(tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "pictures")
    record = RECORD | {"pictures": [f"pictures/{path.name}" for path in pictures.iterdir()]}
    (tmp_path / "registration.json").write_text(json.dumps(record))
    return tmp_path


def changed(folder, **more):
    record = json.loads((folder / "registration.json").read_text())
    (folder / "registration.json").write_text(json.dumps(record | more))
    return page_of(folder)


def test_a_registration_has_figures_pictures_and_structures(registration):
    html = page_of(registration)
    page = Structure(html)
    assert page.wrong == page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert [i for i in page.ids if not i.startswith("show-")] == ["registration"]
    assert "Mean Dice rises from 0.70 to 0.80, likeness rises from 0.13 to 0.33, and nothing folds." in page.text
    for text in ("Checkerboard", "Deformed grid", "1.25", "local correlation", "1 min 15 s", "fixed.nii.gz", "-0.05"):
        assert text in page.text, text
    assert page.text.index("rod") < page.text.index("0.90")  # the weakest structure comes first
    assert "/home/ann" not in html
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert html.count("data:image/png") == 3 * 6
    assert html.count('class="reference"') == 3 * 3 + 1  # in each state, and in the legend
    assert html.count('class="prediction"') == 3 * 2 + 1
    assert page_of(registration) == html


def test_before_and_after_need_no_script_and_are_both_printed(registration):
    html = page_of(registration)
    assert [re.search(rf'id="show-{k}"( checked)?', html)[1] for k in ("fixed", "before", "warped")] == [
        None,
        None,
        " checked",
    ]
    assert all(f".flicker:has(#show-{k}:checked) .state:not(.{k})" in html for k in ("fixed", "before", "warped"))
    assert re.search(r"@media print \{.*\.flicker \.state \{ display: block !important", html, re.S)
    assert '<button type="button" hidden>' in html


def test_an_affine_map_has_neither_grid_nor_volumes(registration):
    page = changed(registration, transform="affine")
    assert "Checkerboard" in page
    assert "Deformed grid" not in page


def test_lines_that_are_not_path_data_are_not_drawn(registration):
    lines = json.loads((registration / "pictures" / LINES).read_text())
    lines["axial"] |= {"grid": f'M0 0"/>{EVIL}', "fixed_labels": 3, "side_mm": EVIL}
    lines["coronal"] = EVIL
    (registration / "pictures" / LINES).write_text(json.dumps(lines))
    html = page_of(registration)
    assert EVIL not in html
    assert html.count('class="reference"') == 3 * 1 + 1
    assert Structure(html).wrong == []


def test_lost_or_foreign_pictures_cost_the_pictures_not_the_report(registration):
    (registration / "pictures" / "axial_fixed.png").write_text(EVIL)
    page = page_of(registration)
    assert "register again" in page
    assert "data:image/png" not in page
    assert "Dice registered" in page


def test_a_record_with_holes_is_shown_as_far_as_it_goes(registration):
    page = Structure(
        changed(registration, similarity=3, dice=[], matrix="x", grid=None, volume_change={}, seconds=None)
    )
    assert page.wrong == []
    assert "Nothing folds." in page.text
    assert "Two scans were registered." in registered({})[0]


def test_a_doubtful_registration_is_called_so():
    worse = {"similarity": {"before": 0.3, "after": 0.2}, "folding": 0.0123, "volume_change": {"smallest": 0.01}}
    said, found = registered(worse)
    assert said == "Likeness falls from 0.30 to 0.20 and 1.23 % of the voxels fold."
    told = " ".join(found)
    for text in ("do not use", "Likeness alone can deceive", "inside out", "more than 5-fold in places"):
        assert text in told
    told = " ".join(registered(RECORD)[1])
    assert "Look first at rod: Dice 0.75." in told
    assert "1 structure overlaps less than before: ball." in told
    assert "5-fold" not in told


def test_drafts_show_their_figure_the_least_sure_first_and_what_was_dropped(tmp_path):
    (tmp_path / "draft.json").write_text(json.dumps(DRAFT))
    html = page_of(tmp_path)
    page = Structure(html)
    assert page.wrong == page.open == []
    for text in (
        "drafted for 2 scans",
        "reach Dice 0.81",
        "0.74 to 0.86",
        "Look first at d",
        "b (2.1 % folded)",
        "1 of 2",
    ):
        assert text in page.text, text
    assert page.text.index("62 %") < page.text.index("91 %")
    assert "/home/ann" not in html


def test_drafts_that_failed_are_named_with_their_reason(tmp_path):
    gone = {"e": {"failed": "all 2 atlases fold on this scan; is it of the same body part as they are?"}}
    left = DRAFT["leave_one_out"] | {"failed": {"b": "/home/ann/b.nii.gz: damaged"}}
    (tmp_path / "draft.json").write_text(json.dumps(DRAFT | {"cases": DRAFT["cases"] | gone, "leave_one_out": left}))
    html = page_of(tmp_path)
    page = Structure(html)
    for text in ("drafted for 2 scans", "2 scans could not be drafted", "all 2 atlases fold", "b.nii.gz: damaged"):
        assert text in page.text, text
    assert "Look first at d" in page.text
    assert "/home/ann" not in html
    (tmp_path / "draft.json").write_text(json.dumps(DRAFT | {"cases": gone}))
    assert "Drafted scans, least sure first" not in Structure(page_of(tmp_path)).text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"n": 0, "dice": None, "low": None, "high": None, "cases": {}}, "Nothing measures these drafts"),
        ({"n": 2, "dice": 0.9, "low": float("nan"), "high": float("nan"), "cases": {}}, "no interval"),
    ],
)
def test_drafts_without_interval_say_so(tmp_path, found, text):
    (tmp_path / "draft.json").write_text(json.dumps(DRAFT | {"leave_one_out": found}))
    page = page_of(tmp_path)
    assert text in page
    assert "nan" not in Structure(page).text
    assert "patient" in " ".join(drafted(DRAFT | {"leave_one_out": found})[1])


def joint_history(path, *, note=""):
    terms = {"segment": {"dice": 0.5}, "anatomy": {"dice": 0.25}, "register": {"similarity": 0.75, "smoothness": None}}
    turns = ["segment", "segment", "register", "anatomy"] * 20
    lines = [
        {"step": i + 1, "seconds": i * 0.5, "phase": name, "loss": 1 / (i + 1), "lr": 1e-3, "terms": terms[name]}
        for i, name in enumerate(turns)
    ]
    lines += [lines[-1] | {"step": 81, "phase": note}] if note else []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_phase_of_joint_training_has_its_curve_and_the_guard_its_say(tmp_path):
    joint_history(tmp_path / "history.jsonl", note="stopping: annealing what there is")
    (tmp_path / "model.json").write_text(json.dumps({"method": "joint", "guard": GUARD}))
    html = page_of(tmp_path)
    page = Structure(html)
    assert page.wrong == page.open == []
    assert html.count('<div class="curve">') == 3
    for text in (
        "Segmenter, on drawn labels",
        "Registration network",
        "similarity 0.75",
        "Teaching",
        "0.814",
        "it was kept",
    ):
        assert text in page.text, text
    assert "stopping" not in page.text
    kept = {"method": "joint", "guard": GUARD | {"kept": "apart"}}
    (tmp_path / "model.json").write_text(json.dumps(kept))
    page = Structure(page_of(tmp_path))
    assert "the one from before was kept" in page.text
    assert "see Training" in page.text


@pytest.mark.parametrize("guard", [{}, None, 3, {"kept": "joint", "apart": 1}])
def test_other_verdicts_are_no_obstacle(tmp_path, guard):
    (tmp_path / "model.json").write_text(json.dumps({"guard": guard}))
    assert ("Teaching" in page_of(tmp_path)) == (guard == {"kept": "joint", "apart": 1})


def test_a_registration_network_is_not_called_a_segmenter(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"method": "register", "segments": False}))
    text = Structure(page_of(tmp_path)).text
    assert "A registration network was trained" in text
    assert "fewscan evaluate" not in text


def test_new_parts_stand_before_the_others():
    assert [title for title, _ in SECTIONS][:3] == ["Registration", "Drafts", "Figures"]

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from fewscan.data import io
from fewscan.deliver import scans
from fewscan.deliver.markup import without_folders
from fewscan.deliver.report import SECTIONS, write_report
from fewscan.deliver.transferred import transfer
from fewscan.deliver.verdict import WORDS, headline, remarks
from fewscan.errors import ConfigError, DataError
from fewscan.judge.confidence import Judged, calibrate
from fewscan.judge.evaluate import evaluate
from fewscan.space.geometry import Geometry

GRID = Geometry((16, 14, 12), np.diag([1.0, 1.0, 2.0, 1.0]))
EVIL = "<script>alert(1)</script>"


class Structure(HTMLParser):
    """Tags that are open when they should not be, addresses, and text."""

    VOID = frozenset({"meta", "br", "input", "img", "image", "path", "line", "circle", "polyline"})

    def __init__(self, page):
        super().__init__()
        self.open, self.wrong, self.links, self.ids, self.text = [], [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("href", "src")]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text += data


def ball(shift=0):
    data = np.zeros(GRID.shape, np.uint8)
    data[4 + shift : 9 + shift, 4:10, 3:8] = 1
    data[9 + shift : 12 + shift, 4:10, 3:8] = 2
    return data


@pytest.fixture
def run(tmp_path):
    for name in ("predictions", "labels", "images", "model"):
        (tmp_path / name).mkdir()
    noise = np.random.default_rng(0).integers(0, 900, (1, *GRID.shape)).astype(np.int16)
    for i in range(4):
        io.write_labelmap(ball(), tmp_path / "labels" / f"case_{i}.nii.gz", native=GRID)
        io.write_labelmap(ball(i), tmp_path / "predictions" / f"case_{i}.nii.gz", native=GRID)
        io.write_image(noise, tmp_path / "images" / f"case_{i}.nii.gz", native=GRID)
    (tmp_path / "labels.json").write_text(json.dumps({"1": "front & top", "2": EVIL}))
    folders = (tmp_path / name for name in ("predictions", "labels"))
    evaluate(*folders, images=tmp_path / "images").save(tmp_path / "evaluation.json")
    lines = [json.dumps({"step": s, "seconds": s * 0.1, "loss": 1 / s, "lr": 1e-3, "terms": {}}) for s in range(1, 60)]
    (tmp_path / "model" / "history.jsonl").write_text("\n".join(lines) + '\n{"step": 60, "sec')
    model = {"seed": 7, "hashes": {"weights": "abc"}, "command": EVIL, "versions": {"fewscan": "0.1.0"}}
    moved = {"kept": "base", "by": "cross-validation", "cases": {EVIL: {"base": 0.8, "adapted": 0.7}}, "base": 0.8,
             "adapted": 0.7, "weights": {"kept": 4, "labels": {EVIL: ""}}, "source": [EVIL]}  # fmt: skip
    (tmp_path / "model" / "model.json").write_text(json.dumps(model | {"transfer": moved}))
    rows = [{"id": "case_0", "seconds": 0.5, "volumes_ml": {"front & top": 1.25}}]
    (tmp_path / "predictions" / "predictions.json").write_text(json.dumps({"predictions": rows}))
    finding = {"code": "x", "severity": "error", "case": "case_0", "message": "bad <b>", "remedy": "do this"}
    check = {
        "data": str(tmp_path / "scans"),
        "labelled": 4,
        "findings": [finding],
        "cases": [{"id": "case_0", "spacing": [1.0, 1.0, 2.0]}],
    }
    (tmp_path / "check.json").write_text(json.dumps(check))
    dice = {"labels": {EVIL: {"before": 0.5, "after": 0.75}}, "mean": {"before": 0.5, "after": 0.75}}
    (tmp_path / "registration.json").write_text(json.dumps({"fixed": EVIL, "dice": dice}))
    drafted = {"fusion": EVIL, "cases": {EVIL: {"sure": 0.9, "atlases": {EVIL: {"voted": False, "folding": 0.02}}}}}
    (tmp_path / "draft.json").write_text(json.dumps(drafted))
    part = {"printable": False, "faults": [EVIL], "volume_error": 0.001, "deviation": {"mean_mm": 0.2}, "picture": EVIL}
    certificate = {"printable": False, "parts": {EVIL: part, "odd": 3}, "pictures": ["../a.png", 3], "printer": EVIL}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    ranked = [{"id": EVIL, "reason": EVIL, "label": EVIL, "unsure": 0.5, "unlike": None}, 3]
    curve = {"measured": [{"labels": 2, "dice": 0.7, "low": None, "high": None}, EVIL], "sentence": EVIL}
    signs = {"sharp": 0.9}
    left_out = [Judged(case=EVIL, patient=str(i), label=EVIL, signs=signs, dice=0.8 + 0.05 * i) for i in range(3)]
    (tmp_path / "calibration.json").write_text(json.dumps(calibrate(left_out).to_json()))
    (tmp_path / "suggest.json").write_text(json.dumps({"ranked": ranked, "skipped": {EVIL: EVIL}, "curve": curve}))
    return tmp_path


def page_of(run):
    return write_report(run, run / "report.html").read_text(encoding="utf-8")


def test_a_whole_run_has_every_part_and_well_formed_html(run):
    page = Structure(page_of(run))
    assert page.wrong == page.open == []
    titles = [title.lower() for title, _ in SECTIONS]
    titles.insert(titles.index("pictures") + 1, "viewer")
    assert titles == [i for i in page.ids if not i.startswith("show-")]
    assert len(page.ids) == len(set(page.ids))
    for text in ("agree", "research use only", "case_3", "seed", "abc", "front & top", "do this"):
        assert text in page.text, text


def test_nothing_is_loaded_from_outside(run):
    page = page_of(run)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in Structure(page).links)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", page)


def test_content_of_files_is_escaped(run):
    page = page_of(run)
    assert EVIL not in page
    assert "bad <b>" not in page
    assert page.count("<script>") == 1


def test_each_picture_is_small(run):
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page_of(run))
    assert len(pictures) == 9
    assert max(map(len, pictures)) < 60_000


def test_paths_of_this_machine_are_not_shown(run):
    assert str(run) not in page_of(run)


@pytest.mark.parametrize(
    ("kept", "parts"),
    [
        ("check.json", ["data"]),
        ("model", ["transfer", "training", "model"]),
        ("evaluation.json", ["figures", "pictures", "structures", "scans"]),
        ("predictions/predictions.json", ["predictions"]),
        ("registration.json", ["registration"]),
        ("draft.json", ["drafts"]),
        ("certificate.json", ["meshes"]),
    ],
)
def test_a_part_appears_only_with_its_file(run, tmp_path_factory, kept, parts):
    alone = tmp_path_factory.mktemp("alone")
    (alone / kept).parent.mkdir(exist_ok=True)
    (run / kept).rename(alone / kept)
    page = Structure(page_of(alone))
    assert [i for i in page.ids if not i.startswith("show-")] == parts
    assert page.wrong == []


def test_a_model_folder_alone_is_reported(run):
    assert "has not been measured" in page_of(run / "model")


def test_lost_scans_cost_the_pictures_not_the_report(run):
    for file in (run / "labels").iterdir():
        file.unlink()
    page = page_of(run)
    assert page.count("No picture") == 3
    assert str(run) not in page


def test_pictures_of_judged_cases_find_their_scans_as_the_viewer_does(run, tmp_path_factory):
    elsewhere = (run / "images").rename(tmp_path_factory.mktemp("elsewhere") / "images")
    page = page_of(run)
    assert "No picture" not in page
    assert page.count("Outlines alone. The scan does not lie where it lay") == 3
    assert page.count("data:image/png") == 0
    page = write_report(run, run / "report.html", images=[elsewhere]).read_text(encoding="utf-8")
    assert "Outlines alone" not in page
    assert page.count("data:image/png") == 9


def test_one_series_of_a_mixed_folder_is_there_where_its_folder_is(tmp_path):
    (tmp_path / "scans" / "p1").mkdir(parents=True)
    place = tmp_path / "scans" / "p1@4"
    assert scans.lies_at(place.relative_to(tmp_path), tmp_path) == place


def test_of_peaks_the_longest_is_shown_wherever_it_stands(tmp_path):
    peaks = np.zeros((6, *GRID.shape), np.float32)
    peaks[0], peaks[5, :2] = 0.5, 0.75
    io.write_image(peaks, tmp_path / "a.nii.gz", native=GRID)
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_kind": "peaks"}))
    shown = np.unique(scans.first_channel(tmp_path / "a.nii.gz")[0])
    np.testing.assert_array_equal(shown, [0.5, 0.75])


def test_a_run_that_was_moved_keeps_its_pictures(run, monkeypatch):
    (run / "files.local.json").unlink()
    moved = run.rename(run.with_name("moved"))
    assert "No picture" not in page_of(moved)


def test_a_reference_elsewhere_is_never_mistaken_for_the_prediction_of_its_name(run, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    (run / "predictions").rename(alone / "predictions")
    evaluate(alone / "predictions", run / "labels").save(alone / "predictions" / "evaluation.json")
    assert "No picture" not in page_of(alone / "predictions")
    (alone / "predictions" / "files.local.json").unlink()
    assert page_of(alone / "predictions").count("No picture") == 3


def test_scans_of_several_channels_and_references_with_an_ignore_value_have_pictures(run):
    (run / "labels.json").write_text(json.dumps({"1": "front", "2": "back", "255": "ignore"}))
    noise = np.random.default_rng(0).integers(0, 900, (2, *GRID.shape)).astype(np.int16)
    for i in range(4):
        label = ball()
        label[0] = 255
        io.write_labelmap(label, run / "labels" / f"case_{i}.nii.gz", native=GRID)
        io.write_image(noise, run / "images" / f"case_{i}.nii.gz", native=GRID)
    evaluate(run / "predictions", run / "labels", images=run / "images").save(run / "evaluation.json")
    page = page_of(run)
    assert "No picture" not in page
    assert page.count("data:image/png") == 9


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("check.json", '{"findings": 3}'),
        ("check.json", '{"findings": [{"severity": "dreadful"}]}'),
        ("check.json", '{"findings": [], "cases": ["a"]}'),
        ("model/history.jsonl", '{"step": 1, "loss": "x", "seconds": 1}\n{}'),
        ("model/history.jsonl", '{"step": 1, "loss": 0.5}\n{}'),
        ("model/history.jsonl", "\udcff"),
        ("registration.json", "[]"),
        ("draft.json", "3"),
        ("certificate.json", "[3]"),
    ],
)
def test_damaged_files_are_refused_by_name(run, name, content):
    (run / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=re.escape(name)):
        page_of(run)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/my data/case.nii.gz: 3 and/or 4", "case.nii.gz: 3 and/or 4"),
        ("/a b/x.nii.gz and /c/d/y.nii.gz differ", "x.nii.gz and y.nii.gz differ"),
        (r"C:\Users\Ann Smith\x.nii: bad", "x.nii: bad"),
        (r"\\server\share\x.nii is lost", "x.nii is lost"),
        ("scan and/or label, 3/4, T1/T2", "scan and/or label, 3/4, T1/T2"),
        ("/a/b/x.nii.gz has 3 and/or 4", "x.nii.gz has 3 and/or 4"),
    ],
)
def test_folders_are_cut_off_paths_and_prose_is_kept(text, shown):
    assert without_folders(text) == shown


def test_remarks_say_how_uncertain_the_mean_is_and_what_was_trained_on(run):
    empty = np.zeros(GRID.shape, np.uint8)
    io.write_labelmap(empty, run / "predictions" / "case_0.nii.gz", native=GRID)
    said = " ".join(remarks(evaluate(run / "predictions", run / "labels"), None, model={"labelled": ["case_1", "x"]}))
    assert "With these 4 scans the mean Dice is uncertain: 95 % interval 0." in said
    assert "So few scans make even that interval too narrow." in said
    assert "(missed structures not counted)" in said
    assert "1 of these scans was trained on: its figures say nothing about new ones." in said


def test_empty_and_damaged_folders_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
    (tmp_path / "check.json").write_text("{")
    with pytest.raises(DataError, match=r"check\.json: not JSON"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(ConfigError, match=r"check\.json must end in \.html"):
        write_report(tmp_path, tmp_path / "check.json")
    assert [p.name for p in tmp_path.iterdir()] == ["check.json"]


def test_same_run_gives_the_same_page(run):
    assert page_of(run) == page_of(run)


def test_headline_says_what_is_known(run):
    from fewscan.judge.results import read_evaluation

    found = read_evaluation(run / "evaluation.json")
    assert "4 scans" in headline(found, trained=True)
    assert any(f" {word} on" in headline(found, trained=True) for _, word in WORDS)
    assert "not been measured" in headline(None, trained=True)
    assert "Nothing was trained" in headline(None, trained=False)


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ({"worse": ["a <rod>"], "lost": True}, "much worse on a &lt;rod&gt;, whatever others gained"),
        ({"labels": ["rod"], "base": 0.9, "adapted": 0.8, "lost": True}, "what that learnt of new labels"),
        ({}, "was no better"),
    ],
)
def test_a_transfer_that_was_not_kept_says_what_it_would_have_cost(shared, said):
    record = {"kept": "base", "by": "cross-validation", "base": 0.7, "adapted": 0.8, "shared": shared}
    assert said in transfer(SimpleNamespace(model={"transfer": record}))


def test_a_folder_of_predictions_says_what_was_done_and_why(tmp_path):
    row = {"id": "p1", "path": "p1.nii.gz", "seconds": 9.0, "volumes_ml": {"liver": 1.0}}
    row["personalized"] = {"kept": "before", "reason": "another <contrast>?", "evidence": {"agreement": 0.4}}
    (tmp_path / "predictions.json").write_text(json.dumps({"predictions": [row]}))
    page = write_report(tmp_path, tmp_path / "r.html").read_text()
    assert "One scan was segmented. How well has not been measured yet." in page
    assert re.search(r">not personalised: another &lt;contrast&gt;\?</td><td[^>]*>0\.40</td>", page)
    assert "Nothing was trained" not in page

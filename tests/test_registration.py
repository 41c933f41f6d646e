"""Files in, files out: registration and drafts leave sound folders and refuse what they cannot do."""

import gc
import json
import math
import weakref

import fibres
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (its customary name)
from crossing import write_crossings
from phantom import phantom, write_dataset
from scipy import ndimage
from series import NAMES

from fewscan import api, drafting, registration
from fewscan.data import dataset as datasets
from fewscan.data import kinds, places
from fewscan.data.fields import read_field
from fewscan.data.io import read_image, read_labels, read_raw, write_image, write_labelmap
from fewscan.errors import ConfigError, DataError
from fewscan.exporting import export
from fewscan.methods.draft import Draft, nearest
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space import directions
from fewscan.space.deformable import DeformConfig
from fewscan.space.field import warp_labels
from fewscan.space.geometry import Geometry, to_ras

QUICK = RegisterConfig(deform=DeformConfig(shrink=(2, 1), steps=(15, 5)))


@pytest.fixture
def pair(tmp_path):
    """Two scans with labels; the moving one is stored left to right."""
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = 19
    paths = {}
    for name, seed in (("fixed", 0), ("moving", 5)):
        image, label, grid = phantom(seed)
        native = grid if name == "fixed" else Geometry(grid.shape, flipped)
        write_image(np.round(image * 100).astype(np.int16), tmp_path / f"{name}.nii.gz", native=native)
        write_labelmap(label, tmp_path / f"{name}_seg.nii.gz", native=native)
        paths[name], paths[name + "_labels"] = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_seg.nii.gz"
    return paths


def run(pair, out, **more):
    return api.register(
        pair["fixed"], pair["moving"], out, moving_labels=pair["moving_labels"], fixed_labels=pair["fixed_labels"],
        config=QUICK, device="cpu", **more,
    )  # fmt: skip


def test_it_leaves_its_files_on_the_fixed_grid(pair, tmp_path):
    seen = []
    report = run(pair, tmp_path / "out", observe=seen.append)
    out = tmp_path / "out"
    wanted = {*registration.FILES[:3], registration.RECORD, registration.PICTURES, places.LOCAL}
    assert {p.name for p in out.iterdir()} == wanted
    assert all((out / name).is_file() for name in report["pictures"])
    fixed, warped = read_image(pair["fixed"]), read_image(out / "warped.nii.gz")
    np.testing.assert_allclose(warped.geometry.affine, fixed.geometry.affine, atol=1e-5)
    assert warped.data.dtype == np.int16
    assert report["dice"]["mean"]["after"] >= report["dice"]["mean"]["before"]
    assert json.loads((out / registration.RECORD).read_text())["use"] == "research use only"
    assert str(tmp_path) not in (out / registration.RECORD).read_text()
    assert seen[-1].fraction <= 1
    assert json.loads((out / registration.RECORD).read_text())["folding"] == report["folding"]


def test_the_field_on_disk_warps_as_the_registration_did(pair, tmp_path):
    run(pair, tmp_path / "out")
    fixed, moving = read_image(pair["fixed"]), read_labels(pair["moving_labels"])
    field = read_field(tmp_path / "out" / "field.nii.gz", fixed=fixed.geometry)
    again = warp_labels(moving.data, moving.geometry, field=field)
    stored = read_labels(tmp_path / "out" / "warped_labels.nii.gz").data
    assert (again == stored).mean() > 0.999


def test_simpleitk_warps_with_the_field_that_was_asked_for(pair, tmp_path):
    run(pair, tmp_path / "out", itk=True)
    out = tmp_path / "out"
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / "field_itk.nii.gz"), sitk.sitkVectorFloat64))
    fixed, moving = (sitk.ReadImage(str(pair[name]), sitk.sitkFloat32) for name in ("fixed", "moving"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, field, sitk.sitkLinear, 0.0))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "warped.nii.gz"), sitk.sitkFloat32))
    inside = theirs > 0
    assert inside.mean() > 0.5
    assert np.abs(theirs - ours)[inside].mean() < 1.0, "of intensities in hundreds, rounded"
    run(pair, tmp_path / "out")
    assert not (out / "field_itk.nii.gz").exists(), "an earlier field is no part of this answer"


def test_a_second_run_replaces_its_own_files_and_nobody_elses(pair, tmp_path):
    run(pair, tmp_path / "out")
    mine = tmp_path / "out" / "pictures" / "mine.png"
    mine.write_text("precious")
    with_labels = (tmp_path / "out" / "pictures" / "lines.json").read_text()
    api.register(pair["fixed"], pair["moving"], tmp_path / "out", config=QUICK, device="cpu")
    assert not (tmp_path / "out" / "warped_labels.nii.gz").exists()
    assert mine.read_text() == "precious"
    assert "warped_labels" in with_labels
    assert "warped_labels" not in (tmp_path / "out" / "pictures" / "lines.json").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "warped.nii.gz").write_text("precious")
    with pytest.raises(ConfigError, match="not written by fewscan register"):
        run(pair, tmp_path / "mine")
    with pytest.raises(ConfigError, match="might be overwritten"):
        run(pair, tmp_path)
    assert (tmp_path / "mine" / "warped.nii.gz").read_text() == "precious"


@pytest.mark.parametrize("text", ["[1]", "{", '{"method": "theirs"}'])
def test_a_record_of_another_program_is_not_replaced_and_vouches_for_nothing(pair, tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / registration.RECORD).write_text(text)
    with pytest.raises(ConfigError, match=r"registration\.json exists and was not written by .* or move it away"):
        run(pair, out)
    assert (out / registration.RECORD).read_text() == text


def test_no_registration_is_written_among_the_slices_of_a_mixed_folder(pair, tmp_path):
    (tmp_path / "scans" / "p1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="might be overwritten"):
        run(pair | {"moving": tmp_path / "scans" / "p1@4"}, tmp_path / "scans" / "p1")


def test_masks_must_lie_on_the_fixed_scan(pair, tmp_path):
    grid = read_image(pair["fixed"]).geometry
    empty = tmp_path / "empty.nii.gz"
    write_labelmap(np.zeros(grid.shape, np.uint8), empty, native=grid)
    with pytest.raises(DataError, match=r"empty\.nii\.gz: the mask has no voxel"):
        run(pair, tmp_path / "out", fixed_mask=empty)
    whole = tmp_path / "whole.nii.gz"
    write_labelmap(np.ones(grid.shape, np.uint8), whole, native=grid)
    with pytest.raises(DataError, match="leave no voxel"):
        run(pair, tmp_path / "out", fixed_lesion=whole)
    assert not (tmp_path / "out").exists()


def test_a_file_of_several_volumes_is_refused_with_a_way_to_get_one_map(pair, tmp_path):
    image, _, grid = phantom(0)
    write_image(np.stack([image] * 9), tmp_path / "peaks.nii.gz", native=grid)
    with pytest.raises(DataError, match=r"peaks\.nii\.gz: holds 9 volumes, but register takes one .*DIR/fa\.nii\.gz"):
        api.register(pair["fixed"], tmp_path / "peaks.nii.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["peaks", "tensor"])
def test_directions_are_brought_along_turned(kind, tmp_path):
    c, s = math.cos(0.4), math.sin(0.4)
    turn, middle = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), (np.array(fibres.SHAPE) - 1) / 2
    tilted = np.eye(4)
    tilted[:3, :3], tilted[:3, 3] = turn, middle - turn @ middle
    data, label = fibres.clumps(1, kind=kind)
    if kind == "tensor":
        full = np.einsum("ik,klxyz,jl->ijxyz", turn, data[np.array(directions.PLACE)], turn)
        turned = np.stack([full[i, j] for i, j in directions.ORDER])
    else:
        turned = np.einsum("ij,njxyz->nixyz", turn, data.reshape(3, 3, *fibres.SHAPE)).reshape(data.shape)
    paths = [tmp_path / "data" / f"{name}.nii.gz" for name in ("fixed", "moving")]
    for path, values, affine in zip(paths, (data, turned), (np.eye(4), tilted), strict=True):
        write_image(values.astype(np.float32), path, native=Geometry(fibres.SHAPE, affine))
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"channel_kind": kind}))
    config = RegisterConfig(transform="rigid")
    report = api.register(*paths, tmp_path / "out", config=config, device="cpu")
    np.testing.assert_allclose(np.array(report["matrix"])[:3, :3], turn, atol=0.03)  # the same anatomy, tilted
    warped, native = read_raw(tmp_path / "out" / "warped.nii.gz")
    assert kinds.kind_of_file(tmp_path / "out" / "warped.nii.gz", channels=len(warped)) == kind
    inside = ndimage.binary_erosion(label > 0, iterations=2)
    strongest = [principal(values, kind)[inside] for values in (data, to_ras(warped, native)[0], turned)]
    still, brought, unturned = (np.abs((way * strongest[0]).sum(-1)) for way in strongest)
    assert np.median(still) == pytest.approx(1, abs=1e-5)
    assert np.degrees(np.arccos(np.median(brought))) < 5  # noise is averaged, too
    assert np.degrees(np.arccos(np.median(unturned))) > 12
    page = api.report(tmp_path / "out", tmp_path / "report.html").read_text()
    assert "moving scan, registered" in page


def principal(values, kind):
    """Unit direction of the first peak, or of the largest diffusion, (X, Y, Z, 3)."""
    if kind == "tensor":
        return np.linalg.eigh(np.moveaxis(values, 0, -1)[..., np.array(directions.PLACE)])[1][..., 2]
    first = np.moveaxis(values[:3], 0, -1)
    return first / np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), 1e-9)


def test_what_cannot_be_registered_together_is_said(pair, untrained, tmp_path):
    root = fibres.write_fibres(tmp_path / "peaks")
    peaks = root / "images" / "case_00.nii.gz"
    with pytest.raises(
        DataError, match=r"fixed\.nii\.gz: holds intensities in 1 .*case_00\.nii\.gz peaks of fibres in 9 .*fa"
    ):
        api.register(peaks, pair["fixed"], tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"case_00\.nii\.gz: holds peaks of fibres, and a network .*leave out --model"
    ):
        api.register(peaks, root / "images" / "case_01.nii.gz", tmp_path / "out", model=untrained)
    masks = write_crossings(tmp_path / "bundles", labelled=1) / "case_0" / "bundle_segmentations"
    for folder in (masks, masks.parent):
        with pytest.raises(
            DataError, match=r"masks that may overlap; register brings one along .*bundle_segmentations/CC\.nii"
        ):
            api.register(pair["fixed"], pair["moving"], tmp_path / "out", moving_labels=folder)
    assert not (tmp_path / "out").exists()


def test_labels_of_another_place_are_refused(pair, tmp_path):
    far = np.eye(4)
    far[:3, 3] = 5000
    label = read_labels(pair["moving_labels"]).data
    write_labelmap(label, tmp_path / "far.nii.gz", native=Geometry(label.shape, far))
    with pytest.raises(DataError, match=r"far\.nii\.gz: none of its labels reaches"):
        api.register(
            pair["fixed"], pair["moving"], tmp_path / "out", moving_labels=tmp_path / "far.nii.gz", config=QUICK,
            device="cpu",
        )  # fmt: skip


def test_drafts_come_with_leave_one_out_figures(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert record["leave_one_out"]["n"] == 2
    assert 0.5 < record["leave_one_out"]["dice"] <= 1
    labels = list((tmp_path / "out" / "labels").iterdir())
    assert len(labels) == 1
    assert read_labels(labels[0]).data.any()
    assert "Leave-one-out Dice" in record["sentence"]
    again = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert again["leave_one_out"]["dice"] == record["leave_one_out"]["dice"]


def test_one_atlas_drafts_without_a_figure_and_strangers_are_left_alone(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert record["leave_one_out"]["dice"] is None
    assert "nothing tells how good" in record["sentence"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(ConfigError, match="not written by fewscan draft"):
        api.draft(data, tmp_path / "mine", config=QUICK, device="cpu")


@pytest.fixture
def painted(monkeypatch):
    """Drafts without registration; the case whose first voxel is ``bad`` is of another body part."""

    def fake(scan, atlases, **how):
        if scan.data[0, 0, 0, 0] == 99:
            raise DataError("all 2 atlases fold on this scan; is it of the same body part as they are?")
        return Draft(atlases[0].label.data, np.ones(scan.data.shape[1:], np.float32), {})

    monkeypatch.setattr(drafting.drafts, "draft", fake)


def spoil(data, case):
    """Mark a scan as one that no atlas fits."""
    path = data / "images" / f"{case}.nii.gz"
    scan = read_image(path)
    scan.data[0, 0, 0, 0] = 99
    write_image(scan.data[0], path, native=scan.native)


def test_a_scan_that_cannot_be_drafted_does_not_cost_the_others_theirs(tmp_path, painted):
    data, lines = write_dataset(tmp_path / "data", labelled=3, unlabelled=3), []
    cases = sorted(p.name[:-7] for p in (data / "images").iterdir())
    labelled = sorted(p.name[:-7] for p in (data / "labels").iterdir())
    first, second, third = (case for case in cases if case not in labelled)
    spoil(data, second)
    spoil(data, labelled[0])
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu", observe=lines.append)
    assert sorted(p.name[:-7] for p in (tmp_path / "out" / "labels").iterdir()) == [first, third]
    assert "atlases fold" in record["cases"][second]["failed"]
    assert list(record["leave_one_out"]["failed"]) == [labelled[0]]
    assert record["leave_one_out"]["n"] == 2
    assert f"1 could not be drafted: {second}." in record["sentence"]
    assert record["sentence"].startswith("2 scan(s) drafted")
    told = [line for line in lines if isinstance(line, str)]
    assert [line.split("; ")[0] for line in told] == [
        f"{second}: not drafted", f"leave one out: {labelled[0]}: not drafted",
    ]  # fmt: skip
    for case in (first, third):
        spoil(data, case)
    with pytest.raises(DataError, match=f"none of 3 scans could be drafted; {first}: all 2 atlases fold"):
        api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert json.loads((tmp_path / "out" / drafting.RECORD).read_text())["cases"].keys() == {first, second, third}


def test_two_scans_of_one_patient_tell_nothing_of_each_other(tmp_path, painted):
    data = write_dataset(tmp_path / "data", labelled=2)
    for path in [*(data / "images").iterdir(), *(data / "labels").iterdir()]:
        path.rename(path.with_name(path.name.replace("case_0", "case_ses-")))
    with pytest.raises(DataError, match="labelled scans of one patient and nothing else"):
        api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert not (tmp_path / "out").exists()


def test_no_more_labelled_scans_are_held_than_vote_and_they_are_the_most_alike(tmp_path, monkeypatch):
    data = datasets.find(write_dataset(tmp_path / "data", labelled=7, unlabelled=2))
    whole = {files.id: drafting.load(files, data) for files in data.cases}
    read, asked, alive, real = [], {}, [], drafting.load

    def load(files, dataset):
        case = real(files, dataset)
        read.append(weakref.ref(case))
        return case

    def fake(scan, atlases, **how):
        gc.collect()
        alive.append(sum(case() is not None for case in read))
        (own,) = [name for name, case in whole.items() if np.array_equal(case.image.data, scan.data)]
        asked[own] = [atlas.id for atlas in atlases]
        return Draft(atlases[0].label.data, np.ones(scan.data.shape[1:], np.float32), {})

    monkeypatch.setattr(drafting, "load", load)
    monkeypatch.setattr(drafting.drafts, "MOST_ATLASES", 3)
    monkeypatch.setattr(drafting.drafts, "draft", fake)
    api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert max(alive) <= 5  # those that vote, the scan, and the one before it
    for own, names in asked.items():
        pool = [whole[files.id] for files in data.labelled if files.id != own]
        assert names == [case.id for case in nearest(whole[own].image, pool, most=3)]


def test_across_modalities_the_record_says_how_votes_were_weighted(tmp_path, painted):
    data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
    config = RegisterConfig(deform=DeformConfig(similarity="mind"))
    assert api.draft(data, tmp_path / "out", config=config, device="cpu")["fusion"] == "majority"


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_dicom_labels_lie_on_the_series_of_their_scan(case, tmp_path, kind):
    folder, file = case()
    drawn = tmp_path / "drawn.dcm"
    export(file, drawn, kind=kind, source=folder)
    still = RegisterConfig(transform="rigid")
    report = api.register(
        folder, folder, tmp_path / "out", moving_labels=drawn, fixed_labels=drawn, fixed_mask=drawn, config=still,
        device="cpu",
    )  # fmt: skip
    assert set(report["dice"]["labels"]) == set(NAMES.values())
    assert report["dice"]["mean"]["before"] == 1.0
    with pytest.raises(ConfigError, match="two of one kind"):
        api.register(
            folder, folder, tmp_path / "mixed", moving_labels=file, fixed_labels=drawn, config=still, device="cpu"
        )


def test_drafts_that_were_corrected_in_place_are_not_erased(tmp_path, painted):
    data, out = write_dataset(tmp_path / "data", labelled=1, unlabelled=2), tmp_path / "out"
    api.draft(data, out, config=QUICK, device="cpu")
    mine = sorted((out / "labels").iterdir())[1]
    label = read_labels(mine)
    label.data[0, 0, 0] = 1
    write_labelmap(label.data, mine, native=label.geometry)
    corrected = mine.read_bytes()
    with pytest.raises(ConfigError, match=rf"{mine.name}: is not as it was drafted; move your corrections"):
        api.draft(data, out, config=QUICK, device="cpu")
    assert mine.read_bytes() == corrected
    assert len(list((out / "labels").iterdir())) == 2
    (out / drafting.RECORD).write_text("{}")  # whatever became of the record
    with pytest.raises(ConfigError, match="is not as it was drafted"):
        api.draft(data, out, config=QUICK, device="cpu")
    for path in (out / "labels").iterdir():
        path.rename(tmp_path / path.name)
    api.draft(data, out, config=QUICK, device="cpu")
    assert len(list((out / "labels").iterdir())) == 2


def test_nothing_to_draft_is_refused(tmp_path):
    with pytest.raises(DataError, match="one labelled scan and nothing else"):
        api.draft(write_dataset(tmp_path / "data", labelled=1), tmp_path / "out", config=QUICK, device="cpu")
    assert drafting.RECORD == "draft.json"

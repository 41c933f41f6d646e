"""Made-up people: directions follow warps, tumours push as they should, twins differ in one thing, runs resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from phantoms import brain, table
from typer.testing import CliRunner

from fewscan import cli
from fewscan.data.bundles import bundle_files
from fewscan.data.fields import read_field
from fewscan.errors import ConfigError, DataError
from fewscan.space.field import Field, determinant, from_matrix
from fewscan.space.geometry import Geometry
from fewscan.space.orientation import prove
from fewscan.tracts.anatomy import (
    Anatomy,
    Person,
    Tumour,
    Variation,
    about_middle,
    made_up,
    portrayed,
    push,
    read_anatomy,
    warped,
)
from fewscan.tracts.cohort import make_cohort, scan_of
from fewscan.tracts.estimate import fit_tensors
from fewscan.tracts.inputs import fill
from fewscan.tracts.population import HARD, SPLITS, A, B, CohortConfig, Protocol, Render, plan
from fewscan.tracts.scanner import scanned

REAL = brain()
QUICK = Protocol(name="A", directions=(15, 15), b=(1000.0, 1000.0), snr=30.0)
CONFIG = CohortConfig(
    train=1, val=0, pool=1, test=1, protocols=(QUICK, replace(QUICK, name="B", snr=12.0, angle_deg=3.0, shift_mm=2.0)),
    radius_mm=(8.0, 10.0), far_mm=12.0, bundles=("CC", "AF_left", "AF_right"),
)  # fmt: skip
STILL = Person(field=from_matrix(np.eye(4), REAL.geometry), mirror=False, fraction=(1.0, 1.0, 1.0), diffusivity=1.0)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between directions along the first axis, sign ignored."""
    unit = [v / np.maximum(np.linalg.norm(v, axis=0), 1e-9) for v in (a, b)]
    return np.degrees(np.arccos(np.clip(np.abs((unit[0] * unit[1]).sum(0)), 0, 1)))


def turn(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def test_rotating_the_person_rotates_the_directions() -> None:
    field = from_matrix(about_middle(turn(90), REAL.geometry), REAL.geometry)
    found = warped(REAL, field)
    inside = (found.f[0] > 0) & (found.f[1] == 0)
    back = from_matrix(about_middle(turn(-90), REAL.geometry), REAL.geometry)
    again = warped(found, back)
    kept = inside & (REAL.f[0] > 0) & (again.f[0] > 0)
    assert kept.sum() > 100
    assert angles(again.v[:3], REAL.v[:3])[kept].max() < 0.1
    # pulled back by a turn of +90 degrees, tissue and its directions turn by -90
    source = found.v[:3][:, inside]
    x, y, z = np.argwhere(inside).T
    n = (np.array(REAL.geometry.shape) - 1) / 2
    place = np.rint(turn(90) @ (np.stack([x, y, z]) - n[:, None]) + n[:, None]).astype(int)
    assert angles(turn(90) @ source, REAL.v[:3][(slice(None), *place)]).max() < 0.1


def test_a_mirrored_person_has_mirrored_directions_and_swapped_sides() -> None:
    field = from_matrix(about_middle(np.diag([-1.0, 1, 1]), REAL.geometry), REAL.geometry)
    found = warped(REAL, field, mirror=True)
    np.testing.assert_array_equal(found.bundles["AF_left"], REAL.bundles["AF_right"][::-1])
    mirrored = REAL.v[:3, ::-1] * np.array([-1, 1, 1]).reshape(3, 1, 1, 1)
    fibre = found.f[0] > 0
    assert angles(found.v[:3], mirrored)[fibre].max() < 0.1


@pytest.mark.parametrize("variation", [Variation(), HARD])
def test_people_differ_do_not_fold_and_come_again_with_the_seed(variation: Variation) -> None:
    people = [made_up(REAL, np.random.default_rng(seed), variation=variation) for seed in (0, 1, 0)]
    np.testing.assert_array_equal(people[0].field.u, people[2].field.u)
    assert np.abs(people[0].field.u - people[1].field.u).mean() > 1
    for person in people[:2]:
        found = determinant(torch.from_numpy(person.field.u)[None])[0].numpy() * (-1 if person.mirror else 1)
        assert (found[REAL.mask] > 0).all()
        anatomy = portrayed(REAL, person)[0]
        assert (anatomy.f.sum(0) <= 1 + 1e-5).all()
        lengths = np.linalg.norm(anatomy.v[:3], axis=0)[anatomy.f[0] > 0]
        np.testing.assert_allclose(lengths, 1, atol=1e-4)


def test_hard_people_differ_more_and_in_smaller_parts() -> None:
    moved, rough = [], []
    for variation in (Variation(affine=0.0), replace(HARD, affine=0.0)):
        people = [made_up(REAL, np.random.default_rng(seed), variation=variation) for seed in range(8)]
        fields = np.stack([p.field.millimetres() for p in people if not p.mirror])
        moved.append(np.sqrt((fields**2).sum(1)[:, REAL.mask].mean()))
        slopes = np.stack(np.gradient(fields, 3.0, axis=(2, 3, 4)))
        rough.append(np.sqrt((slopes**2).sum((0, 2))[:, REAL.mask].mean()))
    assert moved[1] > 1.2 * moved[0]
    assert rough[1] / moved[1] > 1.1 * rough[0] / moved[0]


def test_hard_people_are_asked_for_by_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CohortConfig] = []

    def make(real: Anatomy, out: Path, *, config: CohortConfig, **how: object) -> dict[str, object]:
        asked.append(config)
        return {"made": 0, "cases": []}

    monkeypatch.setattr("fewscan.tracts.anatomy.read_anatomy", lambda path: REAL)
    monkeypatch.setattr("fewscan.tracts.cohort.make_cohort", make)
    for flags in ([], ["--hard"]):
        done = CliRunner().invoke(cli.app, ["tracts", "cohort", "a.npz", "-o", str(tmp_path), *flags])
        assert done.exit_code == 0, done.output
    assert [config.variation for config in asked] == [Variation(), Variation(sigma_mm=12.0, rms_mm=8.0)]
    assert replace(asked[1], variation=Variation()) == asked[0]


@pytest.mark.parametrize("radius", [6.0, 12.0])
def test_a_tumour_pushes_outward_less_with_distance_and_never_folds(radius: float) -> None:
    field = push(Tumour(centre_mm=(10.0, 5.0, 0.0), radius_mm=radius), REAL.mask, geometry=REAL.geometry)
    mm, grid = field.millimetres(), REAL.geometry
    length = np.linalg.norm(mm, axis=0)
    places = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")).reshape(3, -1)
    away = (grid.affine[:3, :3] @ places + grid.affine[:3, 3:]).reshape(3, *grid.shape) - np.array([10, 5, 0])[
        :, None, None, None
    ]
    assert ((mm * away).sum(0) <= 1e-4).all()  # what is read lay nearer to the centre
    assert 0.6 * radius < length.max() <= radius
    assert not length[~REAL.mask].any()
    assert float(determinant(torch.from_numpy(field.u)[None]).min()) > 0
    r = np.linalg.norm(away, axis=0)
    assert length[REAL.mask & (r > 35)].max(initial=0) < 0.4 * length.max()


def test_the_core_holds_no_bundle_and_thinned_fibres() -> None:
    tumour = Tumour(centre_mm=(0.0, 4.0, 8.0), radius_mm=9.0)
    patient, displacement, lesion = portrayed(REAL, STILL, tumour=tumour)
    assert (lesion == 1).sum() > 50
    assert not any((mask & (lesion == 1)).any() for mask in patient.bundles.values())
    healthy = warped(REAL, displacement)
    some = (lesion > 0) & (healthy.f[0] > 0)
    np.testing.assert_allclose(
        (patient.f[0] / np.maximum(healthy.f[0], 1e-9))[some], np.where(lesion[some] == 1, 0.15, 0.6), rtol=1e-4
    )


def test_a_tumour_of_no_size_changes_nothing() -> None:
    person = made_up(REAL, np.random.default_rng(3), variation=Variation())
    healthy, _, _ = portrayed(REAL, person)
    patient, displacement, lesion = portrayed(REAL, person, tumour=Tumour(centre_mm=(0.0, 0, 0), radius_mm=0.0))
    assert not displacement.u.any()
    assert not lesion.any()
    for name in ("f", "v", "s0", "d", "mask"):
        np.testing.assert_array_equal(getattr(healthy, name), getattr(patient, name))


def test_the_signal_is_that_of_ball_and_sticks() -> None:
    gradients = table(15)
    dwi = scanned(REAL, gradients, rng=np.random.default_rng(0), snr=1e9)
    place = tuple(np.argwhere((REAL.f[0] > 0) & (REAL.f[1:].sum(0) == 0))[7])
    f, v = REAL.f[(0, *place)], REAL.v[(slice(3), *place)]
    for b, g, found in zip(gradients.bvals, gradients.directions, dwi[(slice(None), *place)], strict=True):
        wanted = 1000 * ((1 - f) * np.exp(-b * 1.4e-3) + f * np.exp(-b * 1.4e-3 * (v @ g) ** 2))
        assert found == pytest.approx(wanted, rel=1e-3)


def test_noise_has_the_asked_level_and_thick_slices_blur() -> None:
    clean, noisy, thick = (
        scanned(REAL, table(6), rng=np.random.default_rng(0), snr=snr, slice_mm=mm)[0]
        for snr, mm in ((1e9, 0), (20, 0), (1e9, 6.0))
    )
    assert (noisy - clean)[REAL.mask].std() == pytest.approx(1000 / 20, rel=0.1)
    edge = REAL.mask & ~np.roll(REAL.mask, 1, axis=2)
    assert np.abs(thick - clean)[edge].mean() > 50
    assert np.abs(thick - clean)[REAL.mask & ~edge & ~np.roll(edge, -1, 2)].mean() < 50


def twin(config: CohortConfig, protocol: int, tumour: bool) -> tuple[np.ndarray, Anatomy, Field]:
    render = Render(split="test", person=2, protocol=protocol, tumour=tumour)
    anatomy, _, dwi, displacement, _, _ = scan_of(REAL, render, config=config)
    return dwi, anatomy, displacement


def test_with_one_protocol_for_both_there_is_no_systematic_difference() -> None:
    same = replace(CONFIG, protocols=(QUICK, QUICK))
    np.testing.assert_array_equal(twin(same, 0, False)[0], twin(same, 1, False)[0])
    assert not np.allclose(twin(CONFIG, 0, False)[0][0], twin(CONFIG, 1, False)[0][0])


def test_with_radius_zero_there_is_no_tumour_difference() -> None:
    none = replace(CONFIG, radius_mm=(0.0, 0.0))
    np.testing.assert_array_equal(twin(none, 1, False)[0], twin(none, 1, True)[0])


def test_twins_share_their_noise() -> None:
    healthy, patient = twin(CONFIG, 0, False), twin(CONFIG, 0, True)
    far = (np.linalg.norm(patient[2].u, axis=0) == 0) & healthy[1].mask
    assert far.any()
    np.testing.assert_array_equal(healthy[0][:, far], patient[0][:, far])


def test_a_far_tumour_leaves_its_target_alone_and_a_near_one_does_not() -> None:
    truths = [scan_of(REAL, Render(split="pool", person=n, protocol=0, tumour=True), config=CONFIG)[-1] for n in (2, 3)]
    assert [t["target"]["kind"] for t in truths] == ["near", "far"]
    near, far = (t["bundles"][t["target"]["bundle"]] for t in truths)
    assert near["from_core_mm"] <= 6 < 12 <= far["from_core_mm"] + REAL.geometry.spacing[0]
    assert near["largest_displacement_mm"] > far["displacement_mm"]


def test_a_wrong_sign_of_x_hurts() -> None:
    """The null control of the geometry: with one axis reversed the fitted directions no longer fit the sticks."""
    gradients = table(15)
    dwi = scanned(REAL, gradients, rng=np.random.default_rng(0), snr=40.0)
    signal = np.ascontiguousarray(dwi[:, REAL.mask].T)
    one = (REAL.f[1] > 0) & (REAL.f[[0, 2]].sum(0) == 0)
    wrong = replace(gradients, directions=gradients.directions * [1, -1, 1])
    error = []
    for used in (gradients, wrong):
        tensors = fit_tensors(signal, used)
        principal = fill(tensors.principal, REAL.mask)
        error.append(np.median(angles(principal, REAL.v[3:6])[one]))
    assert error[0] < 5 < 20 < error[1]
    assert prove(principal, fill(tensors.fa[:, None], REAL.mask)[0], geometry=REAL.geometry).axes == "x,-y,z"


def test_splits_share_no_person_and_test_people_are_scanned_four_times() -> None:
    found = plan(CohortConfig())
    people = {split: {r.person for r in found if r.split == split} for split in SPLITS}
    assert [len(people[split]) for split in SPLITS] == [24, 6, 8, 12]
    assert len(set().union(*people.values())) == 50
    assert len(found) == 24 + 6 + 8 + 4 * 12
    assert len({r.folder(CohortConfig()) for r in found}) == len(found)
    assert {(r.protocol, r.tumour) for r in found if r.split == "pool"} == {(1, True)}


def test_a_cohort_is_written_once_resumes_and_keeps_its_plan(tmp_path: Path) -> None:
    config, lines = replace(CONFIG, train=1, pool=1, test=0), []

    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cohort(REAL, tmp_path / "c", config=config, tell=interrupted)
    assert not json.loads((tmp_path / "c" / "cohort.json").read_text())["complete"]
    assert make_cohort(REAL, tmp_path / "c", config=config, tell=lines.append)["complete"]
    assert [line.split(",")[0] for line in lines] == ["2 of 2: pool/p001_B_tumour"]
    patient = tmp_path / "c" / "pool" / "p001_B_tumour"
    truth = json.loads((patient / "case.json").read_text())
    assert sorted(bundle_files(patient)) == ["AF_left", "AF_right", "CC"]
    field = read_field(patient / "displacement.nii.gz", fixed=REAL.geometry)
    made = scan_of(REAL, plan(config)[1], config=config)
    np.testing.assert_allclose(field.u, made[3].u, atol=1e-4)
    assert truth["bundles"].keys() == {"CC", "AF_left", "AF_right"}
    assert json.loads((tmp_path / "c" / "cohort.json").read_text())["limits"]
    assert make_cohort(REAL, tmp_path / "c", config=config)["made"] == 0
    with pytest.raises(ConfigError, match="another plan or anatomy"):
        make_cohort(REAL, tmp_path / "c", config=replace(config, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.docx").write_bytes(b"")
    with pytest.raises(ConfigError, match="something else"):
        make_cohort(REAL, tmp_path / "mine", config=config)


def test_a_cohort_of_another_anatomy_is_not_taken_for_this_one(tmp_path: Path) -> None:
    config = replace(CONFIG, train=1, pool=0, test=0)
    make_cohort(REAL, tmp_path / "c", config=config)
    moved = REAL.geometry.affine + np.outer([1.0, 0, 0, 0], [0, 0, 0, 1.0])
    masks = replace(REAL, bundles=REAL.bundles | {"CC": np.roll(REAL.bundles["CC"], 1, axis=0)})
    for other in (masks, replace(REAL, geometry=Geometry(REAL.geometry.shape, moved))):
        with pytest.raises(ConfigError, match="another plan or anatomy"):
            make_cohort(other, tmp_path / "c", config=config)


def files_of(cohort: Path) -> dict[str, bytes]:
    """Everything in a cohort but its record and those that hold a date or a duration."""
    return {
        path.relative_to(cohort).as_posix(): path.read_bytes()
        for path in sorted(cohort.rglob("*.*"))
        if path.name not in ("cohort.json", "inputs.json")
    }


def test_several_processes_write_the_same_files_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    config = replace(CONFIG, train=2, pool=1, test=0)
    make_cohort(REAL, tmp_path / "one", config=config)
    lines: list[str] = []

    def interrupted(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cohort(REAL, tmp_path / "two", config=config, jobs=2, tell=interrupted)
    assert len(lines) == 1
    assert not json.loads((tmp_path / "two" / "cohort.json").read_text())["complete"]
    there = {path.parent for path in (tmp_path / "two").rglob("case.json")}
    assert 1 <= len(there) <= 3
    record = make_cohort(REAL, tmp_path / "two", config=config, jobs=2)
    assert record["complete"]
    assert record["made"] == 3 - len(there)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    with pytest.raises(ConfigError, match="jobs must be at least 1, got 0"):
        make_cohort(REAL, tmp_path / "two", config=config, jobs=0)


def test_an_anatomy_is_read_in_ras_order_and_faults_are_named(tmp_path: Path) -> None:
    names = list(REAL.bundles)
    arrays = {
        "mask": REAL.mask[::-1], "S0": REAL.s0[::-1], "d": REAL.d[::-1],
        "f": np.moveaxis(REAL.f, 0, -1)[::-1],
        "v": REAL.v.transpose(1, 2, 3, 0).reshape(*REAL.mask.shape, 3, 3)[::-1],
        "bundle_names": np.array(names),
        "bundles_ref": np.packbits(np.stack([REAL.bundles[n][::-1] for n in names]), axis=0),
    }  # fmt: skip
    affine = REAL.geometry.affine @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = REAL.geometry.affine[:3, 3] + REAL.geometry.affine[:3, 0] * (REAL.mask.shape[0] - 1)
    np.savez(tmp_path / "a.npz", affine=affine, **arrays)
    found = read_anatomy(tmp_path / "a.npz")
    for name in ("mask", "s0", "d", "f", "v"):
        np.testing.assert_allclose(getattr(found, name), getattr(REAL, name))
    np.testing.assert_array_equal(found.bundles["AF_left"], REAL.bundles["AF_left"])
    np.testing.assert_allclose(found.geometry.affine, REAL.geometry.affine)
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(DataError, match="holds no affine"):
        read_anatomy(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_text("no")
    with pytest.raises(DataError, match="not an anatomy"):
        read_anatomy(tmp_path / "c.npz")
    whole, faults = (tmp_path / "a.npz").read_bytes(), {}
    for size in (0, 100, len(whole) // 2, len(whole) - 40):  # as a copy that was broken off
        (tmp_path / "d.npz").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"d\.npz: not an anatomy .*; give a \.npz file"):
            read_anatomy(tmp_path / "d.npz")
    np.save(tmp_path / "e.npy", REAL.s0)
    with pytest.raises(DataError, match=r"e\.npy: not an anatomy"):
        read_anatomy(tmp_path / "e.npy")
    faults["bundles_ref"] = [(arrays["bundles_ref"][:, 1:], "bundles_ref is .* expected"),
                             (arrays["bundles_ref"].astype(int), "bundles_ref is int64; pack")]  # fmt: skip
    faults["affine"] = [(affine[:3], r"affine is \(3, 4\), \(4, 4\) expected"), (affine * np.nan, "affine holds NaN")]
    faults["d"] = [(np.where(REAL.mask, np.inf, 0), "d holds NaN, infinite")]
    for key, rows in faults.items():
        for value, sentence in rows:
            np.savez(tmp_path / "f.npz", **{"affine": affine, **arrays, key: value})
            with pytest.raises(DataError, match=rf"f\.npz: {sentence}"):
                read_anatomy(tmp_path / "f.npz")
    done = CliRunner().invoke(cli.app, ["tracts", "cohort", str(tmp_path / "a.npz"), "-o", str(tmp_path / "o")])
    assert isinstance(done.exception, DataError)
    assert "has no bundle" in str(done.exception)


def test_the_default_protocols_are_those_of_the_plan() -> None:
    assert (A.directions, A.b, A.snr) == ((32, 32), (1000.0, 1000.0), 30.0)
    assert (B.directions, B.b, B.snr, B.slice_mm) == ((15, 20), (700.0, 800.0), 12.0, 5.0)

"""Do the estimators of the shift card, which see no twins, measure what the twins know?

    python benchmarks/tract_shift.py --data ../shared/data/tracts --model MODEL --work COHORT [--image scalars]

On the cohort of ``tracts.py`` each test person is scanned four times, {A, B} x {healthy, tumour}, and the displacement
by the tumour is known. The card's estimators get one scan at a time, its lesion mask, and healthy people under A:

* ``rank``: Spearman's correlation, over the persons' two scans with a tumour, of each lesion measure with the true mean
  displacement within 15 mm of the lesion. ``rank_low`` is the lower end of its 95 % interval, persons resampled.
* ``protocol``: mean change of a lesion measure from A to B as a share of its change from healthy to tumour; flat is 0.
* ``structures``: the same correlation of what a bundle's expected push (``pushed_mm``, of the bundle as MODEL predicts
  it on that scan) has with its true mean displacement, over bundles of persons; ``structures_low``: persons resampled.
  ``large``: of the bundles that truly moved 3 mm or more the share whose expected push is large enough for the card to
  name them; ``large_false``: that share of the others. The push is read off the lesion's mask: that it follows the
  displacement shows that size and place of a lesion tell much in this cohort, where all tumours push, not that a
  lesion pushes.
* ``systematic``: root mean square of the systematic kinds' distances from the healthy, in their deviations, by twin.
  ``systematic_by_size``: its correlation with the radius of tumours under B, and ``systematic_by_tumour``: its change
  from healthy to tumour as a share of that from A to B; flat is 0 for both.

``--image`` says what is looked at: peaks, tensor or scalars; MODEL takes the same. Nothing is fitted here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle_cohort import KINDS, TWINS, Place, cases_of, subject_of, view
from harness import Key, code_hash, rows
from numpy.typing import NDArray
from scipy.stats import spearmanr

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.data.fields import read_field
from fewscan.data.io import read_labels, sha256
from fewscan.judge import lesions, looks, shift
from fewscan.learn import infer
from fewscan.learn.channels import to_look_at
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import pick
from fewscan.shifting import TEMPLATES
from fewscan.space.volume import Volume
from fewscan.surroundings import deformation_around
from fewscan.tracts.anatomy import read_anatomy
from fewscan.tracts.cohort import CASE, DISPLACEMENT, LESION
from fewscan.tracts.population import CohortConfig

RESULT = "tract_shift.json"
MEASURES = ("excess", "displacement_mm", "turned_deg", "pushed_mm")
RESAMPLES = 2000
MOVED_MM = 3.0  # from which a bundle counts as displaced
PARTS = ("shifting.py", "judge/lesions.py", "tracts/cohort.py")

Floats = NDArray[np.float64]
Table = dict[str, dict[str, dict[str, float]]]  # person to twin to figures


def scans(cases: list[Path], out: Path, *, kind: str) -> dict[str, Volume]:
    """Scans of these cases by name."""
    data = api.open(view(cases, out, kind=kind))
    return {case.id: datasets.load(case, data).image for case in data.cases}


def lesion_of(case: Path) -> NDArray[np.bool_]:
    """Core and oedema."""
    found: NDArray[np.bool_] = read_labels(case / LESION).data > 0
    return found


def moved_mm(case: Path, lesion: NDArray[np.bool_], image: Volume) -> float:
    """True mean displacement of the tissue near the lesion."""
    field = read_field(case / DISPLACEMENT, fixed=image.geometry)
    length = np.linalg.norm(field.millimetres(), axis=0)
    away = looks.distance_mm(lesion, image.geometry.spacing)
    return lesions.near_and_far(length, away, mask=looks.tissue(image.data[0]))[0]


def table_of(cohort: Path, work: Path, model: Model, *, kind: str) -> Table:
    """Every figure of every scan of the test people."""
    train = scans(cases_of(cohort, "train"), work / f"{kind}_shift_train", kind=kind)
    templates = [to_look_at(image) for image in list(train.values())[:TEMPLATES]]
    usual = [looks.look(image, model, case=name) for name, image in train.items()]
    tests = cases_of(cohort, "test")
    seen = scans(tests, work / f"{kind}_shift_test", kind=kind)
    folders = {subject_of(case): case for case in tests}
    found: Table = {}
    for (person, twin), case in folders.items():
        image = seen[case.name]
        ill = folders[person, twin.replace("healthy", "tumour")]  # the place of the lesion in the healthy twin too
        lesion = lesion_of(ill)
        row = dict(deformation_around(to_look_at(image), lesion, templates=templates))
        hidden = lesion if twin.endswith("tumour") else None
        healthy = twin.endswith("healthy")
        effect = lesions.mass_effect_mm(lesion & (not healthy), image.geometry.spacing)
        away = looks.distance_mm(lesion, image.geometry.spacing)
        row["pushed_mm"] = lesions.near_and_far(effect, away, mask=looks.tissue(to_look_at(image).data[0]))[0]
        row["systematic"] = distance(looks.look(image, model, case=case.name, lesion=hidden), usual)
        if twin.endswith("tumour"):
            row["true_mm"] = moved_mm(case, lesion, to_look_at(image))
            row["radius_mm"] = float(json.loads((case / CASE).read_text())["tumour"]["radius_mm"])
            row |= of_structures(case, image, lesion, model=model)
        found.setdefault(person, {})[twin] = {name: round(value, 4) for name, value in row.items()}
        print(person, twin, found[person][twin], flush=True)
    return found


def of_structures(case: Path, image: Volume, lesion: NDArray[np.bool_], *, model: Model) -> dict[str, float]:
    """Of each bundle that is left, how far it truly moved and how far the card expects it to."""
    truth = json.loads((case / CASE).read_text())["bundles"]
    seen = dataclasses.replace(image, channels=model.plan.channels)
    answer = infer.segment(model, seen, predictor=infer.torch_predictor(model, pick("cpu")))
    effect = lesions.mass_effect_mm(lesion, image.geometry.spacing)
    found = {}
    for value, name in model.names.items():
        mask = answer.mask(value, model.plan) & ~lesion
        if mask.any() and truth.get(name, {}).get("displacement_mm") is not None:
            found |= {
                f"true {name}": float(truth[name]["displacement_mm"]),
                f"pushed {name}": float(effect[mask].mean()),
            }
    return found


def ranked(table: Table) -> dict[str, float]:
    """How the expected push of bundles goes with how far they moved, over both protocols."""
    people = [
        np.array([
            (row[name], row[f"pushed {name.removeprefix('true ')}"])
            for row in (twins[TWINS[1]], twins[TWINS[3]]) for name in row if name.startswith("true ")
        ])
        for twins in table.values()
    ]  # fmt: skip
    every, rng = np.concatenate(people), np.random.default_rng(0)
    again = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([people[i] for i in rng.integers(0, len(people), len(people))])
        again.append(float(spearmanr(drawn[:, 0], drawn[:, 1])[0]))
    moved, named = every[:, 0] >= MOVED_MM, every[:, 1] >= lesions.PUSHED_MM
    return {
        "structures": round(float(spearmanr(every[:, 0], every[:, 1])[0]), 3),
        "structures_low": round(float(np.nanquantile(again, 0.025)), 3),
        "large": round(float(named[moved].mean()), 3), "large_n": int(moved.sum()),
        "large_false": round(float(named[~moved].mean()), 3),
    }  # fmt: skip


def distance(one: looks.Look, usual: list[looks.Look]) -> float:
    """Root mean square over kinds of a scan's distance from healthy ones, of each kind the axis that differs most."""
    found = []
    for kind, floor in shift.FLOORS.items():
        if kind in one.numbers and kind not in shift.GEOMETRIC:
            known = np.stack([look.numbers[kind] for look in usual])
            z = (one.numbers[kind] - known.mean(0)) / np.maximum(known.std(0, ddof=1), floor)
            found.append(float(np.abs(z).max()))
    return float(np.sqrt(np.mean(np.square(found))))


def column(table: Table, twin: str, name: str) -> Floats:
    """One figure of one twin of each person."""
    return np.array([twins[twin][name] for twins in table.values()])


def rank(table: Table, measure: str) -> tuple[float, float]:
    """Correlation of a measure with the true displacement over both protocols, and the lower end of its interval."""
    pairs = [
        np.stack([column(table, twin, "true_mm"), column(table, twin, measure)], 1) for twin in (TWINS[1], TWINS[3])
    ]
    whole = np.stack(pairs, 1)  # persons, protocols, two figures
    rng = np.random.default_rng(0)
    again = []
    for _ in range(RESAMPLES):
        drawn = whole[rng.integers(0, len(whole), len(whole))].reshape(-1, 2)
        again.append(float(spearmanr(drawn[:, 0], drawn[:, 1])[0]))
    every = whole.reshape(-1, 2)
    return float(spearmanr(every[:, 0], every[:, 1])[0]), float(np.nanquantile(again, 0.025))


def summed(table: Table) -> dict[str, Any]:
    """Figures of the row."""
    found: dict[str, Any] = {"n": len(table)}
    for measure in MEASURES:
        value, low = rank(table, measure)
        healthy_a, ill_a, healthy_b, ill_b = (column(table, twin, measure) for twin in TWINS)
        by_tumour = float(((ill_a - healthy_a) + (ill_b - healthy_b)).mean() / 2)
        found |= {
            f"{measure} rank": round(value, 3), f"{measure} rank_low": round(low, 3),
            f"{measure} protocol": round(float((ill_b - ill_a).mean()) / by_tumour, 3),
        }  # fmt: skip
    found |= ranked(table)
    means = {twin: column(table, twin, "systematic") for twin in TWINS}
    by_protocol = float((means[TWINS[2]] - means[TWINS[0]]).mean())
    by_tumour = float((means[TWINS[3]] - means[TWINS[2]]).mean())
    radius = column(table, TWINS[3], "radius_mm")
    found |= {f"systematic {twin.replace('_', ' ')}": round(float(values.mean()), 2) for twin, values in means.items()}
    found["systematic_by_size"] = round(float(spearmanr(radius, means[TWINS[3]])[0]), 3)
    found["systematic_by_tumour"] = round(by_tumour / by_protocol, 3)
    return found


def key_of(image: str, model: Path) -> Key:
    """What makes a row: the image that is looked at, and the weights whose features are."""
    return {
        "task": "lesion and systematic scores",
        "image": image,
        "weights": sha256(model / "weights.safetensors")[:12],
    }


def main() -> None:
    """The row of one kind of image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of tracts_core.npz")
    parser.add_argument("--model", type=Path, required=True, help="trained on the cohort's healthy people")
    parser.add_argument("--work", type=Path, default=Path("work/tracts"), help="scratch folder; holds the cohort")
    parser.add_argument("--image", choices=tuple(KINDS), default="peaks")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(2)
    place = Place(
        real=read_anatomy(args.data / "tracts_core.npz"), data=args.data, work=args.work, jobs=args.jobs,
        config=CohortConfig(),
    )  # fmt: skip
    model = api.load(args.model)
    key = key_of(args.image, args.model)
    with rows(RESULT, key, code=code_hash(parts=PARTS)) as row:
        if row is not None:
            table = table_of(place.cohort(), args.work, model, kind=args.image)
            row.update(summed(table) | {"subjects": table})
            print(key, {name: value for name, value in row.items() if name != "subjects"}, flush=True)


if __name__ == "__main__":
    main()

"""Bundles of healthy people carried over to patients: what the shift costs, what few labelled patients bring back.

    python benchmarks/tracts.py --data ../shared/data/tracts [--jobs 2] [--rows-budget 120] [--only input=peaks k=8]

The design of Riccardi et al. 2025 (doi 10.1016/j.media.2025.103766) on a semi-synthetic cohort, because only there each
patient has a healthy twin. A network learns ten bundles (AF, CST, IFO, ILF, UF; left and right) on healthy people
scanned by protocol A, and is judged on people that no run sees, each scanned four times: {A, B} x {healthy, tumour}.
Inputs: ``peaks`` (9 channels), ``tensor`` (6), ``scalars`` (FA, MD, S0). A row holds the Dice of each bundle of each
scan; losses, intervals and tests are computed from the rows when the page is made (`scripts/tract_statistics.py`).

Tasks, and what their rows take:

* ``bundles``: k labelled patients of the pool, drawn by seed. Mode ``none`` is the model of the healthy as it is;
  ``all``, ``decoder``, ``last`` and ``norms`` name the layers that learn; ``guarded`` is `fewscan transfer` as it
  comes, the others go without its guard so that a row is the network it names; ``scratch`` trains on the patients
  alone.
* ``real``: the released peaks of a real subject, never trained on. The cohort's anatomy is theirs.
* ``null``: ``B=A`` scans healthy people and patients by one protocol, ``radius 0`` has tumours of no size; both with
  the model of the healthy. ``shuffled`` trains with the bundles' names exchanged in each case; ``chance`` is what true
  masks under the names of others are worth.
* ``baseline``: mean probability map of the training people and a single template, aligned affinely.
* ``cohort``: what is known of the test people. ``inputs``: seconds of `fewscan tracts inputs` for one scan.

With ``--jobs`` set ``OPENBLAS_NUM_THREADS=1`` in the environment: the processes that make the cohort else multiply
small matrices on all cores at once. `fewscan tracts cohort` sees to that itself; training is not touched by it.

Rows are written as they come, the most important first; ``--rows-budget`` minutes after the start no more is begun.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle_cohort import KINDS, Place, Scores, cases_of, exchanged, judge, mean, stored, truth_of, twin_means, view
from few_label import stop_if_interrupted
from harness import Key, code_hash, rows, show
from tract_baselines import BASELINES, MOST_SECONDS, baselines, ceiling, chance, real_scores, seconds_for_inputs

from fewscan import api
from fewscan.data.listing import read_json
from fewscan.learn.checkpoint import Model
from fewscan.tracts.anatomy import read_anatomy
from fewscan.tracts.cohort import RECORD
from fewscan.tracts.population import A, CohortConfig
from fewscan.transferring import transfer
from fewscan.white_matter import inputs

RESULT = "tracts.json"
LAYERS = ("all", "decoder", "last", "norms")
MODES = ("none", "all", "scratch", "decoder", "last", "norms", "guarded")
LABELS = (1, 2, 4, 8)
MOST, DRAWS = 8, 3
PEOPLE = (24, 6, MOST, 12)  # of the four splits
NULL_PEOPLE, NULL_SEED = 4, 1  # another seed: people whom no network has seen
SOURCE = ("methods/segment.py", "tracts/cohort.py")  # what the model of the healthy rests on
TRAINED = ("methods/transfer.py", "transferring.py", "prediction.py", "judge/metrics.py", "tracts/cohort.py")
PARTS = {  # what a row rests on, with what that imports
    "bundles": TRAINED, "null": TRAINED, "real": (*TRAINED, "white_matter.py"),
    "baseline": ("methods/pairwise.py", "judge/metrics.py", "tracts/cohort.py"), "cohort": ("tracts/cohort.py",),
    "inputs": ("white_matter.py",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a network learns: minutes, or steps where given, which do not hang on the machine.

    Parameters
    ----------
    source, adapt : float
        Minutes of the model of the healthy, and of what follows.
    source_steps, adapt_steps : int, optional
        Steps instead.
    """

    source: float
    adapt: float
    source_steps: int | None = None
    adapt_steps: int | None = None

    def of(self, part: str) -> dict[str, Any]:
        """Keywords that bound a run of ``source`` or ``adapt``."""
        steps = getattr(self, f"{part}_steps")
        return {"budget": 60 * getattr(self, part)} if steps is None else {"steps": steps}

    def said(self, part: str) -> str:
        """For the key of a row."""
        steps = getattr(self, f"{part}_steps")
        return f"{getattr(self, part):g} min" if steps is None else f"{steps} steps"


def trained(cases: list[Path], out: Path, *, kind: str, limit: dict[str, Any], **how: Any) -> Model:
    """A network that learnt these cases; the one place where training is called."""
    data = api.open(view(cases, out.with_name(f"{out.name}_data"), kind=kind, names=how.pop("names", None)))
    shutil.rmtree(out, ignore_errors=True)
    model = api.train(data, out, method="segment", device="cpu", observe=show, **limit, **how)
    stop_if_interrupted(model)
    return model


def adapted(
    base: Model, cases: list[Path], out: Path, *, kind: str, mode: str, limit: dict[str, Any], seed: int
) -> Model:
    """The network after learning these patients; the one place where transfer is called."""
    data = api.open(view(cases, out.with_name(f"{out.name}_data"), kind=kind))
    shutil.rmtree(out, ignore_errors=True)
    model = transfer(
        base, data, out, layers="auto" if mode == "guarded" else mode, seed=seed, device="cpu", observe=show,  # type: ignore[arg-type]
        settings={} if mode == "guarded" else {"transfer.guard": "no"}, **limit,
    )  # fmt: skip
    stop_if_interrupted(model)
    return model


def predicted(model: Model, cases: list[Path], out: Path, *, kind: str) -> Path:
    """Masks of these cases, each in a folder of its name; the one place where prediction is called."""
    data = api.open(view(cases, out.with_name(f"{out.name}_data"), kind=kind))
    shutil.rmtree(out, ignore_errors=True)
    api.predict(model, [case.images[0] for case in data.cases], out, device="cpu")
    return out


def source_model(place: Place, *, kind: str, limits: Limits) -> Model:
    """The model of the healthy, trained once for each input, code and cohort; one of half a run is not read again."""
    cohort = place.cohort()
    made_from = str(read_json(cohort / RECORD)["spec"])
    words = [kind, "source", limits.said("source").replace(" ", "_"), code_hash(parts=SOURCE)[:8], made_from[:8]]
    folder = place.work / "_".join(words)
    if (folder / "model.json").is_file():
        model = api.load(folder)
        if not model.provenance["interrupted"]:
            return model
    return trained(cases_of(cohort, "train"), folder, kind=kind, limit=limits.of("source"))


def drawn(pool: list[Path], k: int, draw: int) -> list[Path]:
    """k patients of the pool; those of a smaller k are among them."""
    order = np.random.RandomState(draw).permutation(len(pool))
    return sorted(pool[i] for i in order[:k])


def bundles(place: Place, key: Key, limits: Limits) -> dict[str, Any]:
    """One network, judged on the four twins of each test person."""
    kind, mode, k, seed = str(key["input"]), str(key["mode"]), int(key["k"]), int(key["draw"])
    cohort = place.cohort()
    folder = place.work / "_".join(str(value).replace(" ", "_") for value in key.values())
    pool = drawn(cases_of(cohort, "pool"), k, seed)
    if mode == "scratch":
        model = trained(pool, folder / "model", kind=kind, limit=limits.of("adapt"), seed=seed)
    else:
        model = source_model(place, kind=kind, limits=limits)
        if mode != "none":
            limit = limits.of("adapt")
            model = adapted(model, pool, folder / "model", kind=kind, mode=mode, limit=limit, seed=seed)
    found = tested(model, cases_of(cohort, "test"), folder, kind=kind)
    told = model.provenance.get("transfer") or {}
    return found | {"steps": model.provenance["steps"], **({"kept": told["kept"]} if "kept" in told else {})}


def tested(model: Model, cases: list[Path], folder: Path, *, kind: str) -> dict[str, Any]:
    """What a row holds of a network's answers."""
    begin = time.monotonic()
    answers = predicted(model, cases, folder / "predictions", kind=kind)
    seconds = (time.monotonic() - begin) / max(1, len(cases))
    return told_of(judge(answers, cases)) | {"seconds_a_scan": round(seconds, 2)}


def told_of(scores: Scores) -> dict[str, Any]:
    """Means of the twins, and every figure behind them."""
    return twin_means(scores) | {"subjects": stored(scores)}


def null(place: Place, key: Key, limits: Limits) -> dict[str, Any]:
    """A control in which something must vanish."""
    kind, mode = str(key["input"]), str(key["mode"])
    if mode == "chance":
        return {"dice": chance(cases_of(place.cohort(), "test"))}
    folder = place.work / f"null_{kind}_{mode.replace(' ', '_').replace('=', '_')}"
    if mode == "shuffled":
        train = cases_of(place.cohort(), "train")
        model = trained(train, folder / "model", kind=kind, limit=limits.of("source"), names=exchanged())
        return tested(model, cases_of(place.cohort(), "test"), folder, kind=kind)
    people = replace(place.config, train=0, val=0, pool=0, test=NULL_PEOPLE, seed=place.config.seed + NULL_SEED)
    changed: dict[str, Any] = {"B=A": {"protocols": (A, replace(A, name="B"))}, "radius 0": {"radius_mm": (0.0, 0.0)}}
    cohort = place.cohort(folder.name + "_cohort", config=replace(people, **changed[mode]))
    return tested(source_model(place, kind=kind, limits=limits), cases_of(cohort, "test"), folder, kind=kind)


def real(place: Place, key: Key, limits: Limits) -> dict[str, Any]:
    """The real subject's released peaks, and how far two processing runs of that scan agree."""
    case, kind = place.work / "real" / "subject", str(key["input"])
    inputs(place.data / "real_subject" / "peaks.nii.gz", case)
    model = source_model(place, kind=kind, limits=limits)
    out = place.work / "real" / "predictions"
    shutil.rmtree(out, ignore_errors=True)
    api.predict(model, [case / "peaks.nii.gz"], out, device="cpu")
    found = real_scores(out / case.name, place.data / "real_subject" / "bundles")
    most = ceiling(place.data / "tracts_core.npz")
    return {"dice": round(mean(found.values()), 4), "ceiling": round(mean(most.values()), 4),
            "bundles": found, "ceilings": most}  # fmt: skip


def baseline(place: Place, key: Key, limits: Limits) -> dict[str, Any]:
    """Registration instead of a network."""
    scores, level = baselines(place)[str(key["mode"])]
    return told_of(scores) | {"threshold": level}


def cohort(place: Place, key: Key, limits: Limits) -> dict[str, Any]:
    """What is known of the test people."""
    return {"truth": truth_of(place.cohort())}


def for_inputs(place: Place, key: Key, limits: Limits) -> dict[str, Any]:
    """How long the inputs of one scan take."""
    folder = place.work / "inputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return seconds_for_inputs(place, folder)


MEASURE: dict[str, Callable[[Place, Key, Limits], dict[str, Any]]] = {
    "bundles": bundles, "null": null, "real": real, "baseline": baseline, "cohort": cohort, "inputs": for_inputs,
}  # fmt: skip


def wanted(limits: Limits, only: dict[str, str], *, people: tuple[int, ...] = PEOPLE) -> list[Key]:
    """Keys of the rows, the most important first; they hold the numbers of people where these are not `PEOPLE`."""
    pool, others = people[2], {} if people == PEOPLE else {"people": " ".join(map(str, people))}

    def network(kind: str, k: int, mode: str, draw: int = 0) -> Key:
        limit = "" if mode == "none" else limits.said("adapt")
        return {"task": "bundles", "input": kind, "k": k, "mode": mode, "draw": draw,
                "source": "" if mode == "scratch" else limits.said("source"), "adapt": limit, **others}  # fmt: skip

    def other(task: str, mode: str = "", kind: str = "", source: str = "") -> Key:
        return {"task": task, "input": kind, "mode": mode, "source": source, **others}

    peaks, source = "peaks", limits.said("source")
    labels = [k for k in LABELS if k < pool]
    found = [other("inputs"), other("cohort"), network(peaks, 0, "none")]
    found += [network(peaks, pool, mode) for mode in ("all", "scratch")]
    found += [other("real", "none", peaks, source), other("null", "chance")]
    found += [other("baseline", mode) for mode in BASELINES]
    found += [other("null", mode, peaks, source) for mode in ("B=A", "radius 0")]
    for kind in ("tensor", "scalars"):
        found += [network(kind, 0, "none"), *(network(kind, pool, mode) for mode in ("all", "scratch"))]
    found += [network(peaks, k, mode) for k in labels[::-1] for mode in ("all", "scratch")]
    found += [network(peaks, pool, mode) for mode in MODES[3:]]
    found += [other("null", "shuffled", peaks, source)]
    found += [network(kind, k, mode) for kind in KINDS if kind != peaks for k in labels for mode in ("all", "scratch")]
    found += [network(peaks, k, mode) for k in labels for mode in MODES[3:]]
    found += [
        network(peaks, k, mode, draw) for draw in range(1, DRAWS) for k in (*labels, pool) for mode in MODES[1:-1]
    ]
    return [key for key in found if all(str(key.get(name)) == value for name, value in only.items())]


def parsed() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of tracts_core.npz and real_subject")
    parser.add_argument("--work", type=Path, default=Path("work/tracts"), help="scratch folder; holds the cohort")
    parser.add_argument("--result", type=Path, default=Path(RESULT), help="file of rows")
    parser.add_argument("--jobs", type=int, default=1, help="scans made at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--source-minutes", type=float, default=10)
    parser.add_argument("--minutes", type=float, default=2, help="of an adaptation, or of training from scratch")
    parser.add_argument("--source-steps", type=int, help="instead of minutes")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--rows-budget", type=float, help="minutes after which no further row is begun")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="of the key: task, input, k, mode")
    parser.add_argument("--people", type=int, nargs=4, default=PEOPLE, metavar="N", help="of the four splits")
    parser.add_argument("--list", action="store_true", help="only show the keys")
    return parser.parse_args()


def main() -> None:
    """Every row that is not there yet, as far as the time reaches."""
    args, begin = parsed(), time.monotonic()
    torch.set_num_threads(args.threads)
    train, val, pool, test = args.people
    limits = Limits(
        source=args.source_minutes, adapt=args.minutes, source_steps=args.source_steps, adapt_steps=args.steps
    )
    keys = wanted(limits, dict(word.split("=", 1) for word in args.only), people=tuple(args.people))
    if args.list:
        print(*keys, f"{len(keys)} rows", sep="\n")
        return
    place = Place(
        real=read_anatomy(args.data / "tracts_core.npz"), data=args.data, work=args.work, jobs=args.jobs,
        config=CohortConfig(train=train, val=val, pool=pool, test=test),
    )  # fmt: skip
    for key in keys:
        if args.rows_budget is not None and time.monotonic() - begin > 60 * args.rows_budget:
            print(f"{args.rows_budget:g} min are over; the rest waits for the next run", flush=True)
            return
        with rows(args.result.resolve() if args.result.parent != Path() else args.result, key,
                  code=code_hash(parts=PARTS[str(key["task"])])) as row:  # fmt: skip
            if row is not None:
                row.update(MEASURE[str(key["task"])](place, key, limits))
                print(key, {k: v for k, v in row.items() if isinstance(v, int | float)}, flush=True)
        if row is not None and key["task"] == "inputs" and row["seconds"] > MOST_SECONDS:
            raise SystemExit(f"inputs took {row['seconds']} s, {MOST_SECONDS:g} allowed")


if __name__ == "__main__":
    main()

"""The Python interface, as small as the command line: `open`, `check`, `train`, `load`, `predict`, `evaluate`, ..."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fewscan import drafting, training
from fewscan.data import dataset as datasets
from fewscan.data import doctor, repair
from fewscan.data.dataset import Dataset
from fewscan.deliver.printable import Printer
from fewscan.deliver.solids import Additions
from fewscan.errors import ConfigError, DataError
from fewscan.exporting import export
from fewscan.judge import evaluate as judging
from fewscan.judge.evaluate import Comparison
from fewscan.judge.results import Evaluation, read_evaluation
from fewscan.learn import checkpoint
from fewscan.learn.config import Settings, override
from fewscan.learn.folder import scratch
from fewscan.learn.hardware import pick
from fewscan.learn.request import Observer, Request
from fewscan.meshing import MeshConfig, mesh
from fewscan.methods import joint, segment
from fewscan.methods import register as register_method
from fewscan.methods.pairwise import RegisterConfig
from fewscan.methods.voting import Fusion
from fewscan.naming import recorded_names
from fewscan.personalization import keep_atlases as keep
from fewscan.personalization import personalize
from fewscan.prediction import Inputs, Prediction, predict
from fewscan.quantity import duration
from fewscan.registration import register, register_config
from fewscan.reporting import report, view

__all__ = [
    "Additions",
    "MeshConfig",
    "Model",
    "Prediction",
    "Printer",
    "Scans",
    "check",
    "compare",
    "draft",
    "evaluate",
    "export",
    "load",
    "mesh",
    "open",
    "personalize",
    "predict",
    "register",
    "register_config",
    "report",
    "train",
    "view",
]

METHODS: dict[str, Callable[[Request], checkpoint.Model]] = {
    "joint": joint.run,
    "register": register_method.run,
    "segment": segment.run,
}
DEFAULT_BUDGET = 600.0
Data = Dataset | Path | str


@dataclass(frozen=True)
class Scans(Dataset):
    """A data set that can be checked and trained on; what `open` answers with."""

    def check(self, *, fix: Path | None = None) -> doctor.Checkup:
        """As the function `check`.

        Parameters
        ----------
        fix : Path, optional
            New folder for a repaired copy.
        """
        return check(self, fix=fix)

    def train(
        self, out: Path | str, *, budget: float | str | None = None, steps: int | None = None, seed: int = 0
    ) -> Model:
        """As the function `train`, which has more options.

        Parameters
        ----------
        out : path
            Model folder.
        budget : float or str, optional
            Seconds, or a duration such as "10m".
        steps : int, optional
            Steps instead.
        seed : int
            Of everything random.
        """
        return train(self, out, budget=budget, steps=steps, seed=seed)


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(checkpoint.Model):
    """A trained model that can predict; what `train` and `load` answer with."""

    def predict(
        self,
        scans: Inputs,
        out: Path | str,
        *,
        probabilities: bool = False,
        tta: bool = False,
    ) -> list[Prediction]:
        """As the function `predict`, which has more options.

        Parameters
        ----------
        scans : path or sequence of paths
            Files, folders or DICOM series.
        out : path
            Folder to write.
        probabilities : bool
            Also write probabilities.
        tta : bool
            Average with mirrored inputs, where anatomy allows.
        """
        return predict(self, scans, out, probabilities=probabilities, tta=tta)


def with_verbs(model: checkpoint.Model) -> Model:
    """The model with what can be done with it.

    Parameters
    ----------
    model : Model
        As the engine knows it.
    """
    return Model(**{field.name: getattr(model, field.name) for field in fields(model)})


def open(path: Path | str) -> Scans:  # noqa: A001 (as in PIL.Image.open)
    """Find the cases in a folder, whatever its layout.

    Parameters
    ----------
    path : path
        Folder.

    Raises
    ------
    DataError
        If nothing usable is there.
    """
    found = datasets.find(Path(path))
    return Scans(**{field.name: getattr(found, field.name) for field in fields(found)})


def dataset_of(data: Data) -> Dataset:
    """The data set itself, or the one in a folder.

    Parameters
    ----------
    data : Dataset or path
        Either.
    """
    return data if isinstance(data, Dataset) else open(data)


def check(data: Data, *, fix: Path | None = None, observe: Observer | None = None) -> doctor.Checkup:
    """Examine a data set; originals are never touched.

    Parameters
    ----------
    data : Dataset or path
        What to examine.
    fix : Path, optional
        New folder for a repaired copy.
    observe : callable, optional
        Gets a `learn.engine.Status` for each scan.

    Raises
    ------
    DataError
        If nothing usable is there, or the folder for the copy is not empty.
    """
    found = dataset_of(data)
    checkup = training.examined(found, observe=observe)
    if fix is not None:
        repair.fix(found, checkup, out=Path(fix))
    return checkup


def train(
    data: Data,
    out: Path | str,
    *,
    budget: float | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    extend: float | str | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    settings: Mapping[str, str] | None = None,
    method: str = "auto",
    dry_run: bool = False,
    keep_atlases: bool = False,
    observe: Observer | None = None,
) -> Model:
    """Train a model and leave it as a folder.

    Parameters
    ----------
    data : Dataset or path
        Labelled and unlabelled cases.
    out : path
        Model folder; must be new unless the run goes on.
    budget : float or str, optional
        Seconds or a duration such as "10m", everything included; ten minutes when neither this nor steps is given.
    steps : int, optional
        Steps instead of seconds; repeatable bit for bit on a CPU.
    seed : int
        Of everything random.
    resume : bool
        Go on from the last saved state.
    extend : float or str, optional
        Seconds, or a duration, to add to a finished run.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    max_memory : int, optional
        Bytes that training may take.
    settings : mapping of str to str, optional
        Dotted names and values that replace those of the preset.
    method : {"auto", "segment", "register", "joint"}
        Published method; auto is joint where there are unlabelled scans (and labels do not overlap), else segment, or
        when a run goes on the method that began it.
    dry_run : bool
        Stop after the plan: nothing is trained or written.
    keep_atlases : bool
        Leave labelled scans, at most `learn.atlases.MOST_KEPT`, beside the model, for `personalize`: whoever gets the
        model gets them too.
    observe : callable, optional
        Gets messages and a `learn.engine.Status` from time to time.

    Raises
    ------
    FewscanError
        If data, settings, folder or memory do not allow it; the message names the remedy.
    """
    started = time.monotonic()
    if budget is not None and steps is not None:
        raise ConfigError("give either a budget or a number of steps, not both")
    if extend is not None and (budget is not None or steps is not None):
        given = f"--steps {steps}" if budget is None else f"--budget {budget}"
        raise ConfigError(f"--extend {extend} is added to what was spent, and {given} would not count; leave out one")
    if method not in METHODS and method != "auto":
        raise ConfigError(f"method must be auto or one of {', '.join(METHODS)}, got {method!r}")
    found = dataset_of(data)
    if method == "auto" and (resume or extend is not None) and (Path(out) / "state.safetensors").is_file():
        method = str(checkpoint.stored_identity(Path(out)).get("method", method))
        if method not in (*METHODS, "auto"):
            raise ConfigError(f"{out} was made by fewscan {method}; go on with that verb and --resume")
    if budget is None and steps is None and ((not resume and extend is None) or dry_run):
        budget = DEFAULT_BUDGET
    request = Request(
        dataset=found, out=Path(out), method=method, settings=override(Settings(), settings or {}),
        hardware=pick(device), budget=seconds(budget), steps=steps, extend=seconds(extend), seed=seed, resume=resume,
        max_memory=max_memory, observe=observe, started=started,
    )  # fmt: skip
    request, checkup = training.checked(request)
    if method == "auto":
        method = method_for(request.dataset)
        request = replace(request, method=method)
    if dry_run:
        with scratch() as folder:
            model = METHODS[method](replace(request, out=folder / "model", resume=False, extend=None, dry_run=True))
        request.say("nothing was trained")
        return with_verbs(model)
    model = training.run(request, METHODS[method], checkup=checkup)
    if keep_atlases:
        keep(model, found, say=request.say)
    return with_verbs(model)


def method_for(data: Dataset) -> str:
    """What auto means for the training of a new model.

    Parameters
    ----------
    data : Dataset
        Joint needs unlabelled cases and one label a voxel.
    """
    return "joint" if data.unlabelled and not data.overlapping else "segment"


def seconds(value: float | str | None) -> float | None:
    """Seconds, of a duration in words too.

    Parameters
    ----------
    value : float or str, optional
        Such as 600.0 or "10m".
    """
    return duration(value) if isinstance(value, str) else value


def load(path: Path | str) -> Model:
    """Read a model folder.

    Parameters
    ----------
    path : path
        As `train` left it.

    Raises
    ------
    ModelError
        If it is not one, is damaged, or was changed since.
    """
    return with_verbs(checkpoint.load_model(Path(path)))


def evaluate(
    predictions: Path | str, labels: Path | str, *, images: Path | str | None = None, observe: Observer | None = None
) -> Evaluation:
    """Judge a folder of predictions by a folder of references.

    Parameters
    ----------
    predictions, labels, images : path
        Folders, or one file each; files belong together by name. DICOM SEG and RTSTRUCT are references too, in a
        folder of their series or with that as ``images``.
    observe : callable, optional
        Gets a `learn.engine.Status` for each scan.

    Raises
    ------
    FewscanError
        If nothing matches, or grids differ.
    """
    scans = None if images is None else Path(images)
    known = recorded_names(Path(predictions))
    return judging.evaluate(Path(predictions), Path(labels), images=scans, known=known, observe=observe)


def compare(a: Evaluation | Path | str, b: Evaluation | Path | str) -> Comparison:
    """Paired tests between two runs over the cases that both judged.

    Parameters
    ----------
    a, b : Evaluation or path
        Evaluations, or the ``evaluation.json`` of each.
    """
    first, second = (e if isinstance(e, Evaluation) else read_evaluation(Path(e)) for e in (a, b))
    try:
        return judging.compare(first, second)
    except DataError as error:
        files = " and ".join(str(e) for e in (a, b) if not isinstance(e, Evaluation))
        raise DataError(f"{files}: {error}" if files else str(error)) from None


def draft(
    data: Data,
    out: Path | str,
    *,
    config: RegisterConfig | None = None,
    fusion: Fusion = "joint",
    device: str = "auto",
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Propose labels for every unlabelled scan from the labelled ones, without training.

    Parameters
    ----------
    data : Dataset or path
        With labelled and unlabelled cases.
    out : path
        Folder to write: ``labels/``, ``sure/`` and ``draft.json``.
    config : RegisterConfig, optional
        From `register_config`.
    fusion : {"joint", "local", "majority"}
        How the atlases' votes are weighted.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where to deform.
    observe : callable, optional
        Gets messages and a `learn.engine.Status`.

    Raises
    ------
    FewscanError
        If there is nothing to draft from or for, or the folder holds something else.
    """
    return drafting.draft(
        dataset_of(data), Path(out), config=config or RegisterConfig(), fusion=fusion, device=device, observe=observe
    )

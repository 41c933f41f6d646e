"""The record beside predictions: what fewscan wrote there, and so may replace, and what it was at when it was ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewscan.data import places
from fewscan.data.bundles import SEGMENTATIONS
from fewscan.data.contents import content_of, same
from fewscan.data.io import disk_error
from fewscan.data.locking import locked
from fewscan.deliver.records import part, plain_name
from fewscan.errors import ConfigError, TakenError
from fewscan.learn import checkpoint
from fewscan.learn.checkpoint import Model
from fewscan.learn.inputs import Scan
from fewscan.naming import BEFORE, PREDICTIONS
from fewscan.rows import LABELS, WRITTEN, Begun, corrected, digests, plain_reason, still_there, stored

PROBABILITIES, CONTENT = "probabilities", "content"


class Record:
    """Predictions in a folder, as ``predictions.json`` tells of them.

    What is going to be written is told before it is, so that a run which is killed leaves nothing that the next one
    takes for somebody else's. Each row tells its model, its labels and the scan, for others may write into the folder
    before, later and meanwhile.

    Parameters
    ----------
    folder : Path
        Of the predictions; it need not exist.
    model : Model
        That predicts.

    Raises
    ------
    ConfigError
        If the folder is a file, or what is called like the record in it is none.
    """

    def __init__(self, folder: Path, *, model: Model) -> None:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; give a folder for the predictions")
        self.folder, self.model, self.file = folder, model, folder / PREDICTIONS
        self.rows: dict[str, dict[str, Any]] = {}
        self.unfinished: dict[str, Begun] = {}
        self.failed: dict[str, str] = {}
        self._contents: dict[Scan, str] = {}
        try:
            with contextlib.suppress(OSError):  # nothing is known then, and so nothing is replaced
                self.rows, self.unfinished, self.failed = stored(self.file)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{self.file} is damaged, or of another program, and is not replaced; give another -o, or move it away"
            ) from None

    def target(self, scan: Scan) -> Path:
        """Label map to write of a scan, or folder of masks.

        Parameters
        ----------
        scan : Scan
            To predict.
        """
        inside = f"{scan.id}/{SEGMENTATIONS}" if self.model.plan.overlapping else f"{scan.id}.nii.gz"
        return self.folder / inside

    def own(self, target: Path) -> Path:
        """Where the model's own answer is written, where another takes its place.

        Parameters
        ----------
        target : Path
            Of the scan.
        """
        return self.folder / BEFORE / target.relative_to(self.folder)

    def probabilities(self, scan: Scan) -> Path:
        """Where the probabilities of a scan are written, where they are asked for.

        Parameters
        ----------
        scan : Scan
            To predict.
        """
        return self.target(scan).with_name(f"{scan.id}_probabilities.nii.gz")

    def finished(self, scan: Scan) -> bool:
        """Whether a prediction of a scan is there, and no run was ended while it wrote it.

        Parameters
        ----------
        scan : Scan
            To predict.
        """
        target = self.target(scan)
        if not target.exists():
            return False
        with contextlib.suppress(OSError):
            self._read()  # another run may be at it
        return self._name(target) not in self.unfinished

    def vouched(self, scan: Scan) -> bool:
        """Whether a prediction is known to be of this very scan, or the record does not claim it.

        Parameters
        ----------
        scan : Scan
            To predict.
        """
        row = self.rows.get(self._name(self.target(scan)))
        return row is None or bool(self._content(scan, row) and self._now(scan))

    def check(self, scan: Scan, *, keep: bool, before: bool, probabilities: bool) -> None:
        """Refuse to write over what is not of fewscan or of another scan, and to keep what another model says.

        Parameters
        ----------
        scan : Scan
            To predict.
        keep : bool
            Whether a label map that is finished already is left alone.
        before : bool
            Whether the model's own answer may be written too.
        probabilities : bool
            Whether probabilities are going to be.

        Raises
        ------
        ConfigError
            If a file of somebody else or the prediction of another scan would be overwritten, or one that is to be kept
            is not what this model says of this scan.
        """
        target = self.target(scan)
        own, name = self.own(target), self._name(target)
        written = {path.resolve() for path in (self.folder, target.parent, own.parent)}
        if written & {image.parent.resolve() for image in scan.images}:
            raise ConfigError(
                f"{self.folder} is where the scans are, and their files would be overwritten; give another -o"
            )
        self._check_scan(scan, keep=keep)
        if keep and self.finished(scan):
            self._check_model(scan)
            return
        self._check_target(target)
        if before and self._own_labels(name) is None:
            _refuse(own)
        if probabilities and not self._told_probabilities(scan):
            _refuse(self.probabilities(scan))

    def reading(self, scan: Scan) -> None:
        """Note what a scan is at the moment at which it is read.

        Parameters
        ----------
        scan : Scan
            To predict.
        """
        self._contents.pop(scan, None)
        self._now(scan)

    def begin(self, scan: Scan, *, before: bool, probabilities: bool) -> None:
        """Tell that a prediction is about to be written.

        Parameters
        ----------
        scan : Scan
            That is predicted.
        before : bool
            Whether the model's own answer is too.
        probabilities : bool
            Whether probabilities are.

        Raises
        ------
        ConfigError
            If files of somebody else would be overwritten, or what another run wrote of another scan meanwhile.
        """
        name, labels = self._name(self.target(scan)), list(self.model.names.values())
        with self._changed():
            self._check_scan(scan, keep=False)
            self._check_target(self.target(scan))
            if probabilities and not self._told_probabilities(scan):
                _refuse(self.probabilities(scan))
            begun = self.unfinished.setdefault(name, {})
            for what, asked in ((LABELS, True), (BEFORE, before), (PROBABILITIES, probabilities)):
                if asked:  # beside those that another model was at
                    begun[what] = list(dict.fromkeys([*begun.get(what, ()), *labels]))

    def replaceable(self, scan: Scan, *, before: bool) -> set[str]:
        """Labels whose masks of a scan are fewscan's, or about to be; what others put beside them is theirs.

        Parameters
        ----------
        scan : Scan
            To predict.
        before : bool
            Whether of the model's own answer beside another.
        """
        name = self._name(self.target(scan))
        told = [*part(self.rows.get(name, {}), "volumes_ml"), *self.unfinished.get(name, {}).get(LABELS, ())]
        return {*self.model.names.values(), *((self._own_labels(name) or ()) if before else told)}

    def finish(self, scan: Scan, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """Tell of a prediction that was written; the row that does.

        Parameters
        ----------
        scan : Scan
            That was predicted.
        found : mapping of str to any
            Fields of its `fewscan.prediction.Prediction`.
        """
        target = self.target(scan)
        name = self._name(target)
        row = {key: value for key, value in found.items() if value is not None} | {"path": name}
        row |= {"model": self._weights(), "labels": self._listed(), CONTENT: self._now(scan)}
        row[WRITTEN] = digests(target, self.model.names.values())
        with self._changed():
            if BEFORE in row:
                row[BEFORE] = {**row[BEFORE], "path": self._name(self.own(target))}
            else:
                self._remove_own(target)
            if PROBABILITIES in row:
                row[PROBABILITIES] = self._name(self.probabilities(scan))
            elif self._told_probabilities(scan):  # of an earlier answer, which this one is not
                self.probabilities(scan).unlink(missing_ok=True)
            self.rows[name] = row
            self.unfinished.pop(name, None)
            self.failed.pop(scan.id, None)
        places.remember(self.file, {scan.id: {"image": scan.images[0]}}, more=True)
        return row

    def fail(self, scan: Scan, reason: str) -> None:
        """Tell of a scan that could not be predicted.

        Parameters
        ----------
        scan : Scan
            That was not predicted.
        reason : str
            Why; folders in it are left out.
        """
        places.remember(self.file, {scan.id: {"image": scan.images[0]}}, more=True)
        with self._changed():
            self.failed[scan.id] = plain_reason(reason, scan.images)

    def passed(self, scan: Scan) -> None:
        """Forget that a scan has failed, of which there is an answer.

        Parameters
        ----------
        scan : Scan
            That is left alone.
        """
        if scan.id in self.failed:
            with self._changed():
                self.failed.pop(scan.id, None)

    def _check_scan(self, scan: Scan, *, keep: bool) -> None:
        """Refuse where the prediction under a scan's name is of another scan; one that was moved is still itself."""
        target, image = self.target(scan), scan.images[0]
        row = self.rows.get(self._name(target))
        if row is None or not target.exists():
            return
        then, now = self._content(scan, row), self._now(scan)
        if not then or not now or same(then, now):
            return
        place = self._place(scan)
        if place is None or place.absolute() != image.absolute():
            raise TakenError(
                f"{target} is the prediction of {place or 'another scan'}, and {image} is not the same scan; give "
                f"another -o, or take {target} away"
            )
        if keep:
            raise TakenError(f"{image} has changed since {target} was predicted; predict it without --skip-existing")

    def _check_target(self, target: Path) -> None:
        """Refuse to write over what others wrote, and over a prediction that somebody has corrected."""
        name = self._name(target)
        if not target.exists() or name in self.unfinished:
            return
        if name not in self.rows:
            raise TakenError(
                f"{target} exists and is not a prediction of fewscan; give another -o, or --skip-existing to keep it"
            )
        if corrected(self.rows[name], target):
            raise TakenError(
                f"{target} was changed by hand since it was predicted, which would be lost; keep it with "
                "--skip-existing, move it away, or give another -o"
            )

    def _check_model(self, scan: Scan) -> None:
        """Refuse to pass off what another model says of a scan; what somebody has drawn is no model's any more."""
        target = self.target(scan)
        row = self.rows.get(self._name(target), {})
        weights, labels = part(row, "model"), part(row, "labels")
        other = (weights and self._weights() and weights != self._weights()) or (labels and labels != self._listed())
        if other and not corrected(row, target):
            raise ConfigError(
                f"{target} is of another model, with the labels {', '.join(map(str, labels.values()))}; leave out "
                "--skip-existing to replace it, or give another -o"
            )

    def _now(self, scan: Scan) -> str:
        """Of all images of the scan to predict; seldom read, and not while others wait for the record."""
        if not self._contents.get(scan):
            found = [content_of(image) for image in scan.images]
            self._contents[scan] = " ".join(found) if all(found) else ""
        return self._contents[scan]

    def _content(self, scan: Scan, row: Mapping[str, Any]) -> str:
        """Of the scan that a row tells of; older records do not say, but perhaps it lies where it lay."""
        place = self._place(scan)
        return str(row.get(CONTENT) or "") or ("" if place is None or scan.images[1:] else content_of(place))

    def _place(self, scan: Scan) -> Path | None:
        """Where the scan lay that was predicted under this name."""
        return places.recall(self.file).get(scan.id, {}).get("image")

    def _weights(self) -> dict[str, str]:
        """Hashes of the model's files."""
        return dict(self.model.provenance.get("sha256", {}))

    def _listed(self) -> dict[str, str]:
        """The model's labels, as JSON has them."""
        return {str(value): name for value, name in self.model.names.items()}

    def _name(self, path: Path) -> str:
        """As the record calls it."""
        return path.relative_to(self.folder).as_posix()

    def _own_labels(self, name: str) -> list[str] | None:
        """Labels of the model's own answer to a scan that fewscan wrote, or was at; None where it did neither."""
        row, begun = self.rows.get(name, {}), self.unfinished.get(name, {}).get(BEFORE)
        if BEFORE not in row:
            return begun
        return [*part(part(row, BEFORE), "volumes_ml"), *(begun or ())]  # also those that another model wrote

    def _told_probabilities(self, scan: Scan) -> bool:
        """Whether fewscan wrote the probabilities of a scan, or was at it; labels of another may be called so too."""
        name = self._name(self.target(scan))
        told = PROBABILITIES in self.rows.get(name, {}) or PROBABILITIES in self.unfinished.get(name, {})
        return told and self._name(self.probabilities(scan)) not in self.rows

    def _remove_own(self, target: Path) -> None:
        """Away with the model's own answer once none takes its place; what others put beside it stays."""
        own, labels = self.own(target), self._own_labels(self._name(target))
        if labels is None:
            return
        masks = [own / f"{label}.nii.gz" for label in labels if plain_name(label)]
        for file in masks if own.name == SEGMENTATIONS else [own]:
            file.unlink(missing_ok=True)
        for folder in (own, *own.parents):
            if folder == self.folder:
                break
            with contextlib.suppress(OSError):  # no folder, or one that still holds something
                folder.rmdir()

    def _read(self) -> None:
        """Take up what others have written since; where that is damaged, what this run knows stays."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            self.rows, self.unfinished, self.failed = stored(self.file)

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """What is changed inside is written, beside what other runs have written since."""
        with locked(self.file):
            try:
                self._read()
            except OSError as error:  # as when a network pauses; taken for no record, it would cost every row
                raise disk_error(error, self.file) from error
            yield
            self.failed = still_there(self.failed, self.file)
            more = {key: told for key, told in (("unfinished", self.unfinished), ("failed", self.failed)) if told}
            checkpoint.write_json({"predictions": list(self.rows.values()), **more}, self.file)


def _refuse(path: Path) -> None:
    """Raise where a file or folder is there of which no record tells."""
    if path.exists():
        raise TakenError(
            f"{path} exists, and {PREDICTIONS} does not say that fewscan wrote it; give another -o, or move it away"
        )

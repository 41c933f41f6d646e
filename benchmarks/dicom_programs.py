"""DICOM out, judged by the programs of others; in and out of a server.

    scripts/install_dicom_tools
    python benchmarks/dicom_programs.py --data ../shared/data/torso_ct

Three series: the slices of a CT as the scanner's archive gave them (JPEG 2000; its emptied UIDs filled in), a CT volume
written as an oblique, RLE-compressed series with its files in reverse order, and the same as one enhanced multi-frame
file, converted by highdicom, its frames out of order. Their label maps are exported as DICOM-SEG, RTSTRUCT and
``.seg.nrrd``. Rows: Dice of each label as fewscan, highdicom, SimpleITK, plastimatch and slicerio (3D Slicer's reader,
``pip install slicerio``) read it back, the smallest one; errors and warnings of dciodvfy. Last row: the series goes to
a local Orthanc by dcmtk, is pulled, is segmented by a model trained for a moment on the other series and its SEG, and
the SEG goes back, is found by C-FIND and by DICOMweb, and is pulled once more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from harness import code_hash, rows
from numpy.typing import NDArray
from pydicom.uid import RLELossless, generate_uid

import fewscan
from fewscan.data.dicom import describe_series, read_series
from fewscan.data.dicom_labels import read_dicom_labels
from fewscan.data.headers import LPS_TO_RAS
from fewscan.data.io import read_labels, read_raw, write_labelmap
from fewscan.judge.metrics import dice
from fewscan.space.geometry import Geometry, to_ras
from fewscan.space.volume import Labelmap

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from series import as_one_file, write_series

RESULT = "dicom.json"
PARTS = ("exporting.py", "deliver/dicom_seg.py", "deliver/rtstruct.py", "data/dicom_labels.py")
NAMES = {1: "spleen", 2: "kidney_right", 3: "kidney_left", 5: "liver", 6: "stomach", 7: "pancreas", 15: "esophagus"}
DEBIAN = {"dciodvfy": "dicom3tools", "plastimatch": "plastimatch", "dcmtk": "dcmtk", "orthanc": "orthanc"}
SETTINGS = {"network.widths": "8,16,16", "train.warmup_steps": "5"}
Masks = dict[str, NDArray[np.bool_]]


def archive(data: Path, folder: Path) -> tuple[Path, Path]:
    """The slices as they are, with the UIDs that were emptied when they were published."""
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    target = folder / "ct"
    target.mkdir(parents=True)
    for file in sorted((data / "example_ct_dicom").iterdir()):
        item = pydicom.dcmread(file)
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID
        item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, series, frame
        item.PatientID, item.StudyID = "BENCHMARK", "1"  # a server files nothing without them
        item.save_as(target / file.name)
    return target, _named(data / "example_seg_dicom.nii.gz", folder)


def oblique(data: Path, folder: Path) -> tuple[Path, Path]:
    """A volume as a tilted series, compressed, last slice first."""
    image, grid = read_raw(data / "example_ct_sm.nii.gz")
    label, _ = read_raw(data / "example_seg.nii.gz")
    angle = np.radians(17)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    tilted = Geometry(grid.shape, turn @ grid.affine @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    pixels = np.clip(image[0], -1024, 3000).astype(np.int16)
    write_series(folder / "ct", pixels, tilted, order="reversed", syntax=RLELossless)
    native = describe_series(folder / "ct").native
    file = folder / "tilted.nii.gz"
    write_labelmap(_ras(label[0], tilted), file, native=native)
    return folder / "ct", _named(file, folder)


def enhanced(single: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """The same series as frames of one file, out of order."""
    plain = folder / "plain"
    plain.mkdir(parents=True)
    for file in single[0].iterdir():
        item = pydicom.dcmread(file)
        item.decompress()
        item.save_as(plain / file.name)
    return as_one_file(plain, folder / "ct", seed=1), single[1]


def _ras(label: NDArray[Any], grid: Geometry) -> NDArray[Any]:
    return np.asarray(to_ras(label, grid)[0], dtype=np.uint16)


def _named(file: Path, folder: Path) -> Path:
    """A copy of a label map beside the names of its labels."""
    copy = folder / "labels" / "ct.nii.gz"
    copy.parent.mkdir(parents=True)
    shutil.copyfile(file, copy)
    found = [v for v in np.unique(read_labels(copy).data).tolist() if v]
    names = {str(v): NAMES.get(v, f"label {v}") for v in found}
    (copy.parent / "labels.json").write_text(json.dumps(names))
    return copy


# ------------------------------------------------------------------------------------------------------------ readers


def by_fewscan(file: Path, series: Path, truth: Labelmap, scratch: Path) -> Masks:
    """As fewscan reads it."""
    back = read_dicom_labels(file, source=series, names=truth.names)
    return {name: back.data == value for value, name in truth.names.items()}


def by_highdicom(file: Path, series: Path, truth: Labelmap, scratch: Path) -> Masks:
    """As a volume of the segmentation's own, matched to the series by the place of its slices."""
    import highdicom as hd

    seg = hd.seg.segread(file)
    source = describe_series(series)
    own = [pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in dict.fromkeys(source.files)]
    free = {"ignore_spatial_locations": True, "assert_missing_frames_are_empty": True}
    if any(source.frames):
        frames = seg.get_pixels_by_source_frame(own[0], list(source.frames), **free)
    else:
        frames = seg.get_pixels_by_source_instance(own, **free)
    native = source.native
    return {
        seg.get_segment_description(n).segment_label: _to_ras(frames[..., n - 1].transpose(2, 1, 0) > 0, native)
        for n in seg.segment_numbers
    }


def by_simpleitk(file: Path, series: Path, truth: Labelmap, scratch: Path) -> Masks:
    """Frames by SimpleITK, their places by the header."""
    import SimpleITK as sitk  # noqa: N813

    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(file))) > 0
    item, source = pydicom.dcmread(file, stop_before_pixels=True), describe_series(series)
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in item.SegmentSequence}
    corners = np.array([[0, 0, k, 1] for k in range(source.native.shape[2])], float)
    places = (corners @ source.native.affine.T)[:, :3] @ LPS_TO_RAS.T
    masks = {name: np.zeros(source.native.shape, bool) for name in names.values()}
    for frame, group in zip(frames, item.PerFrameFunctionalGroupsSequence, strict=True):
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        level = int(np.linalg.norm(places - place, axis=1).argmin())
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        masks[names[number]][..., level] = frame.T
    return {name: _to_ras(mask, source.native) for name, mask in masks.items()}


def by_plastimatch(file: Path, series: Path, truth: Labelmap, scratch: Path) -> Masks:
    """One mask per structure on the series' grid, contours united as is plastimatch's default."""
    grid, out = scratch / "grid.nrrd", scratch / "masks"
    write_labelmap(truth.data, grid, native=describe_series(series).native)
    command = ["plastimatch", "convert", "--input", file, "--fixed", grid, "--output-prefix", out]
    _run(*command, "--prefix-format", "nrrd")
    return {f.stem: read_labels(f).data > 0 for f in sorted(out.glob("*.nrrd"))}


def by_slicerio(file: Path, series: Path, truth: Labelmap, scratch: Path) -> Masks:
    """Segments by name, as 3D Slicer's own reader of such files finds them."""
    from slicerio import read_segmentation

    found = read_segmentation(str(file))
    native = Geometry(found["voxels"].shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ found["ijkToLPS"])
    back = _ras(found["voxels"], native)
    return {segment["name"]: back == segment["labelValue"] for segment in found["segments"]}


def _to_ras(mask: NDArray[np.bool_], native: Geometry) -> NDArray[np.bool_]:
    return _ras(mask, native) > 0


READERS: dict[str, dict[str, Callable[[Path, Path, Labelmap, Path], Masks]]] = {
    "dicom-seg": {"fewscan": by_fewscan, "highdicom": by_highdicom, "SimpleITK": by_simpleitk},
    "rtstruct": {"fewscan": by_fewscan, "plastimatch": by_plastimatch},
    "seg-nrrd": {"slicerio": by_slicerio},
}


def worst(masks: Mapping[str, NDArray[np.bool_]], truth: Labelmap) -> dict[str, Any]:
    """Smallest and mean Dice over all labels of the label map; a missing one counts 0."""
    found = [
        float(dice(masks[name], truth.data == value)) if name in masks else 0.0 for value, name in truth.names.items()
    ]
    return {"dice_min": min(found), "dice_mean": float(np.mean(found)), "labels": len(found)}


def dciodvfy(file: Path) -> dict[str, int]:
    """Errors and warnings of the validator."""
    done = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return {f"{kind.lower()}s": sum(line.startswith(kind) for line in lines) for kind in ("Error", "Warning")}


# ------------------------------------------------------------------------------------------------------------- server


@contextmanager
def orthanc(folder: Path) -> Iterator[tuple[int, int, int]]:
    """A server of our own on free ports: DICOM, HTTP, and where it moves what is asked for."""
    dicom, http, own = (_free_port() for _ in range(3))
    plugin = next(Path("/usr").rglob("libOrthancDicomWeb.so*"))
    config = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "DicomPort": dicom,
        "HttpPort": http,
        "DicomAet": "ORTHANC",
        "DicomModalities": {"puller": ["PULLER", "127.0.0.1", own]},
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(plugin)],
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    with (folder / "orthanc.log").open("w") as log:
        server = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            for _ in range(120):
                try:
                    _ask(http, "system")
                    break
                except OSError:
                    time.sleep(0.5)
            yield dicom, http, own
        finally:
            server.terminate()
            server.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=20) as answer:
        return json.loads(answer.read() or b"[]")


def _run(*words: object) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed: {(done.stdout + done.stderr)[-500:]}")
    return done.stdout + done.stderr


def chain(series: Path, teacher: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """Store, pull, segment, store the SEG, find it, pull it."""
    scans = folder / "scans"
    shutil.copytree(teacher[0], scans / "teacher")
    fewscan.export(teacher[1], scans / "teacher_seg.dcm", kind="dicom-seg", source=teacher[0])
    model = fewscan.train(scans, folder / "model", steps=40, settings=SETTINGS, device="cpu")
    first = pydicom.dcmread(next(series.iterdir()), stop_before_pixels=True)
    study = f"StudyInstanceUID={first.StudyInstanceUID}"
    with orthanc(folder) as (dicom, http, own):
        peer: tuple[object, ...] = ("-aec", "ORTHANC", "127.0.0.1", dicom)
        _run("storescu", "-R", "-xv", *peer, "+sd", series)
        pulled = folder / "pulled"
        _pull(peer, own, pulled, study, f"SeriesInstanceUID={first.SeriesInstanceUID}")
        ours, theirs = read_series(series), read_series(pulled)
        answer = fewscan.predict(model, pulled, folder / "out", device="cpu")[0]
        fewscan.export(answer.path, folder / "answer.dcm", kind="dicom-seg", source=pulled)
        seg = pydicom.dcmread(folder / "answer.dcm")
        _run("storescu", "-R", *peer, folder / "answer.dcm")
        keys = ["QueryRetrieveLevel=SERIES", study, "Modality=SEG", "SeriesInstanceUID"]
        (folder / "found").mkdir()
        asked = (word for key in keys for word in ("-k", key))
        _run("findscu", "-S", "-aet", "PULLER", "-X", "-od", folder / "found", *peer, *asked)
        listed = {pydicom.dcmread(f, force=True).SeriesInstanceUID for f in (folder / "found").iterdir()}
        web = _ask(http, f"dicom-web/studies/{first.StudyInstanceUID}/series?Modality=SEG")
        _pull(peer, own, folder / "back", study, f"SeriesInstanceUID={seg.SeriesInstanceUID}")
    back = pydicom.dcmread(next((folder / "back").iterdir()))
    label = read_labels(answer.path, names=model.names)
    return {
        "slices_stored": len(list(series.iterdir())),
        "slices_pulled": len(list(pulled.iterdir())),
        "same_voxels": bool((ours.data == theirs.data).all()),
        "labelled_voxels": int((label.data > 0).sum()),
        "found_by_c_find": seg.SeriesInstanceUID in listed,
        "found_by_dicomweb": any(str(seg.SeriesInstanceUID) in json.dumps(one) for one in web),
        "same_seg_back": bool(back.PixelData == seg.PixelData and back.SOPInstanceUID == seg.SOPInstanceUID),
    }


def _pull(peer: tuple[object, ...], port: int, out: Path, *keys: str) -> None:
    """C-MOVE of a series to a port of our own, in the syntax that it was stored in."""
    out.mkdir()
    asked = (word for key in ("QueryRetrieveLevel=SERIES", *keys) for word in ("-k", key))
    _run("movescu", "-S", "-aet", "PULLER", "-aem", "PULLER", "+P", port, "+xv", *peer, *asked, "-od", out)


# --------------------------------------------------------------------------------------------------------------- rows


def main() -> None:
    """One row for each series, format and program; then the way through a server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nnunet", type=Path, help="folder of nnU-Net's programs, benchmarks/peers/nnunet.txt")
    parser.add_argument(
        "--dataset", type=Path, help="data set to hand to nnU-Net, labelled cases in images/ and labels/"
    )
    args = parser.parse_args()
    data = args.data
    code, wrong = code_hash(parts=PARTS), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = {"archive": archive(data, folder / "archive"), "oblique": oblique(data, folder / "oblique")}
        made["enhanced"] = enhanced(made["oblique"], folder / "enhanced")
        for name, (series, labels) in made.items():
            for kind, readers in READERS.items():
                wrong += judge(name, series, labels, kind=kind, readers=readers, code=code)
        key = {"series": "archive", "format": "dicom-seg", "program": "dcmtk and Orthanc"}
        with rows(RESULT, key, code=code) as row:
            if row is not None:
                row |= chain(made["archive"][0], made["oblique"], folder) | _versions("dcmtk", "orthanc")
                print(key, row, flush=True)
                wrong += [f"{key}: {k}" for k, v in row.items() if v is False or v == 0]
    if wrong:
        raise SystemExit("; ".join(wrong))


def judge(
    name: str, series: Path, labels: Path, *, kind: str, readers: Mapping[str, Callable[..., Masks]], code: str
) -> list[str]:
    """Rows of one series in one format; answers with what is worse than claimed."""
    listed = json.loads((labels.parent / "labels.json").read_text())
    truth = read_labels(labels, names={int(v): n for v, n in listed.items()})
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / ("labels.seg.nrrd" if kind == "seg-nrrd" else "labels.dcm")
        fewscan.export(labels, file, kind=kind, source=series)
        for program in [*readers, *(() if kind == "seg-nrrd" else ("dciodvfy",))]:
            key = {"series": name, "format": kind, "program": program}
            with rows(RESULT, key, code=code) as row:
                if row is None:
                    continue
                if program == "dciodvfy":
                    row |= dciodvfy(file)
                else:
                    row |= worst(readers[program](file, series, truth, Path(scratch)), truth)
                row |= _versions(program)
                print(key, row, flush=True)
                least = 0.99 if kind == "rtstruct" else 1.0
                if row.get("errors", 0) or row.get("dice_min", 1.0) < least:
                    wrong.append(f"{key}: {row}")
    return wrong


def _versions(*programs: str) -> dict[str, str]:
    found = []
    for program in programs:
        debian = DEBIAN.get(program)
        told = _run("dpkg-query", "-W", "-f", "${Version}", debian) if debian else version(program)
        found.append(told if len(programs) == 1 else f"{program} {told}")
    return {"version": ", ".join(found)}


if __name__ == "__main__":
    main()

"""Damaged files of every format: a `DataError` or a volume, never a crash, a hang or much memory."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewscan.data.io import read_image, read_labels, write_image
from fewscan.errors import FewscanError
from fewscan.space.geometry import Geometry

FORMATS = (".nii", ".nii.gz", ".nrrd", ".mha")
LIMIT = 64 * 2**20
HEADER_FIELDS = {".nii": 352, ".nii.gz": 352, ".nrrd": 400, ".mha": 400}


def sound(suffix: str, *, packed: bool = True) -> bytes:
    """The bytes of a good file; NIfTI unpacked so that header fields can be reached."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        data = np.random.default_rng(0).integers(-50, 50, (7, 6, 5)).astype(np.int16)
        write_image(data, path, native=Geometry((7, 6, 5), np.diag([1.0, 2.0, 3.0, 1.0])))
        raw = path.read_bytes()
    return gzip.decompress(raw) if suffix == ".nii.gz" and not packed else raw


def attempt(raw: bytes, suffix: str) -> None:
    """Read bytes as a file: it may be refused, in a message that names it, and must stay small."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fuzzed{suffix}"
        path.write_bytes(raw)
        said: list[str] = []
        tracemalloc.start()
        try:
            for read in (read_image, read_labels):
                try:
                    read(path)
                except FewscanError as error:
                    said.append(str(error))
            assert all("fuzzed" in text for text in said)
            assert tracemalloc.get_traced_memory()[1] < LIMIT
        finally:
            tracemalloc.stop()


edits = st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=12)
relaxed = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("suffix", FORMATS)
@relaxed
@given(edits=edits)
def test_header_bytes_may_be_anything(suffix: str, edits: list[tuple[int, int]]) -> None:
    raw = bytearray(sound(suffix, packed=False))
    for place, value in edits:
        raw[place % min(HEADER_FIELDS[suffix], len(raw))] = value
    attempt(gzip.compress(bytes(raw), 1) if suffix == ".nii.gz" else bytes(raw), suffix)


@pytest.mark.parametrize("suffix", FORMATS)
@relaxed
@given(share=st.floats(0, 1), tail=st.binary(max_size=30))
def test_files_may_end_anywhere(suffix: str, share: float, tail: bytes) -> None:
    raw = sound(suffix)
    attempt(raw[: int(share * len(raw))] + tail, suffix)


@pytest.mark.parametrize("suffix", FORMATS)
@relaxed
@given(raw=st.binary(max_size=700))
def test_files_may_be_any_bytes(suffix: str, raw: bytes) -> None:
    magic = {".nii": b"\x5c\x01\0\0", ".nrrd": b"NRRD0004\n", ".mha": b"ObjectType = Image\n"}.get(
        suffix, b"\x1f\x8b\x08"
    )
    attempt(magic + raw, suffix)


ODD = [-1, 0, 1, 3, 4, 32767, 1e30, np.nan]
FIELDS = ("dim", "pixdim", "vox_offset", "datatype", "bitpix", "srow_x", "quatern_b", "scl_slope", "sform_code")


@relaxed
@given(field=st.sampled_from(FIELDS), values=st.lists(st.sampled_from(ODD), min_size=8))
def test_nifti_fields_may_hold_anything(field: str, values: list[float]) -> None:
    import nibabel as nib

    raw = bytearray(sound(".nii"))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    with np.errstate(all="ignore"):
        wanted = np.nan_to_num(np.array(values[:8]), nan=0.0 if header[field].dtype.kind == "i" else np.nan)
        if header[field].dtype.kind == "i":
            wanted = np.clip(wanted, -32768, 32767)
        header[field] = wanted[: header[field].size].reshape(header[field].shape)
    raw[:348] = header.binaryblock
    attempt(bytes(raw), ".nii")


@relaxed
@given(
    key=st.sampled_from(
        ["sizes", "dimension", "type", "space directions", "space origin", "encoding", "kinds", "endian"]
    ),
    value=st.sampled_from(
        ["", "-1", "3", "99999 99999 99999", "none none none", "(1e400,0,0) (0,nan,0) (0,0,1)", "x" * 99]
    ),
)
def test_nrrd_fields_may_hold_anything(key: str, value: str) -> None:
    head, _, body = sound(".nrrd").partition(b"\n\n")
    lines = [line for line in head.decode().splitlines() if not line.startswith(f"{key}:")]
    attempt("\n".join([*lines, f"{key}: {value}"]).encode() + b"\n\n" + body, ".nrrd")


@relaxed
@given(
    key=st.sampled_from(["NDims", "DimSize", "ElementType", "ElementSpacing", "TransformMatrix", "CompressedData"]),
    value=st.sampled_from(["", "-1", "3", "99999 99999 99999", "1e400 nan 0", "MET_STRING", "True", "x" * 99]),
)
def test_metaimage_fields_may_hold_anything(key: str, value: str) -> None:
    head, _, body = sound(".mha").partition(b"ElementDataFile")
    lines = [line for line in head.decode().splitlines() if not line.startswith(f"{key} ")]
    attempt("\n".join([*lines, f"{key} = {value}", ""]).encode() + b"ElementDataFile" + body, ".mha")


SWARM = """
import random, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fewscan.data.io import read_image
from fewscan.errors import DataError, GeometryError
folder, used = Path(sys.argv[1]), int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
dice = random.Random(7)
for file in sorted(folder.glob("good*")):
    sound = file.read_bytes()
    for _ in range(60):
        raw = bytearray(sound)
        for _ in range(dice.randint(1, 20)):
            raw[dice.randrange(min(400, len(raw)))] = dice.randrange(256)
        file.with_name("bad" + file.name).write_bytes(raw[: dice.choice([len(raw), dice.randrange(len(raw))])])
        try:
            read_image(file.with_name("bad" + file.name))
        except (DataError, GeometryError):
            pass
print("survived")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited through /proc and rlimit")
def test_no_damaged_file_needs_a_gibibyte(tmp_path: Path) -> None:
    for suffix in FORMATS:
        (tmp_path / f"good{suffix}").write_bytes(sound(suffix))
    done = subprocess.run(
        [sys.executable, "-c", SWARM, str(tmp_path), str(Path(__file__).parents[2] / "src")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "survived", done.stderr[-2000:]

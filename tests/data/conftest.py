"""Synthetic anatomy: a bright ellipsoid in noise, off centre so that every flip shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewscan.data.io import write_image, write_labelmap
from fewscan.space.geometry import Geometry


@dataclass
class Scans:
    """Writes images and label maps of one grid."""

    root: Path
    shape: tuple[int, int, int] = (12, 10, 9)

    @property
    def geometry(self) -> Geometry:
        affine = np.diag([1.0, 1.2, 2.0, 1.0])
        affine[:3, 3] = -5, 3, 7
        return Geometry(self.shape, affine)

    def label(self, seed: int = 0, values: tuple[int, ...] = (1,)) -> np.ndarray:
        """One box per value, side by side along x; its shape depends on the seed."""
        label = np.zeros(self.shape, np.uint16)
        width = max(1, 8 // len(values))
        for index, value in enumerate(values):
            label[1 + index * width : 1 + (index + 1) * width, 2 : 6 + seed % 3, 2:7] = value
        label[1, 2, 2 + seed % 5] = 0
        return label

    def image(self, seed: int = 0) -> np.ndarray:
        noise = np.random.default_rng(seed).integers(0, 40, self.shape)
        return (noise + 100 * (self.label(seed) > 0)).astype(np.int16)

    def write_image(self, path: str, data: np.ndarray | None = None, *, seed: int = 0, grid: Any = None) -> Path:
        write_image(self.image(seed) if data is None else data, self.root / path, native=grid or self.geometry)
        return self.root / path

    def write_label(self, path: str, data: np.ndarray | None = None, *, seed: int = 0, grid: Any = None) -> Path:
        write_labelmap(self.label(seed) if data is None else data, self.root / path, native=grid or self.geometry)
        return self.root / path

    def pairs(self, count: int, *, unlabelled: int = 0, values: tuple[int, ...] = (1,)) -> Path:
        """images/ + labels/ with cases named case_a, case_b, ..."""
        for seed in range(count + unlabelled):
            name = f"case_{chr(97 + seed)}.nii.gz"
            self.write_image(f"images/{name}", seed=seed)
            if seed < count:
                self.write_label(f"labels/{name}", self.label(seed, values))
        return self.root


@pytest.fixture
def scans(tmp_path: Path) -> Scans:
    return Scans(tmp_path)


@pytest.fixture
def slices(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small CT series; ``edit`` changes the slices before they are saved."""

    def write(name: str = "series", *, count: int = 6, edit: Callable[[list[Any]], None] | None = None) -> Path:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

        folder = tmp_path / name
        folder.mkdir(parents=True)
        series, made = generate_uid(), []
        for index in range(count):
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
            meta.MediaStorageSOPInstanceUID = generate_uid()
            item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
            item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
            item.PatientName, item.PatientID, item.SeriesInstanceUID = "Secret^Person", "ID-4711", series
            item.Modality, item.Rows, item.Columns = "CT", 5, 4
            item.ImagePositionPatient = [-10.0, -20.0, 30.0 + 2.5 * index]
            item.ImageOrientationPatient, item.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.7, 0.5]
            item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
            item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 12, 11, 0
            item.RescaleSlope, item.RescaleIntercept = "1", "-1024"
            pixels = (np.arange(20).reshape(5, 4) + 100 * index).astype(np.uint16)
            item.PixelData = pixels.tobytes()
            made.append(item)
        if edit is not None:
            edit(made)
        for index, item in enumerate(made):
            item.save_as(folder / f"{(index * 7) % max(1, count)}-{index}.dcm")  # names out of order
        return folder

    return write

"""DICOM-SEG out: a binary segmentation of the source series, one segment per label, built by highdicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from fewscan.data.dicom_slices import quiet
from fewscan.deliver.binding import Binding
from fewscan.deliver.structures import Code, Structure
from fewscan.errors import ConfigError
from fewscan.learn.checkpoint import USE

NEEDS = 'writing DICOM-SEG needs the package highdicom; install it with: pip install "highdicom>=0.25"'


def write_seg(label: NDArray[np.uint16], path: Path, *, structures: Sequence[Structure], binding: Binding) -> None:
    """Write a segmentation object.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        In the order of the series' grid: columns, rows, slices.
    path : Path
        File to write; not renamed into place, see `fewscan.data.io.atomic`.
    structures : sequence of Structure
        One segment each; those without a voxel are left out.
    binding : Binding
        The series, and who drew.

    Raises
    ------
    ConfigError
        If highdicom is not installed.
    """
    try:
        import highdicom as hd
    except ModuleNotFoundError:
        raise ConfigError(NEEDS) from None
    there = [s for s in structures if (label == s.value).any()]
    numbers = np.zeros(int(label.max()) + 1, np.uint8 if len(there) < 256 else np.uint16)
    for number, structure in enumerate(there, start=1):
        numbers[structure.value] = number
    pixels = numbers[label.transpose(2, 1, 0)]  # slices, rows, columns
    if binding.source is not None:  # whose frames have an order of their own
        pixels = pixels[np.argsort(binding.series.frames)]
    with quiet():
        item = hd.seg.Segmentation(
            source_images=binding.headers if binding.source is None else [binding.source],
            pixel_array=pixels,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_segment(hd, n, s, binding) for n, s in enumerate(there, start=1)],
            series_instance_uid=uid.generate_uid(),
            series_number=binding.series_number,
            sop_instance_uid=uid.generate_uid(),
            instance_number=1,
            manufacturer="fewscan",
            manufacturer_model_name="fewscan",
            software_versions=binding.version,
            device_serial_number="none",
            content_description=f"fewscan labels, {USE}",
            content_label="SEGMENTATION",
            series_description=binding.description,
        )
        item.save_as(path, enforce_file_format=True)


def _segment(hd: Any, number: int, structure: Structure, binding: Binding) -> Any:
    """Name, codes, colour and author of one segment."""
    author = hd.AlgorithmIdentificationSequence(
        name="fewscan",
        family=_coded(hd, Code("123109", "DCM", "Artificial Intelligence")),
        version=binding.version,
        parameters={"use": USE},
    )
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=structure.name[:64],
        segmented_property_category=_coded(hd, structure.category),
        segmented_property_type=_coded(hd, structure.kind),
        algorithm_type="MANUAL" if binding.manual else "AUTOMATIC",
        algorithm_identification=None if binding.manual else author,
        tracking_uid=uid.generate_uid(),
        tracking_id=structure.name[:64],
        display_color=hd.color.CIELabColor.from_rgb(*structure.colour),
    )
    if structure.side is not None:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_coded(hd, structure.side)]
    return segment


def _coded(hd: Any, code: Code) -> Any:
    return hd.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)

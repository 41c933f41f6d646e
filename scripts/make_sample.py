"""Choose the embedded scans from a copy of the MSD hippocampus task and write them into the package.

    python scripts/make_sample.py --data FOLDER

FOLDER holds images/, labels/ and labels.json. The choice depends on SEED and the sorted case ids only.
"""

from __future__ import annotations

import argparse
import gzip
import random
import shutil
from pathlib import Path

import numpy as np

from fewscan.data.dataset import find, load
from fewscan.data.io import write_image, write_labelmap
from fewscan.data.sample import sample_path
from fewscan.space.volume import Case

SEED = 2
POOL = 160  # the first ones by id; the rest are what benchmarks test on
LABELLED, UNLABELLED, TEST = 5, 13, 12
ATTRIBUTION = """# Where these scans come from

30 of the brain MR crops of the Medical Segmentation Decathlon, task 04 "Hippocampus" (labels 1 anterior, 2 posterior).

- A. L. Simpson et al. A large annotated medical image dataset for the development and evaluation of segmentation
  algorithms. arXiv:1902.09063, 2019.
- M. Antonelli et al. The Medical Segmentation Decathlon. Nature Communications 13, 4128, 2022.
  doi:10.1038/s41467-022-30695-9

Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0),
<https://creativecommons.org/licenses/by-sa/4.0/>. It covers the files in this folder; the program around them has its
own licence.

Changes: a subset was chosen at random (`scripts/make_sample.py`), the label maps of the scans that serve as unlabelled
ones were left out, whole-numbered voxels were stored in the smallest integer type that holds them, and files were
compressed again. No voxel value was changed.
"""


def main() -> None:
    """Write the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, labels/ and labels.json")
    data = find(parser.parse_args().data)
    out = sample_path()
    shutil.rmtree(out, ignore_errors=True)
    chosen = random.Random(SEED).sample(list(data.labelled)[:POOL], LABELLED + UNLABELLED + TEST)
    for index, files in enumerate(chosen):
        held = index >= LABELLED + UNLABELLED
        write_case(load(files, data), out / "test" if held else out, labelled=held or index < LABELLED)
    shutil.copyfile(data.root / "labels.json", out / "labels.json")
    shutil.copyfile(data.root / "labels.json", out / "test" / "labels.json")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")
    written = [p for p in out.rglob("*") if p.is_file()]
    print(f"{len(chosen)} scans, {len(written)} files, {sum(p.stat().st_size for p in written) / 1e6:.2f} MB")


def write_case(case: Case, folder: Path, *, labelled: bool) -> None:
    """Write image and label map, packed as tightly as lossless packing goes."""
    image = folder / "images" / f"{case.id}.nii.gz"
    write_image(smallest(case.image.data[0]), image, native=case.image.native)
    pack(image)
    if labelled and case.label is not None:
        label = folder / "labels" / image.name
        write_labelmap(case.label.data, label, native=case.image.native)
        pack(label)


def smallest(data: np.ndarray) -> np.ndarray:
    """The same values in the smallest integer type, or unchanged where they are not whole."""
    for kind in (np.uint8, np.int16, np.uint16, np.int32):
        if (data == np.round(data)).all() and np.iinfo(kind).min <= data.min() and data.max() <= np.iinfo(kind).max:
            return data.astype(kind)
    return data


def pack(path: Path) -> None:
    """Compress again, slowly and reproducibly."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9, mtime=0))


if __name__ == "__main__":
    main()

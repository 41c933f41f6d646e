"""Resample images through a displacement field with ANTs, or let ANTs make one; prints nothing, leaves files.

Runs in the environment of `classical.txt`, never in fewscan's:

    python benchmarks/peers/apply_field.py apply FIXED FIELD OUT_FOLDER IMAGE...
    python benchmarks/peers/apply_field.py make FIXED FIELD MOVING
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """One of the two."""
    import ants

    kind, fixed, field, *rest = sys.argv[1:]
    still = ants.image_read(fixed)
    if kind == "make":
        with tempfile.TemporaryDirectory() as folder:
            found = ants.registration(
                still, ants.image_read(rest[0]), type_of_transform="SyNOnly", outprefix=str(Path(folder) / "pair_")
            )
            made = next(path for path in found["fwdtransforms"] if path.endswith("Warp.nii.gz"))
            shutil.copy(made, field)
        return
    for name in rest[1:]:
        warped = ants.apply_transforms(fixed=still, moving=ants.image_read(name), transformlist=[field])
        ants.image_write(warped, str(Path(rest[0]) / Path(name).name))


if __name__ == "__main__":
    main()

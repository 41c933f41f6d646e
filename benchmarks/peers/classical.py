"""Register one pair of scans with a classical peer, warp the moving labels, and print seconds and version as JSON.

Runs in an environment of its own (``pip install -r benchmarks/peers/classical.txt``), never in fewscan's:

    python benchmarks/peers/classical.py SYSTEM FIXED MOVING MOVING_LABELS OUT_LABELS OUT_FIELD

``ants_syn``
    ANTsPy ``registration(type_of_transform="SyN")`` as it is: affine and SyN with mutual information.
``ants_syncc``
    The same with "SyNCC": local correlation.
``greedy``
    Affine, then deformable, both with ``NCC 2x2x2``; iterations 100x50x10 and 100x50x20; centres of the images first.
``greedy_wncc``
    The same with ``WNCC 2x2x2`` for the affine part, which does not lose its way on small crops as NCC can.
``dipy_syn``
    Centres of mass, translation, rigid, affine with mutual information, then ``SymmetricDiffeomorphicRegistration``
    with ``CCMetric(3)`` and its own 100, 100, 25 iterations.

Labels: "genericLabel" of ANTs, "LABEL 0.2vox" of Greedy, nearest voxel with DIPY, which has no other. Seconds count
from after the imports to the warped label map on disk, reading included; those of the registration alone are given
too. OUT_FIELD, written off the clock, holds the deformable part without the affine one: (X, Y, Z, 3), RAS+ mm, on the
fixed grid. The number of threads is that of the environment, two unless it says otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

THREADS = "2"
THREAD_VARIABLES = ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
for variable in THREAD_VARIABLES:  # read on import by the libraries below
    os.environ.setdefault(variable, THREADS)

LPS = (-1.0, -1.0, 1.0)  # ITK's world against RAS+
Seconds = dict[str, float]


def ants(kind: str) -> Callable[[argparse.Namespace], Seconds]:
    """A run of ANTs with this type of transform."""

    def run(args: argparse.Namespace) -> Seconds:
        import ants
        import nibabel as nib
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            clock = [time.perf_counter()]
            fixed, moving = ants.image_read(str(args.fixed)), ants.image_read(str(args.moving))
            labels = ants.image_read(str(args.moving_labels))
            clock.append(time.perf_counter())
            found = ants.registration(fixed, moving, type_of_transform=kind, outprefix=str(Path(folder) / "pair_"))
            clock.append(time.perf_counter())
            warped = ants.apply_transforms(
                fixed=fixed, moving=labels, transformlist=found["fwdtransforms"], interpolator="genericLabel"
            )
            ants.image_write(warped, str(args.out_labels))
            clock.append(time.perf_counter())
            field = nib.load(next(path for path in found["fwdtransforms"] if path.endswith("Warp.nii.gz")))
            write_field(np.asarray(field.dataobj).squeeze() * np.float32(LPS), field.affine, args.out_field)
        return seconds(clock)

    return run


def greedy(metric: str) -> Callable[[argparse.Namespace], Seconds]:
    """A run of Greedy with this metric for the affine part, images and warp handed over in memory."""

    def run(args: argparse.Namespace) -> Seconds:
        import nibabel as nib
        import numpy as np
        import SimpleITK as sitk  # noqa: N813 (as its makers write it)
        from picsl_greedy import Greedy3D

        options, quiet = f"-V 0 -threads {os.environ[THREAD_VARIABLES[0]]}", io.StringIO()
        clock = [time.perf_counter()]
        fixed, moving = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (args.fixed, args.moving))
        labels = sitk.ReadImage(str(args.moving_labels))
        clock.append(time.perf_counter())
        program = Greedy3D()
        program.execute(
            f"{options} -i fixed moving -a -dof 12 -ia-image-centers -m {metric} 2x2x2 -n 100x50x10 -o affine",
            out=quiet, err=quiet, fixed=fixed, moving=moving, affine=None,
        )  # fmt: skip
        program.execute(
            f"{options} -i fixed moving -it affine -m NCC 2x2x2 -n 100x50x20 -wp 0 -o warp",
            out=quiet, err=quiet, warp=None,
        )  # fmt: skip
        clock.append(time.perf_counter())
        os.chdir(args.out_labels.parent)  # its commands are split at spaces, which a folder may hold
        program.execute(
            f"{options} -rf fixed -ri LABEL 0.2vox -rm labels {args.out_labels.name} -r warp affine",
            out=quiet, err=quiet, labels=labels,
        )  # fmt: skip
        clock.append(time.perf_counter())
        field = sitk.GetArrayFromImage(program["warp"]).transpose(2, 1, 0, 3) * np.float32(LPS)
        write_field(field, nib.load(args.out_labels).affine, args.out_field)
        return seconds(clock)

    return run


def dipy(args: argparse.Namespace) -> Seconds:
    """A run of DIPY."""
    import nibabel as nib
    import numpy as np
    from dipy.align.imaffine import AffineRegistration, MutualInformationMetric, transform_centers_of_mass
    from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
    from dipy.align.metrics import CCMetric
    from dipy.align.transforms import AffineTransform3D, RigidTransform3D, TranslationTransform3D

    clock = [time.perf_counter()]
    still, other, drawn = (nib.load(path) for path in (args.fixed, args.moving, args.moving_labels))
    fixed, moving = (image.get_fdata(dtype=np.float32).astype(np.float64) for image in (still, other))
    labels = np.asarray(drawn.dataobj).astype(np.int32)
    clock.append(time.perf_counter())
    grids = {"static_grid2world": still.affine, "moving_grid2world": other.affine}
    matrix = transform_centers_of_mass(fixed, still.affine, moving, other.affine).affine
    search = AffineRegistration(
        metric=MutualInformationMetric(nbins=32), level_iters=[10000, 1000, 100], sigmas=[3.0, 1.0, 0.0],
        factors=[4, 2, 1], verbosity=0,
    )  # fmt: skip
    for kind in (TranslationTransform3D, RigidTransform3D, AffineTransform3D):
        matrix = search.optimize(fixed, moving, kind(), None, starting_affine=matrix, **grids).affine
    found = SymmetricDiffeomorphicRegistration(CCMetric(3)).optimize(fixed, moving, prealign=matrix, **grids)
    clock.append(time.perf_counter())
    warped = found.transform(labels, interpolation="nearest", image_world2grid=np.linalg.inv(drawn.affine))
    nib.save(nib.Nifti1Image(warped.astype(np.int16), still.affine), args.out_labels)
    clock.append(time.perf_counter())
    write_field(np.asarray(found.get_forward_field()), still.affine, args.out_field)
    return seconds(clock)


def seconds(clock: list[float]) -> Seconds:
    """Whole run and registration alone, from the four times: start, read, registered, written."""
    return {"seconds": clock[3] - clock[0], "register_seconds": clock[2] - clock[1]}


def write_field(mm, affine, path: Path) -> None:
    """Displacement (X, Y, Z, 3) in RAS+ mm as NIfTI."""
    import nibabel as nib
    import numpy as np

    nib.save(nib.Nifti1Image(np.ascontiguousarray(mm, dtype=np.float32), affine), path)


SYSTEMS = {
    "ants_syn": ("antspyx", ants("SyN")),
    "ants_syncc": ("antspyx", ants("SyNCC")),
    "greedy": ("picsl-greedy", greedy("NCC")),
    "greedy_wncc": ("picsl-greedy", greedy("WNCC")),
    "dipy_syn": ("dipy", dipy),
}


def main() -> None:
    """One pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    for name in ("fixed", "moving", "moving_labels", "out_labels", "out_field"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    args = parser.parse_args()
    package, run = SYSTEMS[args.system]
    print(json.dumps(run(args) | {"version": f"{package} {version(package)}"}), flush=True)


if __name__ == "__main__":
    main()

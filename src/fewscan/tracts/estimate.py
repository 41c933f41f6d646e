"""Fibre orientations from diffusion signals: tensors, and peaks of constrained spherical deconvolution, by dipy.

Diffusivities are in um2/ms (1e-3 mm2/s), directions in the RAS+ world.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fewscan.data.listing import peak_channels
from fewscan.errors import ConfigError, DataError
from fewscan.space.geometry import Array
from fewscan.tracts.gradients import B0, LEAST_DIRECTIONS, Gradients, determine_tensor

NEEDS = 'diffusion scans need the package dipy; install it with: pip install "dipy>=1.9"'
PEAK_CHANNELS = peak_channels(3)
SCALAR_CHANNELS = ("FA", "MD", "S0")
MOST_B_OF_TENSOR = 1600.0  # s/mm2; above it the signal is no longer a tensor's
HIGHEST_ORDER = 8
RESPONSE_VOXELS = 300
LEAST_FA = 0.4
LEAST_PEAK = 0.1  # of the largest peak of the voxel
LEAST_ANGLE_DEG = 25
FULL_LENGTH = 99  # percentile of the first peaks' lengths that becomes length 1
TRIANGLE = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))

Signal = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Tensors:
    """Diffusion tensors of N voxels.

    Parameters
    ----------
    values : (N, 6) float32
        `listing.TENSOR_CHANNELS`, um2/ms.
    eigenvalues : (N, 3) float32
        Descending, um2/ms.
    principal : (N, 3) float32
        Unit direction of the largest.
    s0 : (N,) float32
        Mean of the unweighted volumes.
    shells : tuple of float
        b-values that they were fitted to, s/mm2.
    """

    values: Signal
    eigenvalues: Signal
    principal: Signal
    s0: Signal
    shells: tuple[float, ...]

    @property
    def biased(self) -> bool:
        """Whether the signal was no longer a tensor's: directions hold, diffusivities come out too low."""
        return max(self.shells) > MOST_B_OF_TENSOR

    @property
    def md(self) -> Signal:
        """Mean diffusivity, (N,), um2/ms."""
        mean: Signal = self.eigenvalues.mean(1)
        return mean

    @property
    def fa(self) -> Signal:
        """Fractional anisotropy, (N,), 0 to 1 (Basser and Pierpaoli 1996)."""
        spread = ((self.eigenvalues - self.md[:, None]) ** 2).sum(1)
        total = (self.eigenvalues**2).sum(1)
        share: Signal = np.sqrt(np.clip(1.5 * spread / np.maximum(total, 1e-12), 0, 1)).astype(np.float32)
        return share


def fit_tensors(signal: Signal, gradients: Gradients) -> Tensors:
    """Diffusion tensors by weighted least squares, from b-values up to 1600 s/mm2.

    Where these do not determine a tensor, from the lowest shell that does: its directions still serve for the proof and
    the response of peaks, see `Tensors.biased`. Six directions apart determine one, unless they lie unluckily.

    Parameters
    ----------
    signal : (N, V) float32
        One row a voxel.
    gradients : Gradients
        Of the V volumes.

    Raises
    ------
    ConfigError
        If dipy is missing.
    DataError
        If no shell determines a tensor.
    """
    dti = _dipy("dipy.reconst.dti")
    used = _of_tensor(gradients)
    fit = dti.TensorModel(_table(gradients, used), fit_method="WLS").fit(np.maximum(signal[:, used], 1e-3))
    matrix = fit.quadratic_form * 1e3
    return Tensors(
        values=np.stack([matrix[:, i, j] for i, j in TRIANGLE], 1).astype(np.float32),
        eigenvalues=(fit.evals * 1e3).astype(np.float32),
        principal=fit.evecs[..., 0].astype(np.float32),
        s0=signal[:, gradients.bvals <= B0].mean(1),
        shells=tuple(b for b in gradients.shells if (gradients.shell(b) & used).any()),
    )


def _of_tensor(gradients: Gradients) -> NDArray[np.bool_]:
    """Volumes that a tensor is fitted to."""
    plain, low = gradients.bvals <= B0, gradients.bvals <= MOST_B_OF_TENSOR
    if determine_tensor(gradients.directions[low & ~plain]):
        return low
    for b in gradients.shells:
        if determine_tensor(gradients.directions[gradients.shell(b)]):
            return plain | gradients.shell(b)
    told = ", ".join(f"{gradients.apart(b)} with b = {b:.0f}" for b in gradients.shells)
    raise DataError(
        f"directions: {told} s/mm2, each counted once however often it is stored; a tensor needs {LEAST_DIRECTIONS} "
        f"that lie in no plane or cone, up to {MOST_B_OF_TENSOR:.0f} or in one shell; take an acquisition with more "
        "directions per shell"
    )


def single_fibres(tensors: Tensors, *, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the voxels that look most like one fibre bundle, away from the brain's surface.

    Parameters
    ----------
    tensors : Tensors
        Of the mask's voxels.
    mask : (X, Y, Z) bool
        Brain.

    Raises
    ------
    DataError
        If none is clearly anisotropic.
    """
    inner = ndimage.binary_erosion(mask, iterations=2)[mask]
    plausible = (tensors.md > 0.3) & (tensors.md < 1.2) & (tensors.fa < 0.95) & (tensors.eigenvalues[:, 2] > 0)
    plausible &= inner & (tensors.s0 > 0.5 * np.median(tensors.s0))
    found = np.flatnonzero(plausible)
    best = found[np.argsort(-tensors.fa[found])[: min(RESPONSE_VOXELS, max(10, len(found) // 20))]]
    if len(best) < 10 or float(tensors.fa[best].mean()) < LEAST_FA:
        fa = float(tensors.fa[best].mean()) if len(best) else 0.0
        raise DataError(
            f"no voxel looks like a single fibre bundle (FA {fa:.2f}, {LEAST_FA} needed); check mask, b-values and scan"
        )
    return best


def csd_peaks(signal: Signal, gradients: Gradients, *, tensors: Tensors, mask: NDArray[np.bool_]) -> Signal:
    """Three peaks of the fibre orientation density, longest first, (N, 9); zero where there are fewer.

    Constrained spherical deconvolution (Tournier et al. 2007, doi 10.1016/j.neuroimage.2007.02.016) of the shell
    with the most directions, of several the one with the highest b-value; repeated directions count once. The order of
    the harmonics is the highest even one that the directions determine, at most 8. Lengths are amplitudes.

    Parameters
    ----------
    signal : (N, V) float32
        One row a voxel of the mask.
    gradients : Gradients
        Of the V volumes.
    tensors : Tensors
        Of the same voxels, for the response of a single fibre.
    mask : (X, Y, Z) bool
        Brain.

    Raises
    ------
    ConfigError
        If dipy is missing.
    DataError
        If the shell has fewer than 6 directions, or no voxel looks like a single fibre.
    """
    csdeconv = _dipy("dipy.reconst.csdeconv")
    shell = max(gradients.shells, key=lambda b: (gradients.apart(b), b))
    count = gradients.apart(shell)
    if count < LEAST_DIRECTIONS:
        raise DataError(
            f"the largest shell, b = {shell:.0f} s/mm2, has {count} directions, peaks need {LEAST_DIRECTIONS} with one "
            "b-value; take an acquisition with more directions per shell, or give peaks that another program made"
        )
    one = single_fibres(tensors, mask=mask)
    values = tensors.eigenvalues[one].mean(0).astype(np.float64) / 1e3
    response = np.array([values[0], values[1:].mean(), values[1:].mean()]), float(tensors.s0[one].mean())
    used = gradients.shell(shell) | (gradients.bvals <= B0)
    order = order_of(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dipy warns of its own future bases
        model = csdeconv.ConstrainedSphericalDeconvModel(_table(gradients, used), response, sh_order_max=order)
        return _peaks(model, np.maximum(signal[:, used], 1e-3))


def _peaks(model: Any, signal: Signal) -> Signal:
    """Peaks of a deconvolution, (N, 9), the same to the bit as dipy's ``peaks_from_model`` finds.

    The same functions voxel by voxel, bare: without a check of keywords at each call, and without the figures of the
    density that nobody asked for. Together these take longer than the mathematics.
    """
    csdeconv, direction, data = (_dipy(f"dipy.{name}") for name in ("reconst.csdeconv", "direction", "data"))
    deconvolve, peaks_of = inspect.unwrap(csdeconv.csdeconv), inspect.unwrap(direction.peak_directions)
    sphere = data.default_sphere
    sampling, design = model.sampling_matrix(sphere).T, model.R.diagonal() * model.B_dwi
    normal, weighted = np.dot(design.T, design), ~model.gtab.b0s_mask
    peaks = np.zeros((len(signal), 3, 3))
    for voxel, measured in zip(peaks, signal, strict=True):
        found = deconvolve(
            measured[weighted], design, model.B_reg, tau=model.tau, convergence=model.convergence, P=normal
        )
        directions, values, _ = peaks_of(
            np.dot(found[0], sampling), sphere, relative_peak_threshold=LEAST_PEAK, min_separation_angle=LEAST_ANGLE_DEG
        )
        voxel[: len(values)] = (directions * np.maximum(values, 0)[:, None])[:3]
    return peaks.reshape(len(signal), 9).astype(np.float32)


def order_of(directions: int) -> int:
    """Highest even order of spherical harmonics that so many directions determine, at most 8.

    Parameters
    ----------
    directions : int
        On the half sphere.

    Examples
    --------
    >>> [order_of(n) for n in (6, 15, 32, 64)]
    [2, 4, 6, 8]
    """
    return max(2, *(order for order in range(2, HIGHEST_ORDER + 1, 2) if (order + 1) * (order + 2) // 2 <= directions))


def unit_length(peaks: Signal) -> tuple[Signal, float]:
    """Peaks in units of a long first peak, and that length: programs scale amplitudes differently.

    Parameters
    ----------
    peaks : (N, 9) float32
        Of the voxels of a brain, longest first.

    Raises
    ------
    DataError
        If all are zero.
    """
    lengths = np.linalg.norm(peaks[:, :3], axis=1)
    full = float(np.percentile(lengths[lengths > 0], FULL_LENGTH)) if (lengths > 0).any() else 0.0
    if full <= 0:
        raise DataError("all peaks are zero; check mask and peaks")
    return peaks / np.float32(full), full


def brain_mask(dwi: NDArray[Any], gradients: Gradients) -> NDArray[np.bool_]:
    """Brain by dipy's median Otsu threshold of the unweighted volumes; for scans without a mask.

    Parameters
    ----------
    dwi : (V, X, Y, Z) number
        Diffusion scan.
    gradients : Gradients
        Of its volumes.

    Raises
    ------
    ConfigError
        If dipy is missing.
    """
    masking = _dipy("dipy.segment.mask")
    mean = np.ascontiguousarray(dwi[gradients.bvals <= B0], np.float32).mean(0)
    inside: NDArray[np.bool_] = masking.median_otsu(mean, median_radius=2, numpass=2)[1]
    return inside


def _table(gradients: Gradients, used: NDArray[np.bool_]) -> Any:
    table = _dipy("dipy.core.gradients")
    bvals: Array = np.where(gradients.bvals[used] <= B0, 0, gradients.bvals[used])
    return table.gradient_table(bvals, bvecs=gradients.directions[used], b0_threshold=B0)


def _dipy(module: str) -> Any:
    from importlib import import_module

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(module)
    except ImportError:
        raise ConfigError(NEEDS) from None

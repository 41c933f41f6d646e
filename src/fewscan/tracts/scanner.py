"""Diffusion scans of an anatomy: signals of a ball and sticks, thick slices, a bias field, Rician noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fewscan.tracts.anatomy import Anatomy, smooth_noise
from fewscan.tracts.gradients import Gradients

BIAS_SIGMA_MM = 40.0

Floats = NDArray[np.float32]


def scanned(
    person: Anatomy, gradients: Gradients, *, rng: np.random.Generator, snr: float, slice_mm: float = 0.0,
    bias: float = 0.0,
) -> Floats:  # fmt: skip
    """Diffusion scan (V, X, Y, Z) of a person, with Rician noise.

    S / S0 = (1 - sum f) exp(-b d) + sum f_i exp(-b d (g v_i)^2): ball and sticks of Behrens et al. 2003,
    doi 10.1002/mrm.10609, with one diffusivity.

    Parameters
    ----------
    person : Anatomy
        Whom.
    gradients : Gradients
        Table.
    rng : Generator
        Of bias field and noise.
    snr : float
        Of the unweighted signal at its median over the brain.
    slice_mm : float
        Slice thickness to blur to along the third axis; 0 for the grid's own. Noise is that of the thick slices.
    bias : float
        Largest change of the signal by a smooth field, as a share.
    """
    inside = person.mask
    f, v = person.f[:, inside], person.v.reshape(3, 3, *inside.shape)[:, :, inside]
    d, s0 = person.d[inside], person.s0[inside]
    field = smooth_noise(person.geometry, rng, sigma_mm=BIAS_SIGMA_MM, channels=1)[0]
    shade = (1 + bias * field / max(float(np.abs(field).max()), 1e-9)).astype(np.float32)
    sigma = float(np.median(s0)) / snr
    factor = max(1, round(slice_mm / person.geometry.spacing[2])) if slice_mm else 1
    out = np.zeros((len(gradients.bvals), *inside.shape), np.float32)
    for volume, b, g in zip(out, gradients.bvals, gradients.directions, strict=True):
        along = np.einsum("jin,i->jn", v, g.astype(np.float32)) ** 2
        signal = (1 - f.sum(0)) * np.exp(-b * d) + (f * np.exp(-b * d * along)).sum(0)
        volume[inside] = s0 * signal
        volume *= shade
        volume[:] = _noisy(volume, rng, sigma=sigma, factor=factor) * inside
    return out


def _noisy(volume: Floats, rng: np.random.Generator, *, sigma: float, factor: int) -> Floats:
    """Magnitude with Rician noise, acquired in slices that are ``factor`` grid slices thick, put back on the grid."""
    z = volume.shape[2]
    if factor > 1:
        padded = np.concatenate([volume, np.repeat(volume[..., -1:], -z % factor, axis=2)], axis=2)
        volume = padded.reshape(*volume.shape[:2], -1, factor).mean(3)
    real, imaginary = rng.normal(0, sigma, (2, *volume.shape))
    thick: Floats = np.hypot(volume + real, imaginary).astype(np.float32)
    if factor == 1:
        return thick
    centres = (np.arange(z) + 0.5) / factor - 0.5
    low = np.clip(np.floor(centres).astype(int), 0, thick.shape[2] - 1)
    high, share = np.minimum(low + 1, thick.shape[2] - 1), np.clip(centres - low, 0, 1)
    thin: Floats = (thick[..., low] * (1 - share) + thick[..., high] * share).astype(np.float32)
    return thin

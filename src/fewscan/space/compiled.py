"""Loops that numba compiles to machine code: sampling along a displacement, local correlation, smoothing.

Every function works on the planes ``low`` to ``high`` of its output and releases the interpreter lock, so `kernels`
hands slabs to as many threads as torch would use. They need no C++ compiler, keep their machine code beside this file,
and take any shape without compiling anew, which is why they replaced compiled torch graphs (decisions/006).
Arrays are C-contiguous float32 or float64, and shapes stand behind each signature; `kernels` holds the checks, the
gradients and the fallbacks. What `kernels` calls is listed at the end.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_OPTIONS = {"nogil": True, "fastmath": {"contract", "arcp", "nsz"}, "boundscheck": False}


def machine_code(loop):
    """Compile a loop when it is first called, and keep the result beside its file where there is a place for it.

    Parameters
    ----------
    loop : callable
        What numba understands.
    """
    try:
        return njit(cache=True, **_OPTIONS)(loop)
    except RuntimeError:  # no folder to keep machine code in: compile anew in every process
        return njit(**_OPTIONS)(loop)


@machine_code
def _cell(p, n):
    """Lower voxel, share of the upper one, step to it, and whether the place lies on the grid."""
    top = n - 1.0
    inside = (p >= 0.0) and (p <= top)
    q = p if p > 0.0 else 0.0  # a place that is not a number must not become an index
    q = q if q < top else top
    i = min(int(q), max(n - 2, 0))
    return i, q - i, 1 if n > 1 else 0, inside


@machine_code
def _sample(image, u, out, low, high):  # (C, I, J, K), (3, X, Y, Z), (C, X, Y, Z)
    """``out(x) = image(x + u(x))``, linear, the border repeated."""
    channels, ni, nj, nk = image.shape
    ny, nz = u.shape[2], u.shape[3]
    for x in range(low, high):
        for y in range(ny):
            for z in range(nz):
                i, a, si, _ = _cell(x + u[0, x, y, z], ni)
                j, b, sj, _ = _cell(y + u[1, x, y, z], nj)
                k, c, sk, _ = _cell(z + u[2, x, y, z], nk)
                for ch in range(channels):
                    v00 = image[ch, i, j, k] * (1 - c) + image[ch, i, j, k + sk] * c
                    v01 = image[ch, i, j + sj, k] * (1 - c) + image[ch, i, j + sj, k + sk] * c
                    v10 = image[ch, i + si, j, k] * (1 - c) + image[ch, i + si, j, k + sk] * c
                    v11 = image[ch, i + si, j + sj, k] * (1 - c) + image[ch, i + si, j + sj, k + sk] * c
                    v0 = v00 * (1 - b) + v01 * b
                    v1 = v10 * (1 - b) + v11 * b
                    out[ch, x, y, z] = v0 * (1 - a) + v1 * a


@machine_code
def _sample_grad_u(image, u, upper, grad, low, high):  # upper (C, X, Y, Z), grad (3, X, Y, Z)
    """Gradient of `sample` with respect to the displacement; 0 along an axis where the place is off the grid."""
    channels, ni, nj, nk = image.shape
    ny, nz = u.shape[2], u.shape[3]
    for x in range(low, high):
        for y in range(ny):
            for z in range(nz):
                i, a, si, in_i = _cell(x + u[0, x, y, z], ni)
                j, b, sj, in_j = _cell(y + u[1, x, y, z], nj)
                k, c, sk, in_k = _cell(z + u[2, x, y, z], nk)
                gx = gy = gz = 0.0
                for ch in range(channels):
                    g = upper[ch, x, y, z]
                    if g == 0.0:
                        continue
                    p000, p001 = image[ch, i, j, k], image[ch, i, j, k + sk]
                    p010, p011 = image[ch, i, j + sj, k], image[ch, i, j + sj, k + sk]
                    p100, p101 = image[ch, i + si, j, k], image[ch, i + si, j, k + sk]
                    p110, p111 = image[ch, i + si, j + sj, k], image[ch, i + si, j + sj, k + sk]
                    v00, v01 = p000 * (1 - c) + p001 * c, p010 * (1 - c) + p011 * c
                    v10, v11 = p100 * (1 - c) + p101 * c, p110 * (1 - c) + p111 * c
                    gx += g * ((v10 * (1 - b) + v11 * b) - (v00 * (1 - b) + v01 * b))
                    gy += g * ((v01 - v00) * (1 - a) + (v11 - v10) * a)
                    d0 = (p001 - p000) * (1 - b) + (p011 - p010) * b
                    d1 = (p101 - p100) * (1 - b) + (p111 - p110) * b
                    gz += g * (d0 * (1 - a) + d1 * a)
                grad[0, x, y, z] = gx if in_i else 0.0
                grad[1, x, y, z] = gy if in_j else 0.0
                grad[2, x, y, z] = gz if in_k else 0.0


@machine_code
def _sample_grad_image(u, upper, grad, low, high):  # grad (C, I, J, K), added to: one buffer per thread
    """Gradient of `sample` with respect to the image."""
    channels, ni, nj, nk = grad.shape
    ny, nz = u.shape[2], u.shape[3]
    for x in range(low, high):
        for y in range(ny):
            for z in range(nz):
                i, a, si, _ = _cell(x + u[0, x, y, z], ni)
                j, b, sj, _ = _cell(y + u[1, x, y, z], nj)
                k, c, sk, _ = _cell(z + u[2, x, y, z], nk)
                for ch in range(channels):
                    g = upper[ch, x, y, z]
                    g0, g1 = g * (1 - a), g * a
                    grad[ch, i, j, k] += g0 * (1 - b) * (1 - c)
                    grad[ch, i, j, k + sk] += g0 * (1 - b) * c
                    grad[ch, i, j + sj, k] += g0 * b * (1 - c)
                    grad[ch, i, j + sj, k + sk] += g0 * b * c
                    grad[ch, i + si, j, k] += g1 * (1 - b) * (1 - c)
                    grad[ch, i + si, j, k + sk] += g1 * (1 - b) * c
                    grad[ch, i + si, j + sj, k] += g1 * b * (1 - c)
                    grad[ch, i + si, j + sj, k + sk] += g1 * b * c


@machine_code
def _box_row(row, out, radius):
    """Sum over ``2 radius + 1`` neighbours along a line, fewer at its ends."""
    n = row.shape[0]
    total = 0.0
    for z in range(min(radius, n)):
        total += row[z]
    for z in range(n):
        if z + radius < n:
            total += row[z + radius]
        if z - radius - 1 >= 0:
            total -= row[z - radius - 1]
        out[z] = total


@machine_code
def _box_plane(plane, out, radius):  # (Y, Z) each
    """Sum over ``2 radius + 1`` rows, fewer at the edges."""
    ny, nz = plane.shape
    total = np.zeros(nz, np.float64)
    for y in range(min(radius, ny)):
        for z in range(nz):
            total[z] += plane[y, z]
    for y in range(ny):
        if y + radius < ny:
            for z in range(nz):
                total[z] += plane[y + radius, z]
        if y - radius - 1 >= 0:
            for z in range(nz):
                total[z] -= plane[y - radius - 1, z]
        for z in range(nz):
            out[y, z] = total[z]


@machine_code
def _lncc_planes(fixed, warped, sums, radius, low, high):  # (X, Y, Z), (X, Y, Z), (5, X, Y, Z)
    """Box sums within each plane of both images, their squares and their product."""
    ny, nz = fixed.shape[1], fixed.shape[2]
    plane = np.empty((5, ny, nz), fixed.dtype)
    row = np.empty(nz, fixed.dtype)
    for x in range(low, high):
        for y in range(ny):
            f, w = fixed[x, y], warped[x, y]
            _box_row(f, plane[0, y], radius)
            _box_row(w, plane[1, y], radius)
            for z in range(nz):
                row[z] = f[z] * f[z]
            _box_row(row, plane[2, y], radius)
            for z in range(nz):
                row[z] = w[z] * w[z]
            _box_row(row, plane[3, y], radius)
            for z in range(nz):
                row[z] = f[z] * w[z]
            _box_row(row, plane[4, y], radius)
        for q in range(5):
            _box_plane(plane[q], sums[q, x], radius)


@machine_code
def _width(i, n, radius):
    """Voxels of a window that lie on the grid."""
    return min(i + radius, n - 1) - max(i - radius, 0) + 1


@machine_code
def _add_row(sums, acc, x, y, sign):  # (Q, X, Y, Z), (Q, Z)
    for q in range(acc.shape[0]):
        for z in range(acc.shape[1]):
            acc[q, z] += sign * sums[q, x, y, z]


@machine_code
def _slide(sums, acc, x, y, radius):
    """Move the running sum over planes to the window around ``x``; called for each x in turn, from 0."""
    nx = sums.shape[1]
    if x == 0:
        acc[:] = 0.0
        for i in range(min(radius, nx)):
            _add_row(sums, acc, i, y, 1.0)
    if x + radius < nx:
        _add_row(sums, acc, x + radius, y, 1.0)
    if x - radius - 1 >= 0:
        _add_row(sums, acc, x - radius - 1, y, -1.0)


@machine_code
def _lncc_finish(sums, weight, parts, radius, eps, low, high):  # (5, X, Y, Z), (X, Y, Z), (3, X, Y, Z)
    """Squared local correlation, weighted and summed over the rows of this slab of Y.

    ``parts`` become what the gradient with respect to the warped image is made of: see `lncc_gradient`.
    """
    nx, ny, nz = sums.shape[1:]
    whole = 0.0
    acc = np.empty((5, nz), np.float64)
    for y in range(low, high):
        wide = _width(y, ny, radius)
        for x in range(nx):
            _slide(sums, acc, x, y, radius)
            area = wide * _width(x, nx, radius)
            for z in range(nz):
                inverse = 1.0 / (area * _width(z, nz, radius))
                mf, mw = acc[0, z] * inverse, acc[1, z] * inverse
                vf = max(acc[2, z] * inverse - mf * mf, 0.0)
                vw = max(acc[3, z] * inverse - mw * mw, 0.0)
                cross = acc[4, z] * inverse - mf * mw
                under = 1.0 / (vf * vw + eps)
                m = weight[x, y, z]
                whole += m * cross * cross * under
                a = m * 2 * cross * under * inverse
                b = a * cross * vf * under
                parts[0, x, y, z] = a
                parts[1, x, y, z] = b
                parts[2, x, y, z] = b * mw - a * mf
    return whole


@machine_code
def _box_planes(parts, sums, radius, low, high):  # (3, X, Y, Z) each
    """Box sums within each plane."""
    ny, nz = parts.shape[2], parts.shape[3]
    plane = np.empty((ny, nz), parts.dtype)
    for x in range(low, high):
        for q in range(parts.shape[0]):
            for y in range(ny):
                _box_row(parts[q, x, y], plane[y], radius)
            _box_plane(plane, sums[q, x], radius)


@machine_code
def _lncc_gradient(fixed, warped, sums, grad, radius, scale, low, high):  # (X, Y, Z) x 2, (3, X, Y, Z), (X, Y, Z)
    """Gradient with respect to the warped image, from the plane sums of `lncc_finish`'s parts, for a slab of Y."""
    nx, nz = fixed.shape[0], fixed.shape[2]
    acc = np.empty((3, nz), np.float64)
    for y in range(low, high):
        for x in range(nx):
            _slide(sums, acc, x, y, radius)
            for z in range(nz):
                grad[x, y, z] = scale * (fixed[x, y, z] * acc[0, z] - warped[x, y, z] * acc[1, z] + acc[2, z])


@machine_code
def _smooth_planes(field, out, taps, low, high):  # (C, X, Y, Z) each, (2 r + 1,)
    """Convolve within planes with a symmetric filter, the border repeated."""
    ny, nz = field.shape[2], field.shape[3]
    radius = taps.shape[0] // 2
    row = np.empty(nz + 2 * radius, field.dtype)
    plane = np.empty((ny + 2 * radius, nz), field.dtype)
    for x in range(low, high):
        for ch in range(field.shape[0]):
            for y in range(ny):
                line = field[ch, x, y]
                row[:radius] = line[0]
                row[radius : radius + nz] = line
                row[radius + nz :] = line[nz - 1]
                target = plane[y + radius]
                for z in range(nz):
                    target[z] = taps[0] * row[z]
                for t in range(1, taps.shape[0]):
                    for z in range(nz):
                        target[z] += taps[t] * row[z + t]
            for y in range(radius):
                plane[y] = plane[radius]
                plane[ny + radius + y] = plane[ny + radius - 1]
            for y in range(ny):
                target = out[ch, x, y]
                for z in range(nz):
                    target[z] = taps[0] * plane[y, z]
                for t in range(1, taps.shape[0]):
                    for z in range(nz):
                        target[z] += taps[t] * plane[y + t, z]


@machine_code
def _smooth_across(field, out, taps, low, high):  # (C, X, Y, Z) each, (2 r + 1,)
    """Convolve across planes, for a slab of X of the output."""
    nx, ny, nz = field.shape[1:]
    radius = taps.shape[0] // 2
    for ch in range(field.shape[0]):
        for x in range(low, high):
            for y in range(ny):
                target = out[ch, x, y]
                target[:] = 0.0
                for t in range(taps.shape[0]):
                    source = field[ch, min(max(x + t - radius, 0), nx - 1), y]
                    weight = taps[t]
                    for z in range(nz):
                        target[z] += weight * source[z]


@machine_code
def _vote_labels(label, u, out, low, high):  # (I, J, K) int, (3, X, Y, Z), (X, Y, Z) int
    """The label with the largest linear share around each place; 0 more than half a voxel off the grid."""
    ni, nj, nk = label.shape
    ny, nz = u.shape[2], u.shape[3]
    names = np.empty(8, label.dtype)
    shares = np.empty(8, np.float64)
    for x in range(low, high):
        for y in range(ny):
            for z in range(nz):
                p, q, r = x + u[0, x, y, z], y + u[1, x, y, z], z + u[2, x, y, z]
                if not (-0.5 <= p <= ni - 0.5 and -0.5 <= q <= nj - 0.5 and -0.5 <= r <= nk - 0.5):
                    out[x, y, z] = 0
                    continue
                i, a, si, _ = _cell(p, ni)
                j, b, sj, _ = _cell(q, nj)
                k, c, sk, _ = _cell(r, nk)
                count = 0
                for corner in range(8):
                    di, dj, dk = corner >> 2, (corner >> 1) & 1, corner & 1
                    share = (a if di else 1 - a) * (b if dj else 1 - b) * (c if dk else 1 - c)
                    value = label[i + di * si, j + dj * sj, k + dk * sk]
                    found = False
                    for m in range(count):
                        if names[m] == value:
                            shares[m] += share
                            found = True
                            break
                    if not found:
                        names[count] = value
                        shares[count] = share
                        count += 1
                best = 0
                for m in range(1, count):  # the smaller value wins a tie, as it does label by label
                    if shares[m] > shares[best] or (shares[m] == shares[best] and names[m] < names[best]):
                        best = m
                out[x, y, z] = names[best]


@machine_code
def _moments(grad, first, second, keep_first, keep_second, low, high):  # (3, X, Y, Z) x 2, (X, Y, Z)
    """Running means of a vector field and of its squared length; returns the sum of the latter."""
    ny, nz = second.shape[1], second.shape[2]
    total = 0.0
    for x in range(low, high):
        for y in range(ny):
            for z in range(nz):
                a, b, c = grad[0, x, y, z], grad[1, x, y, z], grad[2, x, y, z]
                first[0, x, y, z] = keep_first * first[0, x, y, z] + (1 - keep_first) * a
                first[1, x, y, z] = keep_first * first[1, x, y, z] + (1 - keep_first) * b
                first[2, x, y, z] = keep_first * first[2, x, y, z] + (1 - keep_first) * c
                square = keep_second * second[x, y, z] + (1 - keep_second) * (a * a + b * b + c * c)
                second[x, y, z] = square
                total += square
    return total


@machine_code
def _stride(first, second, delta, up_first, up_second, floor, low, high):  # (3, X, Y, Z), (X, Y, Z), (3, X, Y, Z)
    """First moment over the root of the second; returns the largest squared length."""
    ny, nz = second.shape[1], second.shape[2]
    longest = 0.0
    for x in range(low, high):
        for y in range(ny):
            for z in range(nz):
                scale = up_first / (np.sqrt(up_second * second[x, y, z]) + floor)
                a, b, c = scale * first[0, x, y, z], scale * first[1, x, y, z], scale * first[2, x, y, z]
                delta[0, x, y, z], delta[1, x, y, z], delta[2, x, y, z] = a, b, c
                longest = max(longest, a * a + b * b + c * c)
    return longest


sample, sample_grad_u, sample_grad_image = _sample, _sample_grad_u, _sample_grad_image
lncc_planes, lncc_finish, box_planes, lncc_gradient = _lncc_planes, _lncc_finish, _box_planes, _lncc_gradient
smooth_planes, smooth_across, vote_labels = _smooth_planes, _smooth_across, _vote_labels
moments, stride = _moments, _stride

"""Loops over places that numba compiles: distance to triangles, and to the faces between a mask's voxels and the rest.

Arrays are C-contiguous, shapes stand behind each signature. What other modules call is listed at the end.
"""

from __future__ import annotations

import math

import numpy as np

from fewscan.deliver.triangles import at, minus
from fewscan.space.compiled import machine_code  # keeps machine code beside the file where it can

MOST = 6  # voxels to search on each side


@machine_code
def _dot(u, v):
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


@machine_code
def _further(p, share, v):
    return p[0] + share * v[0], p[1] + share * v[1], p[2] + share * v[2]


@machine_code
def _squared_distance(p, a, b, c):  # four times (3,)
    """From a place to the closest place of a triangle (Ericson, Real-Time Collision Detection, 2005, section 5.1.5)."""
    ab, ac, ap = minus(b, a), minus(c, a), minus(p, a)
    d1, d2 = _dot(ab, ap), _dot(ac, ap)
    if d1 <= 0 and d2 <= 0:
        return _dot(ap, ap)
    bp = minus(p, b)
    d3, d4 = _dot(ab, bp), _dot(ac, bp)
    if d3 >= 0 and d4 <= d3:
        return _dot(bp, bp)
    cp = minus(p, c)
    d5, d6 = _dot(ab, cp), _dot(ac, cp)
    if d6 >= 0 and d5 <= d6:
        return _dot(cp, cp)
    vc, vb, va = d1 * d4 - d3 * d2, d5 * d2 - d1 * d6, d3 * d6 - d5 * d4
    if vc <= 0 and d1 >= 0 and d3 <= 0:
        rest = _further(ap, -d1 / (d1 - d3), ab)
    elif vb <= 0 and d2 >= 0 and d6 <= 0:
        rest = _further(ap, -d2 / (d2 - d6), ac)
    elif va <= 0 and d4 >= d3 and d5 >= d6:
        rest = _further(bp, -(d4 - d3) / ((d4 - d3) + (d5 - d6)), minus(c, b))
    else:
        rest = _further(_further(ap, -vb / (va + vb + vc), ab), -vc / (va + vb + vc), ac)
    return _dot(rest, rest)


@machine_code
def _nearest(corners, low, size, shape, starts, lists, places, most, out, begin, end):  # places (N, 3), out (N,)
    """Distance of places to the closest triangle, infinite beyond ``most``."""
    ny, nz = shape[1], shape[2]
    first, last = np.empty(3, np.int64), np.empty(3, np.int64)
    for n in range(begin, end):
        best, reach = math.inf, size
        p = (places[n, 0], places[n, 1], places[n, 2])
        while True:
            for d in range(3):
                first[d] = max(math.floor((places[n, d] - reach - low[d]) / size), 0)
                last[d] = min(math.floor((places[n, d] + reach - low[d]) / size), shape[d] - 1)
            for i in range(first[0], last[0] + 1):
                for j in range(first[1], last[1] + 1):
                    for k in range(first[2], last[2] + 1):
                        cube = (i * ny + j) * nz + k
                        for place in range(starts[cube], starts[cube + 1]):
                            g = lists[place]
                            a, b, c = at(corners, g, 0), at(corners, g, 1), at(corners, g, 2)
                            best = min(best, _squared_distance(p, a, b, c))
            if best <= reach * reach or reach >= most:
                break
            reach = min(2 * reach, most)
        out[n] = math.sqrt(best) if best <= most * most else math.inf


@machine_code
def _to_face(p, matrix, i, j, k, axis, a, b, c, d):  # (3,), (3, 3), voxel below the face, its axis, four scratch (3,)
    """Squared distance, mm, from a place in mm to a face between two voxels."""
    y, z = (axis + 1) % 3, (axis + 2) % 3
    for r in range(3):
        middle = matrix[r, 0] * i + matrix[r, 1] * j + matrix[r, 2] * k + 0.5 * matrix[r, axis]
        u, v = 0.5 * matrix[r, y], 0.5 * matrix[r, z]
        a[r], b[r], c[r], d[r] = middle - u - v, middle + u - v, middle + u + v, middle - u + v
    return min(_squared_distance(p, a, b, c), _squared_distance(p, a, c, d))


@machine_code
def _to_mask(mask, matrix, places, out, begin, end):  # (X, Y, Z) bool, False all around; (3, 3); (N, 3) voxels; (N,) mm
    """Distance of each place to the mask's boundary; infinite where none lies within the searched voxels."""
    nx, ny, nz = mask.shape
    p, a, b, c, d = np.empty(3), np.empty(3), np.empty(3), np.empty(3), np.empty(3)
    shortest = math.inf  # height of a voxel over its faces: how far away a face at least is for each voxel in between
    volume = abs(np.linalg.det(matrix))
    for axis in range(3):
        wall = np.cross(np.ascontiguousarray(matrix[:, axis - 1]), np.ascontiguousarray(matrix[:, axis - 2]))
        shortest = min(shortest, volume / math.sqrt(wall[0] ** 2 + wall[1] ** 2 + wall[2] ** 2))
    for n in range(begin, end):
        x, y, z = places[n]
        for r in range(3):
            p[r] = matrix[r, 0] * x + matrix[r, 1] * y + matrix[r, 2] * z
        best = math.inf
        for reach in range(1, MOST + 1):
            for i in range(max(math.floor(x) - reach, 0), min(math.floor(x) + reach, nx - 2) + 1):
                for j in range(max(math.floor(y) - reach, 0), min(math.floor(y) + reach, ny - 2) + 1):
                    for k in range(max(math.floor(z) - reach, 0), min(math.floor(z) + reach, nz - 2) + 1):
                        here = mask[i, j, k]
                        if mask[i + 1, j, k] != here:
                            best = min(best, _to_face(p, matrix, i, j, k, 0, a, b, c, d))
                        if mask[i, j + 1, k] != here:
                            best = min(best, _to_face(p, matrix, i, j, k, 1, a, b, c, d))
                        if mask[i, j, k + 1] != here:
                            best = min(best, _to_face(p, matrix, i, j, k, 2, a, b, c, d))
            if best <= ((reach - 0.5) * shortest) ** 2:
                break
        out[n] = math.sqrt(best)


to_mask = _to_mask
nearest = _nearest

"""Loops over surface nets that numba compiles: extraction, smoothing, areas and volumes, splitting where sheets touch.

A surface net (Gibson, Constrained elastic surface nets, MICCAI 1998, doi 10.1007/BFb0056277; for many labels at once
Frisken, Journal of Computer Graphics Techniques 11(1), 2022) has one vertex in each cell of 2 x 2 x 2 voxels that are
not all alike, and one quad between each two neighbouring voxels that differ. Two structures that touch share the quads
of their wall, so there is neither gap nor overlap. What is ours: how far a vertex may go (`_clamp`),
which bounds its distance to the mask, and `split`, which makes the boundary of any one label manifold.

Arrays are C-contiguous, shapes stand behind each signature; places are in voxels, whole numbers at voxel centres.
`mesh` holds what is around the loops.
"""

from __future__ import annotations

import numpy as np

from fewscan.space.compiled import machine_code  # keeps machine code beside the file where it can


@machine_code
def _face(a, b, c, d):
    """Whether four voxels around an edge of the net are not all alike."""
    return a != b or a != c or a != d


@machine_code
def _count(p):  # (X, Y, Z) uint, 0 all around
    """Numbers of vertices and of quads."""
    nx, ny, nz = p.shape
    vertices = quads = 0
    for i in range(nx - 1):
        for j in range(ny - 1):
            for k in range(nz - 1):
                v = p[i, j, k]
                x, y, z = p[i + 1, j, k] != v, p[i, j + 1, k] != v, p[i, j, k + 1] != v
                quads += int(x) + int(y) + int(z)
                if (
                    x or y or z or p[i + 1, j + 1, k] != v or p[i + 1, j, k + 1] != v or p[i, j + 1, k + 1] != v
                    or p[i + 1, j + 1, k + 1] != v
                ):  # fmt: skip
                    vertices += 1
    return vertices, quads


@machine_code
def _free(voxels):  # (8,)
    """Bits of the octants of a cell whose voxel differs from one of the three beside it there; none where three meet.

    Wherever a vertex lies in such an octant, it is at most half a voxel away from a face of the mask.
    """
    first, second = voxels[0], voxels[0]
    for o in range(8):
        if voxels[o] != first:
            if second != first and voxels[o] != second:
                return 0
            second = voxels[o]
    bits = 0
    for o in range(8):
        if voxels[o] != voxels[o ^ 1] or voxels[o] != voxels[o ^ 2] or voxels[o] != voxels[o ^ 4]:
            bits |= 1 << o
    return bits


@machine_code
def _extract(p, cells, neighbours, free, quads, sides, axes):  # (X, Y, Z), (V, 3), (V, 6), (V,), (Q, 4), (Q, 2), (Q,)
    """Fill the net of a map that is 0 all around.

    ``cells`` names the cell of each vertex by its lowest voxel; ``neighbours`` are the vertices across its six faces,
    -1 for none; ``free`` holds the bits of `_free`; the corners of a quad turn around its axis, which leads from
    ``sides[:, 0]`` to ``sides[:, 1]``.
    """
    nx, ny, nz = p.shape
    ids = np.full((2, ny - 1, nz - 1), -1, np.int32)  # of the slice before and of this one
    voxels = np.empty(8, p.dtype)
    n = m = 0
    for i in range(nx - 1):
        now, old = i % 2, 1 - i % 2
        ids[now] = -1
        for j in range(ny - 1):
            for k in range(nz - 1):
                a, b, c, d = p[i, j, k], p[i, j, k + 1], p[i, j + 1, k], p[i, j + 1, k + 1]
                e, f, g, h = p[i + 1, j, k], p[i + 1, j, k + 1], p[i + 1, j + 1, k], p[i + 1, j + 1, k + 1]
                if a == b and a == c and a == d and a == e and a == f and a == g and a == h:
                    continue
                ids[now, j, k] = n
                cells[n, 0], cells[n, 1], cells[n, 2] = i, j, k
                voxels[0], voxels[1], voxels[2], voxels[3], voxels[4] = a, b, c, d, e
                voxels[5], voxels[6], voxels[7] = f, g, h
                free[n] = _free(voxels)
                for s in range(6):
                    neighbours[n, s] = -1
                if i > 0 and _face(a, b, c, d):
                    other = ids[old, j, k]
                    neighbours[n, 0], neighbours[other, 1] = other, n
                if j > 0 and _face(a, b, e, f):
                    other = ids[now, j - 1, k]
                    neighbours[n, 2], neighbours[other, 3] = other, n
                if k > 0 and _face(a, c, e, g):
                    other = ids[now, j, k - 1]
                    neighbours[n, 4], neighbours[other, 5] = other, n
                if a != e:
                    quads[m, 0], quads[m, 1] = ids[now, j - 1, k - 1], ids[now, j, k - 1]
                    quads[m, 2], quads[m, 3] = n, ids[now, j - 1, k]
                    sides[m, 0], sides[m, 1], axes[m] = a, e, 0
                    m += 1
                if a != c:
                    quads[m, 0], quads[m, 1] = ids[old, j, k - 1], ids[old, j, k]
                    quads[m, 2], quads[m, 3] = n, ids[now, j, k - 1]
                    sides[m, 0], sides[m, 1], axes[m] = a, c, 1
                    m += 1
                if a != b:
                    quads[m, 0], quads[m, 1] = ids[old, j - 1, k], ids[now, j - 1, k]
                    quads[m, 2], quads[m, 3] = n, ids[old, j, k]
                    sides[m, 0], sides[m, 1], axes[m] = a, b, 2
                    m += 1
                n += 1


@machine_code
def _clamp(x, y, z, free, radius):
    """A displacement in the cube of half a voxel and a bit less where that keeps the vertex near, else in a ball."""
    if free >> ((x >= 0) * 4 + (y >= 0) * 2 + (z >= 0)) & 1:
        return min(max(x, -radius), radius), min(max(y, -radius), radius), min(max(z, -radius), radius)
    length = (x * x + y * y + z * z) ** 0.5
    share = radius / length if length > radius else 1.0
    return x * share, y * share, z * share


@machine_code
def _smooth(cells, neighbours, free, moved, out, share, radius, low, high):  # (V, 3), (V, 6), (V,), (V, 3), (V, 3)
    """Move vertices towards the mean of their neighbours, as far as they may go."""
    for v in range(low, high):
        x = y = z = 0.0
        n = 0
        for s in range(6):
            w = neighbours[v, s]
            if w >= 0:
                x += (cells[w, 0] - cells[v, 0]) + moved[w, 0]
                y += (cells[w, 1] - cells[v, 1]) + moved[w, 1]
                z += (cells[w, 2] - cells[v, 2]) + moved[w, 2]
                n += 1
        keep = 1.0 - share
        a = keep * moved[v, 0] + share * x / n
        b = keep * moved[v, 1] + share * y / n
        c = keep * moved[v, 2] + share * z / n
        out[v, 0], out[v, 1], out[v, 2] = _clamp(a, b, c, free[v], radius)


@machine_code
def _corner(cells, moved, v, origin):
    return (
        float(cells[v, 0] - origin[0]) + moved[v, 0],
        float(cells[v, 1] - origin[1]) + moved[v, 1],
        float(cells[v, 2] - origin[2]) + moved[v, 2],
    )


@machine_code
def _squared(p, q, scale):
    x, y, z = (p[0] - q[0]) * scale[0], (p[1] - q[1]) * scale[1], (p[2] - q[2]) * scale[2]
    return x * x + y * y + z * z


@machine_code
def _six_volumes(p, q, r):
    """Six times the signed volume between a triangle and the origin."""
    return (
        p[0] * (q[1] * r[2] - q[2] * r[1])
        + p[1] * (q[2] * r[0] - q[0] * r[2])
        + p[2] * (q[0] * r[1] - q[1] * r[0])
    )  # fmt: skip


@machine_code
def _area(p, q, r, s):
    """Area vector of a quad: half the cross product of its diagonals."""
    ax, ay, az = r[0] - p[0], r[1] - p[1], r[2] - p[2]
    bx, by, bz = s[0] - q[0], s[1] - q[1], s[2] - q[2]
    return 0.5 * (ay * bz - az * by), 0.5 * (az * bx - ax * bz), 0.5 * (ax * by - ay * bx)


@machine_code
def _measure(cells, moved, quads, sides, walls, scale, volumes, areas):  # volumes (pieces,), areas (walls,): added to
    """Volume of each piece and area of each wall between two pieces, in voxels."""
    for q in range(len(quads)):
        a = _corner(cells, moved, quads[q, 0], cells[0])
        b = _corner(cells, moved, quads[q, 1], cells[0])
        c = _corner(cells, moved, quads[q, 2], cells[0])
        d = _corner(cells, moved, quads[q, 3], cells[0])
        if _squared(a, c, scale) <= _squared(b, d, scale):
            six = _six_volumes(a, b, c) + _six_volumes(a, c, d)
        else:
            six = _six_volumes(a, b, d) + _six_volumes(b, c, d)
        volumes[sides[q, 0]] += six / 6
        volumes[sides[q, 1]] -= six / 6
        x, y, z = _area(a, b, c, d)
        areas[walls[q]] += (x * x + y * y + z * z) ** 0.5


@machine_code
def _inflate(cells, free, moved, quads, walls, pressures, push, weight, radius):  # (V, 3), (V,), (V, 3), (Q, 4), ...
    """Push each wall along its normal by its pressure, in voxels, as far as vertices may go."""
    push[:] = 0
    weight[:] = 0
    for q in range(len(quads)):
        pressure = pressures[walls[q]]
        origin = cells[quads[q, 0]]
        a = _corner(cells, moved, quads[q, 0], origin)
        b = _corner(cells, moved, quads[q, 1], origin)
        c = _corner(cells, moved, quads[q, 2], origin)
        d = _corner(cells, moved, quads[q, 3], origin)
        x, y, z = _area(a, b, c, d)
        size = (x * x + y * y + z * z) ** 0.5
        for s in range(4):
            v = quads[q, s]
            push[v, 0] += pressure * x
            push[v, 1] += pressure * y
            push[v, 2] += pressure * z
            weight[v] += size
    for v in range(len(moved)):
        if weight[v] > 0:
            x = moved[v, 0] + push[v, 0] / weight[v]
            y = moved[v, 1] + push[v, 1] / weight[v]
            z = moved[v, 2] + push[v, 2] / weight[v]
            moved[v, 0], moved[v, 1], moved[v, 2] = _clamp(x, y, z, free[v], radius)


@machine_code
def _diagonals(cells, moved, quads, scale, out):  # (Q,) bool
    """Whether the diagonal from a quad's first corner is the shorter one."""
    for q in range(len(quads)):
        origin = cells[quads[q, 0]]
        a = _corner(cells, moved, quads[q, 0], origin)
        b = _corner(cells, moved, quads[q, 1], origin)
        c = _corner(cells, moved, quads[q, 2], origin)
        d = _corner(cells, moved, quads[q, 3], origin)
        out[q] = _squared(a, c, scale) <= _squared(b, d, scale)


@machine_code
def _root(parent, i):
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@machine_code
def _join(parent, a, b):
    a, b = _root(parent, a), _root(parent, b)
    if a < b:
        parent[b] = a
    else:
        parent[a] = b


@machine_code
def _split(quads, axes, inside, n):  # (Q, 4) of vertices 0..n-1, (Q,), (Q,) voxel of the label behind each quad
    """A number for each corner of each quad, the same where quads belong to one sheet.

    Where two voxels of a label touch by an edge only, four quads meet there; those of one voxel are taken for one
    sheet. Quads around a vertex that no chain of such edges links get corners of their own, so that the surface is
    manifold. Returns (Q, 4) corner numbers from 0, for each number the vertex it comes from, and what `_twice` finds.
    """
    count = len(quads)
    met = np.full((3 * n, 4), -1, np.int32)  # the quads at each edge, named by its lower vertex and its direction
    parent = np.arange(4 * count, dtype=np.int32)
    for q in range(count):
        for s in range(4):
            direction = (axes[q] + 1 + s % 2) % 3
            edge = 3 * (quads[q, s] if s < 2 else quads[q, (s + 1) % 4]) + direction
            slot = 0
            while met[edge, slot] >= 0:
                slot += 1
            met[edge, slot] = 4 * q + s
    for edge in range(3 * n):
        if met[edge, 0] < 0:
            continue
        four = met[edge, 2] >= 0
        for one in range(4):
            for two in range(one + 1, 4):
                if met[edge, two] < 0:
                    continue
                q, s, r, t = met[edge, one] // 4, met[edge, one] % 4, met[edge, two] // 4, met[edge, two] % 4
                if four and inside[q] != inside[r]:
                    continue
                for s_end in (s, (s + 1) % 4):
                    for t_end in (t, (t + 1) % 4):
                        if quads[q, s_end] == quads[r, t_end]:
                            _join(parent, 4 * q + s_end, 4 * r + t_end)
    numbers = np.full(4 * count, -1, np.int32)
    corners = np.empty((count, 4), np.int32)
    origin = np.empty(4 * count, np.int32)
    found = 0
    for c in range(4 * count):
        root = _root(parent, c)
        if numbers[root] < 0:
            numbers[root] = found
            origin[found] = quads[c // 4, c % 4]
            found += 1
        corners[c // 4, c % 4] = numbers[root]
    return corners, origin[:found].copy(), _twice(quads, inside, corners, met)


@machine_code
def _twice(quads, inside, corners, met):  # (Q, 4), (Q,), (Q, 4), (edges, 4)
    """Sides of quads, four a row, of which two each lie on one edge with both ends in common; pairs are neighbours."""
    number = 0
    for turn in range(2):
        if turn == 1:
            rows = np.empty((number, 4), np.int32)
            number = 0
        for edge in range(len(met)):
            if met[edge, 3] < 0:
                continue
            low = np.empty(4, np.int32)
            high = np.empty(4, np.int32)
            for slot in range(4):
                q, s = met[edge, slot] // 4, met[edge, slot] % 4
                t = (s + 1) % 4
                low[slot] = corners[q, s] if quads[q, s] == edge // 3 else corners[q, t]
                high[slot] = corners[q, t] if quads[q, s] == edge // 3 else corners[q, s]
            if (low != low[0]).any() or (high != high[0]).any():
                continue
            if turn == 1:
                place = 2
                rows[number, 0] = met[edge, 0]
                for slot in range(1, 4):
                    if inside[met[edge, slot] // 4] == inside[met[edge, 0] // 4]:
                        rows[number, 1] = met[edge, slot]
                    else:
                        rows[number, place] = met[edge, slot]
                        place += 1
            number += 1
    return rows


count = _count
extract = _extract
smooth = _smooth
measure = _measure
inflate = _inflate
diagonals = _diagonals
split = _split

"""Loops over triangles that numba compiles: a grid to find them in, crossings, rays, insides, pictures.

A triangle is found through a grid of cubes that lists, for each cube, the triangles whose bounding box reaches it.
Arrays are C-contiguous, places are float64 mm, shapes stand behind each signature. What other modules call is listed
at the end.
"""

from __future__ import annotations

import math

import numpy as np

from fewscan.space.compiled import machine_code  # keeps machine code beside the file where it can

DARKEST = 0.25  # share of the colour that faces seen edge-on keep in pictures
FLAT = 1e-9  # share of the cube of an edge, below which four places count as coplanar


@machine_code
def _cube(place, low, size, length):
    return min(max(int((place - low) / size), 0), length - 1)


@machine_code
def _fill_grid(boxes, low, size, shape):  # (F, 6) lowest and highest place, (3,), float, (3,) int
    """First and last cube that each box reaches, where the list of each cube begins, and the lists in one."""
    nx, ny, nz = shape
    spans = np.empty((len(boxes), 6), np.int32)
    starts = np.zeros(nx * ny * nz + 1, np.int64)
    for f in range(len(boxes)):
        for d in range(3):
            spans[f, d] = _cube(boxes[f, d], low[d], size, shape[d])
            spans[f, 3 + d] = _cube(boxes[f, 3 + d], low[d], size, shape[d])
        for i in range(spans[f, 0], spans[f, 3] + 1):
            for j in range(spans[f, 1], spans[f, 4] + 1):
                for k in range(spans[f, 2], spans[f, 5] + 1):
                    starts[(i * ny + j) * nz + k + 1] += 1
    for c in range(nx * ny * nz):
        starts[c + 1] += starts[c]
    lists = np.empty(starts[-1], np.int32)
    free = starts[:-1].copy()
    for f in range(len(boxes)):
        for i in range(spans[f, 0], spans[f, 3] + 1):
            for j in range(spans[f, 1], spans[f, 4] + 1):
                for k in range(spans[f, 2], spans[f, 5] + 1):
                    cube = (i * ny + j) * nz + k
                    lists[free[cube]] = f
                    free[cube] += 1
    return spans, starts, lists


@machine_code
def _at(corners, f, i):
    return corners[f, i, 0], corners[f, i, 1], corners[f, i, 2]


@machine_code
def _minus(u, v):
    return u[0] - v[0], u[1] - v[1], u[2] - v[2]


@machine_code
def _orient(a, b, c, p):
    """Six times the signed volume of a tetrahedron; positive where p lies on the side of the normal of a, b, c."""
    ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    wx, wy, wz = p[0] - a[0], p[1] - a[1], p[2] - a[2]
    return (uy * vz - uz * vy) * wx + (uz * vx - ux * vz) * wy + (ux * vy - uy * vx) * wz


@machine_code
def _turn(a, b, c, x, y):
    return (b[x] - a[x]) * (c[y] - a[y]) - (b[y] - a[y]) * (c[x] - a[x])


@machine_code
def _within(p, a, b, c, x, y, tiny):
    """Whether a place lies inside a triangle, seen along one axis, and not on its edges."""
    d, e, f = _turn(a, b, p, x, y), _turn(b, c, p, x, y), _turn(c, a, p, x, y)
    return (d > tiny and e > tiny and f > tiny) or (d < -tiny and e < -tiny and f < -tiny)


@machine_code
def _flat_overlap(s, t, tiny):  # three places each
    """Whether two coplanar triangles overlap by more than edges or corners."""
    ux, uy, uz = _minus(s[1], s[0])
    vx, vy, vz = _minus(s[2], s[0])
    nx, ny, nz = abs(uy * vz - uz * vy), abs(uz * vx - ux * vz), abs(ux * vy - uy * vx)
    if nx >= ny and nx >= nz:
        x, y = 1, 2
    elif ny >= nz:
        x, y = 2, 0
    else:
        x, y = 0, 1
    for i in range(3):
        a, b = s[i], s[(i + 1) % 3]
        for j in range(3):
            c, d = t[j], t[(j + 1) % 3]
            e, f = _turn(a, b, c, x, y), _turn(a, b, d, x, y)
            g, h = _turn(c, d, a, x, y), _turn(c, d, b, x, y)
            across = (e > tiny and f < -tiny) or (e < -tiny and f > tiny)
            if across and ((g > tiny and h < -tiny) or (g < -tiny and h > tiny)):
                return True
        if _within(s[i], t[0], t[1], t[2], x, y, tiny) or _within(t[i], s[0], s[1], s[2], x, y, tiny):
            return True
    middle = (  # of a triangle that has its corners on the edges of the other
        (s[0][0] + s[1][0] + s[2][0]) / 3, (s[0][1] + s[1][1] + s[2][1]) / 3, (s[0][2] + s[1][2] + s[2][2]) / 3,
    )  # fmt: skip
    return _within(middle, t[0], t[1], t[2], x, y, tiny)


@machine_code
def _sides(t, s, tiny):
    """How many corners of ``s`` lie above and below the plane of ``t``."""
    above = below = 0
    for i in range(3):
        d = _orient(t[0], t[1], t[2], s[i])
        if d > tiny:
            above += 1
        elif d < -tiny:
            below += 1
    return above, below


@machine_code
def _pierces(p, q, t, tiny):
    """Whether a segment meets a triangle, its edges included, and does not lie in its plane."""
    d, e = _orient(t[0], t[1], t[2], p), _orient(t[0], t[1], t[2], q)
    if (d > tiny and e > tiny) or (d < -tiny and e < -tiny) or (abs(d) <= tiny and abs(e) <= tiny):
        return False
    f, g, h = _orient(p, q, t[0], t[1]), _orient(p, q, t[1], t[2]), _orient(p, q, t[2], t[0])
    return (f >= -tiny and g >= -tiny and h >= -tiny) or (f <= tiny and g <= tiny and h <= tiny)


@machine_code
def _cross(s, t, shared_s, shared_t):  # three places each, and in which bits they share a corner
    """Whether two triangles meet elsewhere than at the corners they share."""
    if shared_s == 7:
        return True
    edge = 0.0
    for i in range(3):
        for d in range(3):
            edge = max(edge, abs(s[i][d] - s[0][d]), abs(t[i][d] - t[0][d]))
    tiny = FLAT * edge**3
    above, below = _sides(t, s, tiny)
    if above == 0 and below == 0:
        return _flat_overlap(s, t, FLAT * edge**2)
    shared = (shared_s & 1) + (shared_s >> 1 & 1) + (shared_s >> 2 & 1)
    if shared == 2 or above == 3 - shared or below == 3 - shared:
        return False
    above, below = _sides(s, t, tiny)
    if above == 3 - shared or below == 3 - shared:
        return False
    for i in range(3):
        j = (i + 1) % 3
        ends = 1 << i | 1 << j
        if not shared_s & ends and _pierces(s[i], s[j], t, tiny):
            return True
        if not shared_t & ends and _pierces(t[i], t[j], s, tiny):
            return True
    return False


@machine_code
def _apart(boxes, f, g):
    across = boxes[f, 0] > boxes[g, 3] or boxes[g, 0] > boxes[f, 3]
    along = boxes[f, 1] > boxes[g, 4] or boxes[g, 1] > boxes[f, 4]
    return across or along or boxes[f, 2] > boxes[g, 5] or boxes[g, 2] > boxes[f, 5]


@machine_code
def _shared(faces, f, g):
    """Bits of the corners that two faces share, in each."""
    in_f = in_g = 0
    for i in range(3):
        for j in range(3):
            if faces[f, i] == faces[g, j]:
                in_f |= 1 << i
                in_g |= 1 << j
    return in_f, in_g


@machine_code
def _crossings(corners, faces, boxes, low, size, shape, spans, starts, lists, found):  # found (F,) bool, set
    """Mark the triangles that cross another one; number of pairs.

    Möller's test in the form of edges against triangles (doi 10.1080/10867651.1997.10487472), with a test of its own
    for two in one plane. A pair is looked at in the first cube that both reach.
    """
    ny, nz = shape[1], shape[2]
    pairs = 0
    for f in range(len(faces)):
        s = (_at(corners, f, 0), _at(corners, f, 1), _at(corners, f, 2))
        for i in range(spans[f, 0], spans[f, 3] + 1):
            for j in range(spans[f, 1], spans[f, 4] + 1):
                for k in range(spans[f, 2], spans[f, 5] + 1):
                    cube = (i * ny + j) * nz + k
                    for place in range(starts[cube], starts[cube + 1]):
                        g = lists[place]
                        if g <= f or _apart(boxes, f, g):
                            continue
                        if (
                            max(spans[f, 0], spans[g, 0]) != i or max(spans[f, 1], spans[g, 1]) != j
                            or max(spans[f, 2], spans[g, 2]) != k
                        ):  # fmt: skip
                            continue
                        t = (_at(corners, g, 0), _at(corners, g, 1), _at(corners, g, 2))
                        shared_f, shared_g = _shared(faces, f, g)
                        if _cross(s, t, shared_f, shared_g):
                            found[f] = found[g] = True
                            pairs += 1
    return pairs


@machine_code
def _hit(origin, way, a, b, c):
    """Distance along a ray to a triangle, infinite where it passes by (Möller and Trumbore 1997)."""
    ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    px, py, pz = way[1] * vz - way[2] * vy, way[2] * vx - way[0] * vz, way[0] * vy - way[1] * vx
    det = ux * px + uy * py + uz * pz
    if det == 0.0:
        return math.inf
    tx, ty, tz = origin[0] - a[0], origin[1] - a[1], origin[2] - a[2]
    u = (tx * px + ty * py + tz * pz) / det
    qx, qy, qz = ty * uz - tz * uy, tz * ux - tx * uz, tx * uy - ty * ux
    v = (way[0] * qx + way[1] * qy + way[2] * qz) / det
    if u < 0.0 or v < 0.0 or u + v > 1.0:
        return math.inf
    return (vx * qx + vy * qy + vz * qz) / det


@machine_code
def _rays(corners, normals, low, size, shape, starts, lists, chosen, sign, most, out):  # chosen (N,), out (N,)
    """Distance from the middle of each chosen triangle, along its normal times ``sign``, to the first one hit.

    Infinite where nothing is hit within ``most``, or where the first one hit does not face it to within 60 degrees: a
    corner is no wall.
    """
    _nx, ny, nz = shape
    cube, step = np.empty(3, np.int64), np.empty(3, np.int64)
    following, between = np.empty(3), np.empty(3)
    for index in range(len(chosen)):
        f = chosen[index]
        way = sign * normals[f]
        middle = (corners[f, 0] + corners[f, 1] + corners[f, 2]) / 3
        for d in range(3):
            cube[d] = _cube(middle[d], low[d], size, shape[d])
            step[d] = 1 if way[d] > 0 else -1
            edge = low[d] + (cube[d] + (1 if way[d] > 0 else 0)) * size
            following[d] = (edge - middle[d]) / way[d] if way[d] != 0.0 else math.inf
            between[d] = size / abs(way[d]) if way[d] != 0.0 else math.inf
        best, other, gone = math.inf, -1, 0.0
        while gone <= min(most, best):
            here = (cube[0] * ny + cube[1]) * nz + cube[2]
            for place in range(starts[here], starts[here + 1]):
                g = lists[place]
                found = _hit(middle, way, _at(corners, g, 0), _at(corners, g, 1), _at(corners, g, 2))
                if g != f and 0.0 < found < best:
                    best, other = found, g
            d = int(np.argmin(following))
            gone = following[d]
            cube[d] += step[d]
            following[d] += between[d]
            if cube[d] < 0 or cube[d] >= shape[d]:
                break
        out[index] = math.inf
        if other >= 0 and best <= most:
            facing = 0.0
            for d in range(3):
                facing += normals[f, d] * normals[other, d]
            if facing <= -0.5:
                out[index] = best


@machine_code
def _inside(corners, low, step, out):  # (F, 3, 3), (3,), float, (X, Y, Z) bool, False: set
    """Mark the places of a grid that a closed surface encloses, by the parity of crossings along its last axis.

    A corner on a line of the grid would count twice or not at all, so lines run a little beside the places.
    """
    nx, ny, nz = out.shape
    for f in range(len(corners)):
        a, b, c = _at(corners, f, 0), _at(corners, f, 1), _at(corners, f, 2)
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if area == 0.0:
            continue
        first = max(int((min(a[0], b[0], c[0]) - low[0]) / step), 0)
        last = min(int((max(a[0], b[0], c[0]) - low[0]) / step) + 1, nx - 1)
        for i in range(first, last + 1):
            x = low[0] + (i + 1.3e-5) * step
            for j in range(
                max(int((min(a[1], b[1], c[1]) - low[1]) / step), 0),
                min(int((max(a[1], b[1], c[1]) - low[1]) / step) + 1, ny - 1) + 1,
            ):
                y = low[1] + (j + 2.7e-5) * step
                u = ((b[0] - x) * (c[1] - y) - (b[1] - y) * (c[0] - x)) / area
                v = ((c[0] - x) * (a[1] - y) - (c[1] - y) * (a[0] - x)) / area
                if u < 0.0 or v < 0.0 or u + v > 1.0:
                    continue
                height = u * a[2] + v * b[2] + (1.0 - u - v) * c[2]
                begin = max(math.ceil((height - low[2]) / step), 0)
                for k in range(begin, nz):
                    out[i, j, k] = not out[i, j, k]


@machine_code
def _draw(corners, light, colours, depth, image):  # (F, 3, 3) right, down, near; (F, 3); (F, 3); (H, W); (H, W, 3)
    """Fill triangles into a picture, what is nearer over what is further away."""
    height, width = depth.shape
    for f in range(len(corners)):
        ax, ay, bx, by = corners[f, 0, 0], corners[f, 0, 1], corners[f, 1, 0], corners[f, 1, 1]
        cx, cy = corners[f, 2, 0], corners[f, 2, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0.0:
            continue
        for y in range(max(int(min(ay, by, cy)), 0), min(int(max(ay, by, cy)) + 1, height - 1) + 1):
            for x in range(max(int(min(ax, bx, cx)), 0), min(int(max(ax, bx, cx)) + 1, width - 1) + 1):
                u = ((bx - x) * (cy - y) - (by - y) * (cx - x)) / area
                v = ((cx - x) * (ay - y) - (cy - y) * (ax - x)) / area
                w = 1.0 - u - v
                if u < 0.0 or v < 0.0 or w < 0.0:
                    continue
                near = u * corners[f, 0, 2] + v * corners[f, 1, 2] + w * corners[f, 2, 2]
                if near <= depth[y, x]:
                    continue
                depth[y, x] = near
                lit = max(u * light[f, 0] + v * light[f, 1] + w * light[f, 2], 0.0)
                for d in range(3):
                    image[y, x, d] = np.uint8(colours[f, d] * (DARKEST + (1.0 - DARKEST) * lit))


fill_grid = _fill_grid
crossings = _crossings
rays = _rays
inside = _inside
draw = _draw
minus, at = _minus, _at

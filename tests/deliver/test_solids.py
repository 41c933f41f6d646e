"""Hollows, cuts, struts, tags and fewer faces leave sound parts of the size they promise."""

import numpy as np
import pytest
from shapes import ball, box
from test_mesh import sound

from fewscan.deliver import solids
from fewscan.deliver.mesh import surfaces
from fewscan.deliver.printable import as_written, repaired, walls
from fewscan.deliver.solids import Additions
from fewscan.deliver.surface import Mesh, shells, together
from fewscan.errors import ConfigError, DataError, ResourceError


def test_a_hollow_box_keeps_its_wall():
    hollow = solids.hollowed(box((20, 20, 20)), wall_mm=3.0)
    assert sound(hollow)
    assert len(shells(hollow)) == 2
    assert 3.0 <= walls(hollow, limit_mm=3)["smallest_mm"] < 5.1
    drained = solids.hollowed(box((20, 20, 20)), wall_mm=3.0, drain_mm=4.0)
    assert sound(repaired(as_written(drained))[0])  # rounded to 32 bits, slivers at the hole's rim may fold over
    assert len(shells(drained)) == 1
    assert drained.volume_mm3 < hollow.volume_mm3
    thin = box((20, 20, 4))
    assert solids.hollowed(thin, wall_mm=3.0) is thin
    with pytest.raises(ResourceError, match=r"too thin for a part of this size; ask for \d"):
        solids.hollowed(box((300, 300, 300)), wall_mm=0.5)


def test_cuts_give_two_closed_halves_or_leave_the_part_alone():
    halves = solids.cut_at(box(), "S=4")
    assert [sound(half) for half in halves] == [True, True]
    assert sorted(round(half.volume_mm3) for half in halves) == [400, 600]
    assert len(solids.cut_at(box(), "A=40")) == 1
    with pytest.raises(ConfigError, match="a cut must look like"):
        Additions(cuts=("S:4",))


def test_struts_join_loose_pieces():
    loose = together([box(), box(at=(15, 0, 0)), box(at=(0, 0, 30))])
    joined, count = solids.with_struts(loose, diameter_mm=2.0)
    assert (count, len(shells(joined))) == (2, 1)
    assert sound(joined)
    assert joined.volume_mm3 > loose.volume_mm3
    assert solids.with_struts(box(), diameter_mm=2.0)[1] == 0


def test_a_tag_hangs_below_and_needs_text():
    tagged = solids.tagged(box(), "A7")
    assert sound(tagged)
    assert len(shells(tagged)) == 1
    assert tagged.points[:, 2].min() < -2
    with pytest.raises(ConfigError, match="nothing to print"):
        solids.tagged(box(), "  ")


def test_fewer_faces_stay_closed_and_say_how_far_they_moved():
    mesh = surfaces(ball())[0].mesh
    (fewer,), moved = solids.simplified([mesh], faces=1000)
    assert sound(fewer)
    assert len(fewer.faces) <= 1000 < len(mesh.faces)
    assert 0 < moved < 0.5
    assert fewer.volume_mm3 == pytest.approx(mesh.volume_mm3, rel=0.03)
    (same,), none = solids.simplified([mesh], faces=10**6)
    assert (same is mesh, none) == (True, 0.0)


def test_additions_say_what_was_done_and_refuse_nonsense():
    pieces, done = solids.add(box((20, 20, 20)), Additions(hollow_mm=3.0, cuts=("R=10",)))
    assert len(pieces) == 2
    assert [word in " ".join(done) for word in ("hollow behind a wall of 3 mm", "cut at R=10 mm")] == [True, True]
    with pytest.raises(ConfigError, match="needs a hollow part"):
        Additions(drain_mm=2.0)
    with pytest.raises(ConfigError, match="strut_mm must be 0 or more"):
        Additions(strut_mm=-1.0)
    open_box = Mesh(box().points, np.ascontiguousarray(box().faces[1:]))
    with pytest.raises(DataError, match="cannot be made solid"):
        solids.solid(open_box)

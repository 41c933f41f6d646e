"""What a lesion may do to its surroundings."""

import numpy as np
import pytest

from fewscan.judge import lesions


def test_a_ball_of_tumour_pushes_as_an_incompressible_medium_says():
    r = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(-30.0, 31.0)] * 3, indexing="ij")), axis=0)
    pushed = lesions.mass_effect_mm(r <= 10, (1.0, 1.0, 1.0))
    assert pushed[r <= 10].max() == 0
    for distance in (12, 20, 28):
        want = distance - np.cbrt(distance**3 - 10**3)
        assert pushed[30 + distance, 30, 30] == pytest.approx(want, rel=0.08)
    volume = 2**3 * lesions.mass_effect_mm(r <= 10, (2.0, 2.0, 2.0))[50, 30, 30] / pushed[50, 30, 30]
    assert volume == pytest.approx(2**4, rel=1e-3), "all lengths double, so does the push"


def test_each_piece_pushes_what_is_nearest_to_it():
    lesion = np.zeros((40, 9, 9), bool)
    lesion[4, 4, 4] = lesion[30:35, 2:7, 2:7] = True
    pushed = lesions.mass_effect_mm(lesion, (1.0, 1.0, 1.0))
    assert pushed[28, 4, 4] > 5 * pushed[6, 4, 4] > 0
    assert not lesions.mass_effect_mm(lesion & False, (1.0, 1.0, 1.0)).any()

"""A step of an 8B's shape, four layers of it: live bytes beside the plan, waits, copies, kernels."""

import pytest

from imitated_card.runs import step_of_shape

def test_x(tmp_path):
    s = step_of_shape(tmp_path)
    print(s.peak/2**30, s.planned_peak/2**30, s.planned, s.scoring/2**30, s.planned_scoring/2**30, s.counts)
    for k,v in s.places.most_common(20): print(v,k)

"""PerContrast's arithmetic against plain Python and NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perce_lite.training import loss
from perce_lite.training.loss import Weighting

quick = settings(max_examples=80, deadline=None, derandomize=True)
nats = st.floats(-60, 60, width=32)
clips = st.tuples(st.floats(0, 3, width=32), st.floats(0, 6, width=32)).map(lambda two: (min(two), max(two)))
positive_clips = st.tuples(st.floats(0.0625, 2, width=32), st.floats(0, 6, width=32)).map(
    lambda drawn: (drawn[0], float(np.float32(drawn[0] + drawn[1])))
)


def clipped(values, low, high):
    return [min(max(value, low), high) for value in values]


def test_known_answers():
    factual = torch.tensor([[-1.0, -2.0, -0.5, -9.0]])
    counterfactual = torch.tensor([[-1.5, -1.0, -4.0, -9.0]])
    pir = loss.pir(factual, counterfactual)
    assert pir.tolist() == [[0.5, -1.0, 3.5, 0.0]]
    assert Weighting("clip", 0.25, 3.0).weights(pir).tolist() == [[0.5, 0.25, 3.0, 0.25]]
    assert Weighting("clip", 0.25, 3.0, scale=2.0).weights(pir).tolist() == [[1.0, 0.5, 6.0, 0.5]]
    assert loss.mean_weight([pir[0, :1], pir[0, 1:]], Weighting("clip", 0.25, 3.0)) == 1.0
    figures = loss.weight_statistics(pir[0], Weighting("clip", 0.25, 3.0))
    assert figures == pytest.approx(
        {
            "pir_mean": 0.75,
            "pir_p10": -0.7,
            "pir_p50": 0.25,
            "pir_p90": 2.6,
            "weight_mean": 1.0,
            "share_at_min": 0.5,
            "share_above_min": 0.5,
            "share_at_max": 0.25,
            "effective_tokens": 16 / (4 * 9.375),
        }
    )


@quick
@given(st.lists(st.tuples(nats, nats), min_size=1, max_size=30))
def test_pir_is_the_difference_in_float32(drawn):
    factual, counterfactual = (torch.tensor(column) for column in zip(*drawn, strict=True))
    pir = loss.pir(factual, counterfactual)
    expected = np.array([one for one, _ in drawn]) - np.array([other for _, other in drawn])
    assert pir.dtype == torch.float32
    np.testing.assert_allclose(pir.numpy(), expected, rtol=2**-23, atol=0)
    assert loss.pir(factual[None], counterfactual[None]).shape == (1, len(drawn))


@quick
@given(st.lists(nats, min_size=1, max_size=30), clips, st.floats(0.125, 8, width=32))
def test_weights_are_clipped_and_scaled(values, clip, scale):
    weights = Weighting("clip", *clip, scale=scale).weights(torch.tensor(values))
    expected = [weight * scale for weight in clipped(values, *clip)]
    np.testing.assert_allclose(weights.numpy(), expected, rtol=2**-22, atol=1e-40)
    assert weights.min() >= clip[0] * scale * (1 - 2**-22) - 1e-40
    assert weights.max() <= clip[1] * scale * (1 + 2**-22) + 1e-40


@quick
@given(st.lists(st.lists(nats, max_size=12), max_size=8), clips)
def test_mean_weight_is_over_tokens_not_over_rows(rows, clip):
    flat = [weight for row in rows for weight in clipped(row, *clip)]
    expected = math.fsum(flat) / len(flat) if flat else 0.0
    mean = loss.mean_weight([torch.tensor(row) for row in rows], Weighting("clip", *clip))
    assert mean == pytest.approx(expected, rel=1e-12, abs=1e-300)
    if flat and expected > 1e-3:  # normalised, the mean is 1
        scaled = [Weighting("clip", *clip, scale=1 / mean).weights(torch.tensor(row).double()) for row in rows]
        assert float(torch.cat(scaled).mean()) == pytest.approx(1, rel=1e-12)


@quick
@given(st.lists(nats, min_size=1, max_size=60), positive_clips, st.booleans())
def test_health(values, clip, twice_at_the_clip):
    low, high = clip
    values = values + ([low, high] if twice_at_the_clip else [])
    plain, weight = np.array(values), np.array(clipped(values, low, high))
    expected = {
        "pir_mean": math.fsum(values) / len(values),
        "pir_p10": np.quantile(plain, 0.1),
        "pir_p50": np.quantile(plain, 0.5),
        "pir_p90": np.quantile(plain, 0.9),
        "weight_mean": math.fsum(weight) / len(values),
        "share_at_min": sum(value <= low for value in values) / len(values),
        "share_above_min": sum(value > low for value in values) / len(values),
        "share_at_max": sum(value >= high for value in values) / len(values),
        "effective_tokens": math.fsum(weight) ** 2 / (len(values) * math.fsum(weight**2)),
    }
    figures = loss.weight_statistics(torch.tensor(values), Weighting("clip", low, high))
    assert figures == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert all(type(value) is float for value in figures.values())


def test_health_of_nothing_is_nothing():
    assert loss.weight_statistics(torch.zeros(0), Weighting("clip", 0.1, 3.0)) == {}


@pytest.mark.parametrize("clip_min", [1e-3, 0.8])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_equal_weights_are_all_effective(count, clip_min):
    for value in (-5.0, 0.9, 50.0):
        figures = loss.weight_statistics(torch.full((count,), value), Weighting("clip", clip_min, 5.0))
        assert figures["effective_tokens"] == pytest.approx(1)
    one_of_all = torch.tensor([100.0] + [-1.0] * (count - 1))
    figures = loss.weight_statistics(one_of_all, Weighting("clip", 0.0, 5.0))
    assert figures["effective_tokens"] == pytest.approx(1 / count)


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 10_000), st.integers(0, 10_000))
def test_permutation_stays_inside_responses_and_repeats(responses, seed, row):
    state = torch.get_rng_state()
    order = loss.permutation(responses, seed, row)
    assert torch.equal(torch.get_rng_state(), state)
    assert order.shape == (sum(responses),)
    start = 0
    for length in responses:
        assert sorted(order[start : start + length].tolist()) == list(range(start, start + length))
        start += length
    torch.rand(3)  # nor does it depend on the state
    assert torch.equal(loss.permutation(responses, seed, row), order)


def test_permutation_changes_with_seed_and_row_and_moves_something():
    orders = {tuple(loss.permutation([20], seed, row).tolist()) for seed in range(8) for row in range(8)}
    assert len(orders) == 64
    assert tuple(range(20)) not in orders
    both = loss.permutation([12, 12], 0, 0)
    assert (both[:12] != both[12:] - 12).any()  # each response is shuffled in a way of its own


def test_gradients_go_through_the_log_probs_and_not_through_the_weights():
    factual = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    pir = loss.pir(factual, torch.tensor([-2.0, -1.0, -5.0]))
    weights = Weighting("clip", 0.5, 1.5).weights(pir)
    assert not pir.requires_grad
    assert not weights.requires_grad
    (weights * factual).sum().backward()
    assert factual.grad.tolist() == [1.0, 0.5, 1.5]  # the weights themselves, nothing more


def test_pir_is_detached_from_the_counterfactual():
    assert not loss.pir(torch.tensor([-1.0]), torch.tensor([-2.0], requires_grad=True)).requires_grad


def test_equal_small_weights_are_all_effective():
    figures = loss.weight_statistics(torch.full((4,), -1.0), Weighting("clip", 1e-8, 5.0))
    assert figures["effective_tokens"] == pytest.approx(1)


@quick
@given(st.lists(nats, min_size=1, max_size=30), st.floats(0, 6, width=32), st.floats(0.125, 4, width=32))
def test_additive_weights_are_never_below_plain_sfts(values, clip_max, strength):
    weighting = Weighting("additive", 0.8, clip_max, strength, scale=2.0)
    weights = weighting.weights(torch.tensor(values, dtype=torch.float64))
    expected = [2 * (1 + strength * min(max(value, 0.0), clip_max)) for value in values]
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
    assert weights.min() >= 2
    assert weighting.bounds == pytest.approx((2, 2 * (1 + strength * clip_max)))
    figures = loss.weight_statistics(torch.tensor(values, dtype=torch.float64), weighting)
    assert figures["weight_mean"] == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert figures["share_at_min"] == pytest.approx(sum(value <= 0 for value in values) / len(values))


def test_a_weighting_says_its_formula():
    assert Weighting("clip", 0.8, 5.0).formula == "clip(PIR, 0.8, 5)"
    assert Weighting("additive", 0.8, 5.0).formula == "1 + 0.5 x clip(PIR, 0, 5)"

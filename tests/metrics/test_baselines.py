"""Baselines are densities, follow their data, and leave out what they must."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points, fixation_counts
from mlnet_utils.data.photos import NOBODY, Photo
from mlnet_utils.metrics import baselines

H, W = 30, 40


def photo(stem, height=H, width=W, observers=4, each=6, centre=(0.5, 0.5), spread=0.15):
    """A photo whose fixations are normal around a centre, in shares of its sides."""
    generator = np.random.default_rng([*stem.encode()])
    points = generator.normal(centre, spread, (observers * each, 2)).clip(0, 0.999)
    points = (points * (width, height) - 0.5).astype(np.float32)
    who = np.repeat(np.arange(observers, dtype=np.int16), each)
    return Photo(stem, f"{stem}.jpg", width, height, "train", points, who)


def photos(count=12, **options):
    return [photo(f"p{k}", **options) for k in range(count)]


def counts_of(points):
    return fixation_counts(points, H, W)


def assert_density(density, size=(H, W)):
    assert (density.shape, density.dtype) == (size, torch.float64)
    assert density.min() >= 0
    assert density.sum().item() == pytest.approx(1, abs=1e-12)


# ---- centre bias -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(H, W), (77, 33), (1, 1)])
def test_centre_bias_is_a_density_at_any_size(size):
    fitted = baselines.CentreBias.fit(photos())
    assert_density(fitted(*size), size)
    assert "fixations" in fitted.description
    assert torch.equal(fitted(*size), fitted(*size))


def test_kernel_centre_bias_finds_a_shape_that_is_no_gaussian():
    two = [photo(f"{x}{k}", centre=(x, 0.5), spread=0.05) for x in (0.2, 0.8) for k in range(40)]
    left, middle, right = baselines.CentreBias.fit(two)(100, 100)[50, [20, 50, 80]].tolist()
    assert left == pytest.approx(right, rel=0.2)
    assert middle < 0.1 * left


def test_centre_biases_need_fixations_and_are_positive_everywhere():
    fitted = baselines.CentreBias.fit(photos(10, centre=(0.1, 0.1), spread=0.01))
    assert fitted(H, W).min().item() >= fitted.uniform_share / (H * W) > 0
    with pytest.raises(ValueError, match="at least two training photos"):
        baselines.CentreBias.fit(photos(3, each=0))


# ---- other photos ------------------------------------------------------------------------------
def test_leave_one_out_counts_all_the_others():
    split = [*photos(4), photo("empty", each=0)]
    others = baselines.LeaveOneOut(split)
    for one in split:
        counts = [counts_of(p.fixations) for p in split if p is not one]
        assert torch.equal(others(one), sum(counts).int())
        assert torch.equal(others.photo_counts(one), sum(c.clamp(max=1) for c in counts).int())


def test_leave_one_out_scales_between_sizes():
    small, large = photo("a", height=10, width=20), photo("b", height=30, width=80)
    others, expected = baselines.LeaveOneOut([small, large]), np.zeros((10, 20), np.int32)
    x, y = np.floor(large.fixations + 0.5).astype(int).T
    np.add.at(expected, (y * 10 // 30, x * 20 // 80), 1)
    assert np.array_equal(others(small), expected)
    assert others(large).sum() == len(small.fixations)
    assert others(large).shape == (30, 80)


def test_leave_one_out_refuses_strangers():
    split = photos(2)
    with pytest.raises(ValueError, match="different stems"):
        baselines.LeaveOneOut([*split, split[0]])
    with pytest.raises(ValueError, match="photo x is not one of the 2 photos"):
        baselines.LeaveOneOut(split)(photo("x"))


# ---- observers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0, 0.25])
def test_inter_observer_leaves_exactly_one_observer_out(share):
    one, prior = photo("a"), baselines.CentreBias.fit(photos())(H, W)
    found = list(baselines.inter_observer(one, 2.0, *((prior, share) if share else ())))
    assert [observer for observer, _, _ in found] == [0, 1, 2, 3]
    for observer, density, own in found:
        assert_density(density)
        others = density_from_points(one.fixations[one.observers != observer], H, W, 2.0)
        assert torch.equal(density, (1 - share) * others + share * prior)
        assert np.array_equal(own, one.fixations[one.observers == observer])


def test_gold_standard_chooses_by_the_likelihood_of_left_out_observers():
    split, uniform = photos(3), baselines.uniform(H, W)

    def likelihood(shares):
        total = 0.0
        for one in split:
            for _, density, own in baselines.inter_observer(one, shares[0] * W, uniform, shares[1]):
                counts = counts_of(own)
                total += (counts * density.log())[counts > 0].sum().item() / len(one.fixations)
        return total

    best = max(itertools.product(baselines.SIGMA_SHARES, baselines.PRIOR_SHARES), key=likelihood)
    chosen = baselines.GoldStandard.fit(split)
    assert (chosen.sigma_share, chosen.prior_share) == best


def test_gold_standard_beats_the_centre_bias_and_is_finite():
    split = [photo(f"g{k}", centre=(0.1 * k, 0.5), spread=0.05) for k in range(10)]
    prior = baselines.CentreBias.fit(split)
    gold = baselines.GoldStandard.fit(split, prior)
    for one in split:  # every photo has its own place to look at
        assert_density(gold(one))
        maps = (gold(one), counts_of(one.fixations), prior(H, W))
        assert 0 < metrics.information_gain(*(each[None] for each in maps)).item() < 10


def test_what_has_no_observers():
    gold = baselines.GoldStandard(0.02, 0.1)
    assert torch.equal(gold(photo("a", each=0)), baselines.uniform(H, W))
    with pytest.raises(ValueError, match="at least two observers"):
        baselines.GoldStandard.fit(photos(2, observers=1))
    with pytest.raises(ValueError, match="photo a: leaving one observer out needs at least two"):
        list(baselines.inter_observer(photo("a", observers=1), 2.0))


def test_fixations_without_an_observer_are_no_observer_s():
    """They may be of the observer that is left out: nobody is predicted from them."""
    known = photo("a", observers=3)
    every = {"observers": np.append(known.observers, [NOBODY] * 2), "durations": None}
    mixed = replace(known, fixations=np.tile(known.fixations, (2, 1))[: 18 + 2], **every)
    pairs = zip(baselines.inter_observer(known, 4), baselines.inter_observer(mixed, 4), strict=True)
    for (observer, density, own), (same, found, theirs) in pairs:
        assert observer == same != NOBODY
        assert torch.equal(density, found)
        assert np.array_equal(own, theirs)
    assert baselines.GoldStandard.fit([known]) == baselines.GoldStandard.fit([mixed])

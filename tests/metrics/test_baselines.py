"""Baselines are densities, follow their data, and leave out what they must."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points, fixation_counts
from mlnet_utils.data.photos import NOBODY, Photo
from mlnet_utils.metrics import baselines

H, W = 30, 40


def photo(stem, seed=0, height=H, width=W, observers=4, each=6, centre=(0.5, 0.5), spread=0.15):
    """A photo whose fixations are normal around a centre, in shares of its sides."""
    generator = np.random.default_rng([seed, *stem.encode()])
    points = generator.normal(centre, spread, (observers * each, 2)).clip(0, 0.999)
    points = (points * (width, height) - 0.5).astype(np.float32)
    return Photo(
        stem, f"{stem}.jpg", width, height, "train", points,
        np.repeat(np.arange(observers, dtype=np.int16), each),
    )  # fmt: skip


def photos(count=12, **options):
    return [photo(f"p{k}", **options) for k in range(count)]


def assert_density(density, height=H, width=W):
    assert density.shape == (height, width)
    assert density.dtype == torch.float64
    assert density.min() >= 0
    assert density.sum().item() == pytest.approx(1, abs=1e-12)


# ---- centre bias -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(H, W), (77, 33), (1, 1)])
def test_centre_bias_is_a_density_at_any_size(size):
    fitted = baselines.CentreBias.fit(photos())
    assert_density(fitted(*size), *size)
    assert "fixations" in fitted.description
    assert torch.equal(fitted(*size), fitted(*size))


def test_kernel_centre_bias_finds_a_shape_that_is_no_gaussian():
    two = photos(40, centre=(0.2, 0.5), spread=0.05) + [
        photo(f"q{k}", centre=(0.8, 0.5), spread=0.05) for k in range(40)
    ]
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
        expected = sum(fixation_counts(p.fixations, H, W) for p in split if p is not one)
        assert torch.equal(others(one), expected.int())
        once = sum(fixation_counts(p.fixations, H, W).clamp(max=1) for p in split if p is not one)
        assert torch.equal(others.photo_counts(one), once.int())


def test_leave_one_out_scales_between_sizes():
    small, large = photo("a", height=10, width=20), photo("b", height=30, width=80)
    others = baselines.LeaveOneOut([small, large])
    x, y = np.floor(large.fixations + 0.5).astype(int).T
    expected = torch.zeros(10, 20, dtype=torch.int32)
    for column, row in zip(x, y, strict=True):
        expected[row * 10 // 30, column * 20 // 80] += 1
    assert torch.equal(others(small), expected)
    assert others(large).sum() == len(small.fixations)
    assert others(large).shape == (30, 80)


def test_leave_one_out_refuses_strangers():
    split = photos(2)
    with pytest.raises(ValueError, match="different stems"):
        baselines.LeaveOneOut([*split, split[0]])
    with pytest.raises(ValueError, match="photo x is not one of the 2 photos"):
        baselines.LeaveOneOut(split)(photo("x"))


# ---- observers ---------------------------------------------------------------------------------
def test_inter_observer_leaves_exactly_one_observer_out():
    one = photo("a")
    found = list(baselines.inter_observer(one, 2.0))
    assert [observer for observer, _, _ in found] == [0, 1, 2, 3]
    for observer, density, own in found:
        assert_density(density)
        others = one.fixations[one.observers != observer]
        assert torch.equal(density, density_from_points(others, H, W, 2.0))
        assert np.array_equal(own, one.fixations[one.observers == observer])


def test_inter_observer_with_a_prior():
    one, prior = photo("a"), baselines.CentreBias.fit(photos())(H, W)
    _, density, _ = next(baselines.inter_observer(one, 2.0, prior, 0.25))
    plain = density_from_points(one.fixations[one.observers != 0], H, W, 2.0)
    torch.testing.assert_close(density, 0.75 * plain + 0.25 * prior)


def test_gold_standard_beats_the_centre_bias_and_is_finite():
    split = photos(10, spread=0.05)
    for k, one in enumerate(split):  # every photo has its own place to look at
        one.fixations[:] = photo(f"g{k}", centre=(0.1 * k, 0.5), spread=0.05).fixations
    prior = baselines.CentreBias.fit(split)
    gold = baselines.GoldStandard.fit(split, prior)
    assert gold.sigma_share in baselines.SIGMA_SHARES

    for one in split:
        density = gold(one)
        assert_density(density)
        gain = metrics.information_gain(
            density[None], fixation_counts(one.fixations, H, W)[None], prior(H, W)[None]
        )
        assert 0 < gain.item() < 10


def test_gold_standard_chooses_by_the_likelihood_of_left_out_observers():
    split, uniform = photos(3), baselines.uniform(H, W)
    chosen = baselines.GoldStandard.fit(split)
    likelihoods = {}
    for sigma in baselines.SIGMA_SHARES:
        for share in baselines.PRIOR_SHARES:
            total = 0.0
            for one in split:
                logs = [
                    density[fixation_counts(own, H, W) > 0].log()
                    for _, density, own in baselines.inter_observer(one, sigma * W, uniform, share)
                ]
                counts = [
                    fixation_counts(own, H, W)[fixation_counts(own, H, W) > 0]
                    for _, _, own in baselines.inter_observer(one, sigma * W)
                ]
                total += (torch.cat(logs) * torch.cat(counts)).sum().item() / len(one.fixations)
            likelihoods[sigma, share] = total
    best = max(likelihoods, key=likelihoods.get)
    assert (chosen.sigma_share, chosen.prior_share) == best


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
    fitted = [baselines.GoldStandard.fit([single]) for single in (known, mixed)]
    assert fitted[0] == fitted[1]

"""What the metrics must be by their definitions, on inputs that need no reference."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points, fixation_counts
from mlnet_utils.metrics.resize import resize

H, W = 9, 11
ALL = [*metrics.METRICS, "AUC-unfixated", "AUC-Judd", "AUC-Borji"]
MAPS, COUNTS = ("prediction", "density", "baseline"), ("fixations", "negatives")


def scene(seed=0, height=H, width=W, batch=1, points=8):
    """Random maps of a batch, without ties in the prediction."""
    generator = np.random.default_rng(seed)
    fixations, densities = [], []
    for _ in range(batch):
        xy = np.c_[generator.integers(0, width, points), generator.integers(0, height, points)]
        fixations.append(fixation_counts(xy, height, width))
        densities.append(density_from_points(xy, height, width, 1.5))
    shape = (batch, height, width)
    return {
        "prediction": torch.from_numpy(generator.random(shape)),
        "fixations": torch.stack(fixations),
        "density": torch.stack(densities),
        "negatives": torch.from_numpy(generator.integers(0, 4, shape)),
        "baseline": torch.from_numpy(generator.random(shape) + 0.1),
    }


def score(maps, names=ALL, protocol="mit300"):
    defined = [name for name in names if name in metrics.DEFINITIONS[protocol]]
    return metrics.score_all(**maps, protocol=protocol, metrics=defined)


def same(first, second, tolerance=0.0, skip=()):
    """Scores agree; a NaN agrees with a NaN."""
    assert first.keys() == second.keys()
    for name in first.keys() - set(skip):
        torch.testing.assert_close(
            first[name], second[name], atol=tolerance, rtol=0, equal_nan=True, msg=name
        )


# ---- identities --------------------------------------------------------------------------------
def test_emd_of_one_moved_pixel_is_its_distance():
    pytest.importorskip("ot", reason="needs the extra emd")
    here, there = torch.zeros(2, 1, 6, 7)
    here[0, 1, 1], there[0, 4, 5] = 1, 1
    assert metrics.emd(here, there, downsize=1).item() == pytest.approx(5, abs=1e-9)
    assert metrics.emd(here, here, downsize=1).item() == 0
    with pytest.raises(ValueError, match=r"image cat\.jpg: .* has values of both signs"):
        metrics.emd(here - there, there, names=["cat.jpg"])


# ---- ranks -------------------------------------------------------------------------------------
def pairwise_auc(positives, negatives, weights):
    """The definition, pair by pair."""
    above = (positives[:, None] > negatives).astype(float)
    above += 0.5 * (positives[:, None] == negatives)
    return (above * weights).sum() / (len(positives) * weights.sum())


levels = st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 0.1 + 1e-16, 0.3, 0.5, 1.0, 1e9])


@given(
    prediction=hnp.arrays(np.float64, (H, W), elements=st.one_of(levels, st.floats(-5, 5))),
    counts=hnp.arrays(np.int64, (H, W), elements=st.integers(0, 3)),
    negatives=hnp.arrays(np.int64, (H, W), elements=st.integers(0, 5)),
)
@settings(max_examples=150, deadline=None)
def test_areas_equal_their_definition_pair_by_pair(prediction, counts, negatives):
    maps = {"prediction": prediction, "fixations": counts, "negatives": negatives}
    maps = {kind: torch.from_numpy(value)[None] for kind, value in maps.items()}
    found = metrics.score_all(**maps, metrics=["AUC", "sAUC", "AUC-unfixated"])
    if np.ptp(prediction) <= 8 * np.finfo(float).eps * abs(prediction).max():
        prediction = np.zeros_like(prediction)
    positives = np.repeat(prediction.ravel(), counts.ravel())
    everywhere = np.ones_like(negatives)
    for name, weights in (
        ("AUC", everywhere),
        ("sAUC", negatives),
        ("AUC-unfixated", everywhere * (counts == 0)),
    ):
        if len(positives) and weights.sum():
            expected = pairwise_auc(positives, prediction.ravel(), weights.ravel())
            assert found[name].item() == pytest.approx(expected, abs=1e-12)
        else:
            assert math.isnan(found[name].item())


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_the_number_of_threads_does_not_change_a_bit(threads, protocol, batch):
    maps = scene(height=300, width=400, batch=batch, points=50)  # two blocks, in parallel by torch
    maps["baseline"] = maps["baseline"][:1].expand(batch, -1, -1)
    threads(1)
    alone = score(maps, protocol=protocol)
    for count in (2, 3):
        threads(count)
        same(score(maps, protocol=protocol), alone)
        assert torch.get_num_threads() == count


def test_an_error_in_a_thread_is_the_first_images(threads):
    maps = scene(batch=4)
    maps["prediction"][1:, 2, 2] = math.nan
    threads(2)
    with pytest.raises(ValueError, match="image 1 of the batch: prediction holds NaN"):
        score(maps)
    assert torch.get_num_threads() == 2


def test_a_baseline_that_is_shared_gives_the_same_gains():
    maps = scene(batch=3)
    one = maps["baseline"][:1]
    shared, copied = (
        metrics.information_gain(maps["prediction"], maps["fixations"], baseline)
        for baseline in (one.expand(3, -1, -1), one.repeat(3, 1, 1))
    )
    assert torch.equal(shared, copied)
    spoilt = one.clone()
    spoilt[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="every image of the batch: baseline holds NaN"):
        metrics.information_gain(maps["prediction"], maps["fixations"], spoilt.expand(3, -1, -1))


# ---- invariances -------------------------------------------------------------------------------
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
@given(seed=seeds, scale=st.sampled_from([1e-250, 1e-20, 0.37, 1e20, 1e250]))
@settings(max_examples=20, deadline=None)
def test_the_scale_of_a_prediction_does_not_matter(protocol, seed, scale):
    maps = scene(seed)
    changed = {**maps, "prediction": scale * maps["prediction"]}
    same(score(maps, protocol=protocol), score(changed, protocol=protocol), tolerance=1e-9)


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_an_image_scores_the_same_wherever_it_is_in_a_batch(protocol):
    maps = scene(3, batch=5)
    order = torch.tensor([4, 0, 3, 1, 2])
    whole = score(maps, protocol=protocol)
    permuted = score({k: v[order] for k, v in maps.items()}, protocol=protocol)
    alone = [score({k: v[i : i + 1] for k, v in maps.items()}, protocol=protocol) for i in order]
    same({name: values[order] for name, values in whole.items()}, permuted)
    same({name: torch.cat([one[name] for one in alone]) for name in whole}, permuted)


# ---- interface ---------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", ["mit300", "salicon"])
def test_single_functions_and_the_one_pass_agree_to_the_bit(protocol):
    maps = scene(2, batch=3)
    p, f, g, n, b = maps.values()
    asked = {"protocol": protocol}
    single = {
        "AUC": metrics.auc(p, f, **asked), "CC": metrics.cc(p, g, **asked),
        "KL": metrics.kl_divergence(p, g, **asked), "NSS": metrics.nss(p, f, **asked),
        "sAUC": metrics.auc_shuffled(p, f, n, **asked), "SIM": metrics.similarity(p, g, **asked),
        "IG": metrics.information_gain(p, f, b, **asked),
        "AUC-Judd": metrics.auc_judd(p, f), "AUC-Borji": metrics.auc_borji(p, f),
    }  # fmt: skip
    same(single, score(maps, list(single), protocol))
    for values in single.values():
        assert values.shape == (3,)
        assert values.dtype == torch.float64


def test_score_all_gives_what_its_inputs_allow():
    maps = scene()
    p, f, g, n, b = maps.values()
    assert tuple(metrics.score_all(p, f, g, n, b)) == metrics.METRICS
    assert set(metrics.score_all(p, f)) == {"AUC", "NSS"}
    assert set(metrics.score_all(p, f, g, n, b, "salicon2015")) == {"AUC", "CC", "sAUC", "NSS"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_counts_may_have_any_number_type(dtype):
    maps = scene(5)
    maps["fixations"], maps["negatives"] = (
        maps[k].clamp(max=1) for k in ("fixations", "negatives")
    )
    counts = {kind: maps[kind].to(dtype) for kind in ("fixations", "negatives")}
    for protocol in metrics.PROTOCOLS:
        same(score(maps, protocol=protocol), score({**maps, **counts}, protocol=protocol))


def test_inputs_are_left_as_they_are():
    maps = scene(6)
    before = {kind: values.clone() for kind, values in maps.items()}
    for protocol in metrics.PROTOCOLS:
        score(maps, protocol=protocol)
    for kind, values in before.items():
        assert torch.equal(values, maps[kind])


# ---- degenerate inputs -------------------------------------------------------------------------
NAN = math.nan
CONSTANT = {
    "mit300": {"AUC": 0.5, "sAUC": 0.5, "NSS": 0.0, "CC": 0.0},
    "salicon": {"AUC": NAN, "sAUC": 0.5, "NSS": NAN, "CC": NAN, "SIM": NAN, "IG": NAN},
    "salicon2015": {"AUC": 0.5, "sAUC": 0.5, "NSS": 0.0, "CC": NAN},
}


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.5, 1e-9, 3e7])
@pytest.mark.parametrize("noise", [0, 4])
def test_constant_predictions(protocol, dtype, value, noise):
    maps = scene(points=8)
    prediction = torch.full((1, H, W), value, dtype=dtype)
    prediction[0, 0, 0] *= 1 + noise * torch.finfo(dtype).eps
    found = score({**maps, "prediction": prediction}, protocol=protocol)
    for name, expected in CONSTANT[protocol].items():
        assert found[name].item() == pytest.approx(expected, abs=0, nan_ok=True), name


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *itertools.product(["prediction", "density", "baseline"], [1e308, 1e-320, 1e38, 1e-40]),
        *(("prediction", value) for value in (-1e308, -1e-320)),
    ],
)
def test_constant_maps_of_any_scale_are_uniform(protocol, kind, value):
    maps = scene()
    maps[kind] = torch.full_like(maps[kind], value)
    found = score(maps, metrics.METRICS, protocol)
    maps[kind] = torch.ones_like(maps[kind])
    same(found, score(maps, metrics.METRICS, protocol), 1e-12)


@pytest.mark.filterwarnings("ignore:.* 8-bit")
@pytest.mark.parametrize("kind", ["prediction", "density", "baseline", "fixations", "negatives"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_short_numbers_are_what_they_stand_for(kind, dtype):
    maps = scene()
    short = maps[kind].to(dtype)
    found = score({**maps, kind: short}, metrics.METRICS)
    same(found, score({**maps, kind: short.double()}, metrics.METRICS), 1e-12)
    assert found["AUC"] != 0.5


@pytest.mark.parametrize("kind", ["prediction", "density", "baseline", "fixations", "negatives"])
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.to(torch.complex64),
        lambda values: values.to_sparse(),
        lambda values: values.to("meta"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_tensors_without_plain_values_are_errors(kind, change):
    maps = scene()
    with pytest.raises(ValueError, match=f"{kind} .*real"):
        score({**maps, kind: change(maps[kind])}, metrics.METRICS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("kind", ["fixations", "negatives"])
def test_counts_beyond_all_data_are_errors(kind, dtype):
    maps = scene()
    maps[kind] = maps[kind].to(dtype)
    maps[kind][0, 0, 0] = 2**40
    with pytest.raises(ValueError, match=rf"{kind} .*1,099,511,6"):
        score(maps, metrics.METRICS)


def test_beyond_rounding_a_map_is_not_constant():
    maps = scene(points=1)
    prediction = torch.full((1, H, W), 0.1, dtype=torch.float64)
    prediction[maps["fixations"] > 0] *= 1 + 64 * torch.finfo(torch.float64).eps
    assert score({**maps, "prediction": prediction})["AUC"].item() > 0.99
    prediction = torch.ones((1, H, W), dtype=torch.bfloat16)
    prediction[maps["fixations"] > 0] = 1 + torch.finfo(torch.bfloat16).eps
    assert score({**maps, "prediction": prediction})["AUC"].item() > 0.99


def test_all_zero_predictions():
    maps = scene()
    maps["prediction"] = torch.zeros(1, H, W, dtype=torch.float64)
    uniform = score({**maps, "prediction": torch.ones(1, H, W, dtype=torch.float64)})
    same(score(maps), uniform, tolerance=1e-12)
    found = score(maps, protocol="salicon")
    assert found["SIM"].item() == 0.0
    assert found["KL"].item() > 20
    assert math.isnan(found["IG"].item())


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_photos_nobody_looked_at_are_undefined(protocol):
    maps = scene(batch=2)
    for kind in ("fixations", "density"):
        maps[kind][1] = 0
    found = score(maps, protocol=protocol)
    for name, values in found.items():
        assert torch.isfinite(values[0]), name
        assert torch.isnan(values[1]), name


def test_what_single_and_all_pixels_leave_undefined():
    maps = scene(points=1)
    assert math.isnan(score({**maps, "negatives": 0 * maps["negatives"]})["sAUC"].item())
    found = score(maps, protocol="salicon")
    assert math.isnan(found["AUC"].item())  # Borji's code needs two
    assert torch.isfinite(found["AUC-Judd"]).all()
    # salicon2015 takes this photo's own pixels out of the negatives: here none is left.
    alone = {**maps, "negatives": maps["fixations"]}
    assert math.isnan(score(alone, protocol="salicon2015")["sAUC"].item())
    found = score({**maps, "fixations": torch.ones_like(maps["fixations"])})
    assert found["AUC"].item() == 0.5
    assert math.isnan(found["AUC-unfixated"].item())
    assert math.isnan(found["AUC-Judd"].item())
    maps["prediction"][maps["fixations"] > 0] = 0
    assert score(maps)["IG"].item() == -math.inf
    assert math.isfinite(score(maps, protocol="salicon")["IG"].item())


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_resizers_take_empty_batches_and_maps_that_require_a_gradient(protocol):
    assert resize(torch.zeros(0, 3, 4), 6, 8, protocol=protocol).shape == (0, 6, 8)
    maps = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = resize(maps.clone().requires_grad_(), 6, 8, protocol=protocol)
    assert torch.equal(found, resize(maps, 6, 8, protocol=protocol))


def test_constant_density_has_no_correlation():
    maps = scene()
    maps["density"] = torch.full_like(maps["density"], 0.1)
    assert math.isnan(score(maps)["CC"].item())
    assert math.isnan(score(maps, protocol="salicon")["SIM"].item())
    maps["baseline"] = torch.full_like(maps["baseline"], 0.1)
    assert math.isnan(score(maps, ["IG"], "salicon")["IG"].item())
    assert math.isfinite(score(maps, ["IG"])["IG"].item())


def test_repeated_fixations_count_as_the_protocol_says():
    once = scene(points=6)
    once["fixations"] = once["fixations"].clamp(max=1)
    often = {**once, "fixations": once["fixations"] * torch.arange(1, W + 1)}
    names = ["AUC", "NSS", "IG", "sAUC"]
    same(score(once, names, "salicon"), score(often, names, "salicon"))
    assert score(once, ["NSS"])["NSS"] != score(often, ["NSS"])["NSS"]


# ---- refused inputs ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kinds", "value", "problem"),
    [
        *((MAPS, value, "holds NaN or infinity") for value in (math.nan, math.inf, -math.inf)),
        *((COUNTS, value, "must be whole counts") for value in (0.5, -1.0, math.nan)),
        (("density", "baseline"), -0.1, "has negative values"),
    ],
)
def test_wrong_values_are_errors_that_name_the_image(kinds, value, problem):
    for kind in kinds:
        maps = scene(batch=2)
        maps[kind] = maps[kind].double()
        maps[kind][1, 2, 3] = value
        with pytest.raises(ValueError, match=f"image cat.jpg: {kind} {problem}"):
            metrics.score_all(**maps, names=["dog.jpg", "cat.jpg"])
        with pytest.raises(ValueError, match="image 1 of the batch"):
            metrics.score_all(**maps)


@pytest.mark.parametrize("kind", ["fixations", "density", "negatives", "baseline"])
def test_other_shapes_are_errors(kind):
    maps = scene()
    with pytest.raises(ValueError, match=f"{kind} must have the prediction's shape"):
        metrics.score_all(**{**maps, kind: maps[kind][:, :-1]})
    with pytest.raises(ValueError, match="got ndarray"):
        metrics.score_all(**{**maps, kind: maps[kind].numpy()})
    for wrong in (maps["prediction"][0], maps["prediction"][None], maps["prediction"][:, :0], 3):
        with pytest.raises(ValueError, match=r"prediction must be a \(B, H, W\) tensor"):
            metrics.score_all(**{**maps, "prediction": wrong})


def test_baselines_must_be_positive_at_fixations():
    maps = scene(points=1)
    maps["baseline"][maps["fixations"] > 0] = 0
    with pytest.raises(ValueError, match="image 0 of the batch: the baseline is zero"):
        score(maps, ["IG"])
    assert math.isfinite(score(maps, ["IG"], "salicon")["IG"].item())


@pytest.mark.parametrize(
    ("call", "options", "problem"),
    [
        (metrics.auc, {"protocol": "mit1003"}, "'mit1003' is not one of mit300, salicon"),
        (metrics.score_all, {"metrics": ["auc"]}, "auc is not defined in protocol 'mit300'"),
        (metrics.kl_divergence, {"protocol": "salicon2015"}, "KL is not defined in .* 'salicon2"),
        (metrics.score_all, {"metrics": ["sAUC"]}, "sAUC needs negatives"),
        (metrics.auc, {"names": ["a", "b"]}, "2 names for 1 images"),
    ],
)
def test_unknown_names(call, options, problem):
    p, f, *_ = scene().values()
    with pytest.raises(ValueError, match=problem):
        call(p, f, **options)
    with pytest.raises(ValueError, match="grid=True needs protocol='salicon'"):
        metrics.auc_shuffled(p, f, f, grid=True)


# ---- 8-bit maps --------------------------------------------------------------------------------
BITS = torch.arange(H * W).reshape(1, H, W) % 97


@pytest.mark.parametrize(
    "prediction",
    [
        BITS.to(torch.uint8),
        BITS.double(),
        BITS.double() / 255,
        (BITS.float() / BITS.max() * 255).round() / 255 * 1e-6,
        (BITS.float() / BITS.max() * 255).round() * 1e5,
    ],
    ids=["uint8", "0..255", "0..1", "small", "large"],
)
@pytest.mark.parametrize("protocol", ["mit300", "salicon"])
def test_maps_read_back_from_8_bits_warn(prediction, protocol):
    maps = {**scene(), "prediction": prediction}
    maps["fixations"] = maps["fixations"] * (prediction > 0)
    for name in ("KL", "IG"):
        with pytest.warns(UserWarning, match="image 0 of the batch: .* 8-bit"):
            score(maps, [name], protocol)


@pytest.mark.parametrize(
    "prediction",
    [
        torch.rand(1, H, W, generator=torch.Generator().manual_seed(0)),
        torch.rand(1, H, W, generator=torch.Generator().manual_seed(0)) * 1e-7,
        torch.log(BITS.double() + 1) - 9,
        torch.full((1, H, W), 3.0),
        (BITS > 40).double(),
    ],
    ids=["float", "small float", "negative", "constant", "binary"],
)
def test_other_maps_do_not_warn(prediction):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score({**scene(), "prediction": prediction}, ["KL"])
        score({**scene(), "prediction": BITS.to(torch.uint8)}, ["AUC", "CC", "NSS", "SIM"])

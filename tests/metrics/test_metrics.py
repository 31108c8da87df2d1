"""What the metrics must be by their definitions, on inputs that need no reference."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points, fixation_counts
from mlnet_utils.metrics import functions

H, W = 9, 11
ALL = [*metrics.METRICS, "AUC-unfixated", "AUC-Judd", "AUC-Borji"]
MAPS, COUNTS = ("prediction", "density", "baseline"), ("fixations", "negatives")
PROTOCOLS = pytest.mark.parametrize("protocol", metrics.PROTOCOLS)


def scene(seed=0, height=H, width=W, batch=1, points=8):
    """Random maps of a batch, without ties in the prediction."""
    generator, shape = np.random.default_rng(seed), (batch, height, width)
    places = [generator.integers(0, (width, height), (points, 2)) for _ in range(batch)]
    return {
        "prediction": torch.from_numpy(generator.random(shape)),
        "fixations": torch.stack([fixation_counts(xy, height, width) for xy in places]),
        "density": torch.stack([density_from_points(xy, height, width, 1.5) for xy in places]),
        "negatives": torch.from_numpy(generator.integers(0, 4, shape)),
        "baseline": torch.from_numpy(generator.random(shape) + 0.1),
    }


def score(maps, names=ALL, protocol="mit300"):
    defined = [name for name in names if name in metrics.DEFINITIONS[protocol]]
    return metrics.score_all(**maps, protocol=protocol, metrics=defined)


def same(first, second, tolerance=0.0):
    """Scores agree; a NaN agrees with a NaN."""
    torch.testing.assert_close(first, second, atol=tolerance, rtol=0, equal_nan=True)


# ---- identities --------------------------------------------------------------------------------
def test_emd_of_one_moved_pixel_is_its_distance():
    pytest.importorskip("ot", reason="needs the extra emd")
    here, there = torch.zeros(2, 1, 6, 7)
    here[0, 1, 1], there[0, 4, 5] = 1, 1
    assert metrics.emd(here, there, downsize=1).item() == pytest.approx(5, abs=1e-9)
    assert metrics.emd(here, here, downsize=1).item() == 0
    with pytest.raises(ValueError, match=r"image cat\.jpg: .* has values of both signs"):
        metrics.emd(here - there, there, names=["cat.jpg"])


def test_formulas_on_numbers_that_a_reader_can_check():
    p, g, f = (torch.tensor(values).double() for values in ([0, 1, 1, 2], [0, 0, 1, 1], [2, 3]))
    f = f.long()  # values 1 and 2; the other pixels hold 0 and 1
    assert functions.exact_area(p[f], p[:2]) == (0.5 + 1 + 1 + 1) / 4
    assert functions.judd_area(p[f], p[:2]) == 3.5 / 4 + 0.5 / (
        2 * 2 * 2
    )  # 1 of 2 that tie lifts half
    assert functions.grid_area(p[f] / 2, p / 2, [0.0, 0.5, math.inf]) == 0.625
    assert functions.nss(p, f) == pytest.approx((0 + 1) / 2 / math.sqrt(0.5))
    assert functions.nss(p, f, correction=1) == pytest.approx(0.5 / math.sqrt(2 / 3))
    assert functions.cc(p, g) == pytest.approx(1 / math.sqrt(2))
    assert functions.information_gain(p / 4, torch.full((4,), 0.25), f) == (0 + 1) / 2
    assert functions.kl_divergence(p / 4, g / 2, 1e-16) == pytest.approx(0.5 * math.log(2))
    assert functions.similarity(p / 4, g / 2) == 0.25 + 0.5


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
    maps = (torch.from_numpy(values)[None] for values in (prediction, counts, negatives))
    maps = dict(zip(("prediction", "fixations", "negatives"), maps, strict=True))
    found = metrics.score_all(**maps, metrics=["AUC", "sAUC", "AUC-unfixated"])
    if np.ptp(prediction) <= 8 * np.finfo(float).eps * abs(prediction).max():
        prediction = np.zeros_like(prediction)
    positives, everywhere = np.repeat(prediction, counts.ravel()), np.ones_like(negatives)
    for name, weights in (
        *(("AUC", everywhere), ("sAUC", negatives)),
        ("AUC-unfixated", everywhere * (counts == 0)),
    ):
        expected = math.nan
        if len(positives) and weights.sum():
            expected = pairwise_auc(positives, prediction.ravel(), weights.ravel())
        assert found[name].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 5])
@PROTOCOLS
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
    p, f, *_, baseline = scene(batch=3).values()
    one = baseline[:1]
    shared = metrics.information_gain(p, f, one.expand(3, -1, -1))
    assert torch.equal(shared, metrics.information_gain(p, f, one.repeat(3, 1, 1)))
    one[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="every image of the batch: baseline holds NaN"):
        metrics.information_gain(p, f, one.expand(3, -1, -1))


# ---- invariances -------------------------------------------------------------------------------
@PROTOCOLS
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-250, 1e-20, 0.37, 1e20, 1e250]))
@settings(max_examples=20, deadline=None)
def test_the_scale_of_a_prediction_does_not_matter(protocol, seed, scale):
    maps = scene(seed)
    expected = score(maps, protocol=protocol)
    maps["prediction"] *= scale
    same(score(maps, protocol=protocol), expected, tolerance=1e-9)


@PROTOCOLS
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
    assert tuple(metrics.score_all(**maps)) == metrics.METRICS
    assert set(metrics.score_all(maps["prediction"], maps["fixations"])) == {"AUC", "NSS"}
    found = metrics.score_all(**maps, protocol="salicon2015")
    assert set(found) == {"AUC", "CC", "sAUC", "NSS"}


@PROTOCOLS
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_counts_may_have_any_number_type(protocol, dtype):
    maps = scene(5)
    maps |= {kind: maps[kind].clamp(max=1) for kind in COUNTS}
    counts = {kind: maps[kind].to(dtype) for kind in COUNTS}
    same(score(maps, protocol=protocol), score({**maps, **counts}, protocol=protocol))


@PROTOCOLS
def test_inputs_are_left_as_they_are(protocol):
    maps = scene(6)
    before = {kind: values.clone() for kind, values in maps.items()}
    score(maps, protocol=protocol)
    same(maps, before)


# ---- degenerate inputs -------------------------------------------------------------------------
NAN = math.nan
CONSTANT = {
    "mit300": {"AUC": 0.5, "sAUC": 0.5, "NSS": 0.0, "CC": 0.0},
    "salicon": {"AUC": NAN, "sAUC": 0.5, "NSS": NAN, "CC": NAN, "SIM": NAN, "IG": NAN},
    "salicon2015": {"AUC": 0.5, "sAUC": 0.5, "NSS": 0.0, "CC": NAN},
}


@PROTOCOLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.5, 1e-9, 3e7])
@pytest.mark.parametrize("noise", [0, 4])
def test_constant_predictions(protocol, dtype, value, noise):
    prediction = torch.full((1, H, W), value, dtype=dtype)
    prediction[0, 0, 0] *= 1 + noise * torch.finfo(dtype).eps
    found = score({**scene(), "prediction": prediction}, CONSTANT[protocol], protocol)
    values = {name: one.item() for name, one in found.items()}
    assert values == pytest.approx(CONSTANT[protocol], abs=0, nan_ok=True)


@PROTOCOLS
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *itertools.product(MAPS, [1e308, 1e-320, 1e38, 1e-40]),
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
@pytest.mark.parametrize("kind", [*MAPS, *COUNTS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_short_numbers_are_what_they_stand_for(kind, dtype):
    maps = scene()
    short = maps[kind].to(getattr(torch, dtype))
    found = score({**maps, kind: short}, metrics.METRICS)
    same(found, score({**maps, kind: short.double()}, metrics.METRICS), 1e-12)
    assert found["AUC"] != 0.5


@pytest.mark.parametrize(
    ("value", "eps", "dtype"),
    [(0.1, 64 * 2.0**-52, torch.float64), (1, 2.0**-7, torch.bfloat16)],
    ids=str,
)
def test_beyond_rounding_a_map_is_not_constant(value, eps, dtype):
    maps = scene(points=1)
    maps["prediction"] = (value * (1 + eps * maps["fixations"].double())).to(dtype)
    assert score(maps)["AUC"].item() > 0.99


def test_all_zero_predictions():
    maps = scene()
    maps["prediction"] = torch.zeros(1, H, W, dtype=torch.float64)
    uniform = score({**maps, "prediction": torch.ones(1, H, W, dtype=torch.float64)})
    same(score(maps), uniform, tolerance=1e-12)
    found = score(maps, protocol="salicon")
    assert found["SIM"].item() == 0.0
    assert found["KL"].item() > 20
    assert math.isnan(found["IG"].item())


@PROTOCOLS
def test_photos_nobody_looked_at_are_undefined(protocol):
    maps = scene(batch=2)
    for kind in ("fixations", "density"):
        maps[kind][1] = 0
    for name, (seen, unseen) in score(maps, protocol=protocol).items():
        assert math.isfinite(seen), name
        assert math.isnan(unseen), name


def test_what_single_and_all_pixels_leave_undefined():
    maps = scene(points=1)
    assert math.isnan(score({**maps, "negatives": 0 * maps["negatives"]})["sAUC"])
    found = score(maps, protocol="salicon")
    assert math.isnan(found["AUC"])  # Borji's code needs two
    assert math.isfinite(found["AUC-Judd"])
    # salicon2015 takes this photo's own pixels out of the negatives: here none is left.
    alone = {**maps, "negatives": maps["fixations"]}
    assert math.isnan(score(alone, protocol="salicon2015")["sAUC"])
    found = score({**maps, "fixations": torch.ones_like(maps["fixations"])})
    assert found["AUC"].item() == 0.5
    assert math.isnan(found["AUC-unfixated"])
    assert math.isnan(found["AUC-Judd"])
    maps["prediction"][maps["fixations"] > 0] = 0
    assert score(maps)["IG"].item() == -math.inf
    assert math.isfinite(score(maps, protocol="salicon")["IG"])


def test_constant_density_has_no_correlation():
    maps = scene()
    maps |= {kind: torch.full_like(maps[kind], 0.1) for kind in ("density", "baseline")}
    assert math.isnan(score(maps)["CC"])
    assert math.isnan(score(maps, ["SIM"], "salicon")["SIM"])
    assert math.isnan(score(maps, ["IG"], "salicon")["IG"])
    assert math.isfinite(score(maps, ["IG"])["IG"])


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
        *((COUNTS, value, "sums to 1,099,511,6") for value in (2**40, 2.0**40)),
        (("density", "baseline"), -0.1, "has negative values"),
    ],
)
def test_wrong_values_are_errors_that_name_the_image(kinds, value, problem):
    for kind in kinds:
        maps = scene(batch=2)
        maps[kind] = maps[kind].to(type(value))
        maps[kind][1, 2, 3] = value
        for names, image in ((["dog.jpg", "cat.jpg"], "cat.jpg"), (None, "1 of the batch")):
            with pytest.raises(ValueError, match=f"image {image}: {kind} {problem}"):
                metrics.score_all(**maps, names=names)


def test_of_two_wrong_maps_the_first_is_named():
    maps = scene()
    for kind in ("fixations", "negatives", "baseline"):
        maps[kind] = torch.full((1, H, W), -0.5)
    with pytest.raises(ValueError, match="batch: fixations "):
        score(maps)


UNREAL = (lambda v: v.to(torch.complex64), lambda v: v.to_sparse(), lambda v: v.to("meta"))
ODD = (lambda v: v[0], lambda v: v[None], lambda v: v[:, :0], lambda v: 3)
OTHERS = ("fixations", "density", "negatives", "baseline")


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        *((kind, change, f"{kind} .*real") for kind in (*MAPS, *COUNTS) for change in UNREAL),
        *(("prediction", change, r"prediction must be a \(B, H, W\) tensor") for change in ODD),
        *((k, lambda v: v[:, :-1], f"{k} must have the prediction's shape") for k in OTHERS),
        *((kind, lambda v: v.numpy(), "got ndarray") for kind in OTHERS),
    ],
)
def test_other_tensors_are_errors(kind, change, problem):
    maps = scene()
    with pytest.raises(ValueError, match=problem):
        metrics.score_all(**{**maps, kind: change(maps[kind])})


def test_baselines_must_be_positive_at_fixations():
    maps = scene(points=1)
    maps["baseline"][maps["fixations"] > 0] = 0
    for baseline in (maps["baseline"], torch.zeros(1, H, W)):
        with pytest.raises(ValueError, match="image 0 of the batch: the baseline is zero"):
            score({**maps, "baseline": baseline}, ["IG"])
    assert math.isfinite(score(maps, ["IG"], "salicon")["IG"].item())


@pytest.mark.parametrize(
    ("call", "options", "problem"),
    [
        (metrics.auc, {"protocol": "mit1003"}, "'mit1003' is not one of mit300, salicon"),
        (metrics.score_all, {"metrics": ["auc"]}, "auc is not defined in protocol 'mit300'"),
        (metrics.kl_divergence, {"protocol": "salicon2015"}, "KL is not defined in .* 'salicon2"),
        (metrics.score_all, {"metrics": ["sAUC"]}, "sAUC needs negatives"),
        (metrics.auc, {"names": ["a", "b"]}, "2 names for 1 images"),
        (
            lambda p, f: metrics.auc_shuffled(p, f, f, grid=True),
            {},
            "grid=True needs protocol='sal",
        ),
    ],
)
def test_unknown_names(call, options, problem):
    maps = scene()
    with pytest.raises(ValueError, match=problem):
        call(maps["prediction"], maps["fixations"], **options)


# ---- 8-bit maps --------------------------------------------------------------------------------
BITS = torch.arange(H * W).reshape(1, H, W) % 97
BYTES = (BITS.float() / BITS.max() * 255).round()
FLOAT = torch.rand(1, H, W, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "prediction",
    [BITS.to(torch.uint8), BITS.double(), BITS.double() / 255, BYTES / 255 * 1e-6, BYTES * 1e5],
    ids=["uint8", "0..255", "0..1", "small", "large"],
)
@pytest.mark.parametrize("protocol", ["mit300", "salicon"])
def test_maps_read_back_from_8_bits_warn(prediction, protocol):
    maps = {**scene(), "prediction": prediction}
    maps["fixations"] *= prediction > 0
    for name in ("KL", "IG"):
        with pytest.warns(UserWarning, match="image 0 of the batch: .* 8-bit"):
            score(maps, [name], protocol)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "prediction",
    [FLOAT, FLOAT * 1e-7, (BITS + 1.0).log() - 9, torch.full((1, H, W), 3.0), (BITS > 40).double()],
    ids=["float", "small float", "negative", "constant", "binary"],
)
def test_other_maps_do_not_warn(prediction):
    score({**scene(), "prediction": prediction}, ["KL"])
    score({**scene(), "prediction": BITS.to(torch.uint8)}, ["AUC", "CC", "NSS", "SIM"])

"""The metrics equal those of the reference implementations, each in its own protocol."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.metrics.resize import resize

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "cases.json").read_text())
NAMES = sorted(set(CASES) - {"set480"})
ARRAYS = dict(np.load(VECTORS / "cases.npz"))
PYSALIENCY, OCTAVE, SALICON, PORTS = (
    json.loads((VECTORS / f"expected_{name}.json").read_text())["values"]
    for name in ("pysaliency", "cvzoya_octave", "salicon_evaluation", "ports")
)
# These differ on purpose: the sources return garbage for a constant 0.1 (its mean is not exactly
# 0.1), a value for a photo that nobody looked at, no cost for moving nothing somewhere, and noise
# for a map at the scale of MATLAB's jitter.
ON_PURPOSE = {
    ("const_tenth", "NSS"), ("const_tenth", "CC"), ("empty", "KL"), ("empty", "SIM"),
    ("all_zero", "EMD"), ("tiny_scale", "AUC-Judd"),
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*8-bit file")


def count_map(shape, rows, columns):
    counts = np.zeros(shape, np.int64)
    np.add.at(counts, (rows, columns), 1)
    return torch.from_numpy(counts)[None]


def inputs(case, protocol, dtype=torch.float64):
    """A vector's maps as the functions take them, the prediction resized as the protocol does."""
    prediction, density, base = (
        torch.from_numpy(ARRAYS[f"{case}__{kind}"])[None] for kind in ("pred", "gt", "base")
    )
    shape = density.shape[1:]
    if prediction.shape[1:] != shape:
        prediction = resize(prediction, *shape, protocol=protocol)
    other = ARRAYS[f"{case}__other"]
    if protocol == "salicon2015":  # weights are numbers of images
        other = np.unique(other, axis=0)
    return {
        "prediction": prediction if prediction.dtype == torch.uint8 else prediction.to(dtype),
        "fixations": count_map(shape, *ARRAYS[f"{case}__fix"].T),
        "density": density.to(dtype),
        "negatives": count_map(shape, *other.T[1:]),
        "baseline": base.to(dtype),
    }


def score(case, protocol, name, dtype=torch.float64):
    maps = inputs(case, protocol, dtype)
    return metrics.score_all(**maps, protocol=protocol, metrics=[name])[name].item()


def assert_close(found, expected, tolerance):
    expected = math.nan if str(expected).startswith("error") else float(expected)
    if math.isfinite(expected):
        assert found == pytest.approx(expected, abs=tolerance, rel=0)
    else:
        assert str(found) == str(expected)


def pairs(*names):
    """Every case with every metric, without those that differ on purpose."""
    return [(case, *name) for name in names for case in NAMES if (case, name[0]) not in ON_PURPOSE]


# ---- pysaliency --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("case", "name", "key", "tolerance"),
    pairs(
        *(("AUC", "AUC_uniform", 1e-12), ("AUC-unfixated", "AUC_unfixated", 1e-12)),
        *(("sAUC", "sAUC", 1e-12), ("SIM", "SIM", 1e-12), ("NSS", "NSS", 1e-10)),
        *(("CC", "CC", 1e-10), ("KL", "KL_MIT", 1e-10), ("IG", "IG_vs_base_bits", 1e-10)),
    ),
)
def test_mit300_equals_pysaliency(case, name, key, tolerance):
    assert_close(score(case, "mit300", name), PYSALIENCY[case][key], tolerance)


SAME_SIZE = sorted(set(NAMES) - {"up4", "up1p6", "down2"})
# A grid of thresholds has maps that lie exactly on it in float64 but not in float32.
ON_THE_GRID = {"ties11", "large"}


@pytest.mark.parametrize("case", SAME_SIZE)
@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_float32_maps_give_the_values_of_float64_maps(case, protocol):
    for name in {*metrics.METRICS, "AUC-Judd", "AUC-Borji"} & metrics.DEFINITIONS[protocol].keys():
        on_grid = name == "AUC-Borji" or (name in ("AUC", "sAUC") and protocol != "mit300")
        if not (on_grid and case in ON_THE_GRID):
            scores = [score(case, protocol, name, d) for d in (torch.float32, torch.float64)]
            assert_close(*scores, 1e-12 if "AUC" in name else 1e-6)


# ---- MIT's MATLAB code -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("case", "name", "key"),
    pairs(("NSS", "NSS"), ("CC", "CC"), ("KL", "KLdiv"), ("SIM", "similarity"), ("IG", "InfoGain")),
)
def test_salicon_equals_matlab(case, name, key):
    assert_close(score(case, "salicon", name), OCTAVE[case][key], 1e-9)


@pytest.mark.parametrize(
    ("case", "name", "key"),
    pairs(
        *(("AUC-Judd", "AUC_Judd_jitter"), ("AUC-Borji", "AUC_Borji")),
        ("sAUC-grid", "AUC_shuffled"),
    ),
)
def test_expectations_lie_within_the_spread_of_matlabs_random_runs(case, name, key):
    maps = inputs(case, "salicon")
    maps["negatives"] = (maps["negatives"] > 0).long()  # MATLAB's code counts each pixel once
    found = metrics.score_all(**maps, protocol="salicon", metrics=[name])[name].item()
    mean, deviation = OCTAVE[case][f"{key}_mean"], OCTAVE[case][f"{key}_sd"]
    spread = 0.0 if deviation == "nan" else 4 * deviation / math.sqrt(50)
    assert_close(found, mean, max(spread, 1e-12))


@pytest.mark.parametrize("case", sorted(set(SAME_SIZE) - {"all_zero"}))
def test_emd_equals_matlabs(case):
    pytest.importorskip("ot", reason="needs the extra emd")
    maps = inputs(case, "salicon")
    found = metrics.emd(maps["prediction"], maps["density"], downsize=8).item()
    # FastEMD rounds all masses and distances to integers of about one part per million.
    assert_close(found, OCTAVE[case]["EMD_downsize8"], 1e-4)


# ---- the 2015 SALICON evaluator ----------------------------------------------------------------
@pytest.mark.parametrize("case", NAMES)
def test_salicon2015_equals_its_evaluator(case):
    expected, maps = SALICON[case], inputs(case, "salicon2015")
    maps["density"] = blurred(ARRAYS[f"{case}__fix"], maps["density"].shape[1:])
    found = metrics.score_all(**maps, protocol="salicon2015")
    assert set(found) == {"AUC", "CC", "sAUC", "NSS"}
    for name, key in (("sAUC", "SAUC"), ("NSS", "NSS"), ("CC", "CC_sigma19")):
        if name != "NSS" or (case, name) not in ON_PURPOSE:
            assert_close(found[name].item(), expected[key], 1e-10)
    if case != "empty":
        assert_close(found["AUC"].item(), expected["AUC"]["mean"], 5e-4)


def blurred(fixations, shape):
    """The evaluator's ground truth: every fixated pixel once, Gaussian of sigma 19."""
    points = np.unique(fixations, axis=0)[:, ::-1]
    return density_from_points(points, *shape, 19.0)[None]


@pytest.mark.parametrize("keep_repeats", [True, False])
def test_salicon2015_on_a_set_with_its_filter_and_resizer(keep_repeats):
    shape, expected = (480, 640), SALICON[f"set480_filterAnns_{keep_repeats}"]["per_image"]
    counts = torch.cat([count_map(shape, *ARRAYS[f"set480__fix{k}"].T) for k in range(4)])
    if keep_repeats:
        counts = (counts - 1).clamp(min=0)  # the evaluator's filter
    on_images = (counts > 0).long()
    maps = torch.from_numpy(np.stack([ARRAYS[f"set480__map{k}"] for k in range(4)]))
    found = metrics.score_all(
        resize(maps.double() / 255, *shape, protocol="salicon2015"),
        counts,
        torch.cat([blurred(np.argwhere(one.numpy() > 0), shape) for one in counts]),
        on_images.sum(0) - on_images,
        protocol="salicon2015",
    )
    for name, key, tolerance in (
        *(("sAUC", "SAUC", 1e-10), ("NSS", "NSS", 1e-10), ("CC", "CC", 1e-10)),
        ("AUC", "AUC", 4e-3),  # one run of 100,000 random pixels
    ):
        assert found[name].tolist() == pytest.approx(expected[key], abs=tolerance, rel=0)


# ---- research repositories ---------------------------------------------------------------------
# The ports have no rule for constant maps and break ties at random or not at all.
TIES = {"ties5", "ties11", "zeros", "large", "gmm_dup", "uint8"}
PORTED = [
    ("NSS", "salicon", "transalnet.NSS", 1e-10),
    ("CC", "salicon", "transalnet.CC", 1e-10),
    ("KL", "salicon", "transalnet.KLdiv", 2e-5),  # its eps is MIT300's
    ("SIM", "salicon", "transalnet.similarity", 1e-10),
    ("SIM", "mit300", "unisal.similarity", 1e-10),
    ("AUC-Judd", "salicon", "unisal.auc_judd", 2e-4),  # it rounds rates to 4 decimals
]


@pytest.mark.parametrize(
    ("case", "name", "protocol", "key", "tolerance"),
    [
        (case, *port)
        for port in PORTED
        for case in sorted(set(PORTS) - {"all_zero", "const_half", "const_tenth", "empty"})
        if not (port[0] == "AUC-Judd" and case in TIES)
    ],
)
def test_ports_that_follow_a_protocol(case, name, protocol, key, tolerance):
    assert_close(score(case, protocol, name), PORTS[case][key], tolerance)


# ---- pysaliency, live --------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:::pysaliency")
def test_hundred_random_maps_equal_pysaliency_live():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecated imports
        pysaliency = pytest.importorskip("pysaliency", reason="needs the extra parity")
    generator, shape = np.random.default_rng(5), (100, 24, 32)
    count, height, width = shape
    maps = generator.random(shape) ** generator.uniform(0.3, 8, (count, 1, 1))
    maps[::4] = np.round(maps[::4], 1)  # a quarter with many ties
    maps[1::4] += 3.0
    base = generator.random(shape) + 0.1
    n = np.repeat(np.arange(count), generator.integers(1, 40, count))
    x, y = generator.integers(0, width, len(n)), generator.integers(0, height, len(n))
    points = [np.c_[x, y][n == k] for k in range(count)]
    density = np.stack([density_from_points(xy, height, width, 2.0).numpy() for xy in points])
    counts = torch.cat([count_map(shape[1:], *xy.T[::-1]) for xy in points])
    p, g, b = map(torch.from_numpy, (maps, density, base))
    found = metrics.score_all(p, counts, g, counts.sum(0) - counts, b)

    stimuli = pysaliency.Stimuli([generator.integers(0, 255, shape[1:], np.uint8) for _ in maps])
    fixations = pysaliency.Fixations.create_without_history(x, y, n)

    class Given(pysaliency.SaliencyMapModel):
        """A model whose maps are given."""

        def __init__(self, values):
            super().__init__(caching=False)
            self.values = dict(zip(stimuli.stimulus_ids, values, strict=True))

        def _saliency_map(self, stimulus):
            return self.values[pysaliency.datasets.get_image_hash(stimulus)]

    model, truth, prior = Given(maps), Given(density), Given(base)
    as_density = pysaliency.models.SaliencyMapNormalizingModel
    per_fixation = as_density(model, minimum_value=0).information_gains(
        stimuli, fixations, baseline_model=as_density(prior, minimum_value=0)
    )
    eps = {"log_regularization": 2.2204e-16, "quotient_regularization": 2.2204e-16}
    with np.errstate(divide="ignore"):
        expected = {
            "AUC": model.AUC_per_image(stimuli, fixations),
            "sAUC": model.AUC_per_image(stimuli, fixations, nonfixations="shuffled"),
            "NSS": mean_by_image(model.NSSs(stimuli, fixations), n),
            "CC": model.CCs(stimuli, truth),
            "SIM": model.SIMs(stimuli, truth),
            "KL": model.image_based_kl_divergences(stimuli, truth, minimum_value=0, **eps),
            "IG": mean_by_image(per_fixation, n),
        }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, atol=1e-10, rtol=0, err_msg=name)


def mean_by_image(values, n):
    return np.bincount(n, values) / np.bincount(n)

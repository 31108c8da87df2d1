"""Figures are made from arrays, whatever their size, and saved without traces of the machine."""

import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mlnet_utils import plots


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def table_of(rows, *more):
    return pd.DataFrame(rows, columns=["model", "metric", "mean", "low", "high", *more])


def texts(artists):
    return [artist.get_text() for artist in artists]


def dots(axis):
    return [line for line in axis.get_lines() if line.get_marker() == "o"]


def seen_ticks(figure, low, high, apart=0):
    """The first panel's labels between two values, which are so many pixels apart or more."""
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    seen = [label for label in labels if low <= label.get_position()[0] <= high]
    boxes = [label.get_window_extent() for label in seen]
    assert all(a.x1 + apart < b.x0 for a, b in itertools.pairwise(boxes))
    return seen


def test_overlay_keeps_the_photo_where_the_map_is_zero_and_colours_it_where_it_peaks(photo):
    density = np.zeros((30, 40))
    density[10, 10] = 2.0
    result = plots.overlay(photo, density, strength=1.0)
    assert (result.shape, result.dtype) == (photo.shape, np.uint8)
    assert (result[0, 0] == photo[0, 0]).all()
    top_colour = np.array(plt.get_cmap(plots.MAP_COLOURS)(1.0)[:3]) * 255
    assert np.abs(result[10, 10] - top_colour).max() <= 1
    assert plots.overlay(photo, np.zeros((30, 40))).shape == photo.shape


def test_panels_have_a_row_per_photo_and_a_column_per_picture(photo):
    points = np.array([[0.0, 0.0], [39.0, 29.0]])
    row = {"photo": photo, "fixations": (photo, points), "map": photo.mean(2), "label": "a"}
    axes = plots.plot_panels([row, row]).axes  # at most two beside each other
    assert [axis.get_title() for axis in axes] == ["photo", "fixations", "map", ""] * 2
    assert [axis.get_ylabel() for axis in axes] == ["a", "", "", ""] * 2


def test_panels_may_begin_with_fixations_and_leave_no_gaps_between_rows(photo):
    rows = [{"fixations": (photo[:h], np.zeros((1, 2))), "map": photo[:h, :, 0]} for h in (30, 12)]
    figure = plots.plot_panels(rows)
    figure.draw_without_rendering()
    upper, lower = (axis.get_position() for axis in figure.axes[::2])
    assert 0 < upper.y0 - lower.y1 < 0.05
    assert upper.height / lower.height == pytest.approx(30 / 12, rel=0.02)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, [(-1, 3), (0, 1)]),
        ({"unit": "nats"}, [(-1, 3), (-1, 3)]),
        ({"unit": "nats", "diverging": True}, [(-3, 3), (-3, 3)]),
    ],
)
def test_maps_with_a_unit_share_their_scale_and_have_a_bar_for_it(photo, options, limits):
    maps = {"a": np.array([[-1.0, 3.0]]), "b": np.array([[0.0, 1.0]]), "photo": photo}
    axes = plots.plot_maps(maps, **options).axes
    images = [image for axis in axes[:2] for image in axis.get_images()]
    assert [image.get_clim() for image in images] == limits
    assert {image.get_interpolation() for image in images} == {"bilinear"}
    bars = [axis.get_xlabel() for axis in axes if axis.get_label() == "<colorbar>"]
    assert bars == ["nats"] * len(options.keys() & {"unit"})


def test_history_marks_the_best_epoch():
    rows = [(1, 1e-3, 3, 2.0, 0.1, 0.5), (2, 5e-4, 2, 1.0, 0.2, 0.6), (3, 1e-4, 1, 1.5, 0.3, 0.7)]
    columns = ["epoch", "lr", "train_loss", "val_loss", "val_cc", "val_nss"]
    figure = plots.plot_history(pd.DataFrame(rows, columns=columns))
    assert texts(figure.legends[0].get_texts()) == ["train", "validation", "best epoch, 2"]
    figure.draw_without_rendering()
    assert not any("$" in tick for axis in figure.axes for tick in texts(axis.get_yticklabels()))


def test_scores_leave_out_what_is_undefined():
    table = table_of([("a", "CC", 0.5, 0.4, 0.6), ("b", "CC", np.nan, np.nan, np.nan)])
    axis = plots.plot_scores(table, ["CC"]).axes[0]
    drawn = [line for line in axis.get_lines() if np.isfinite(line.get_xdata()).all()]
    assert len(drawn) == 2  # the interval and the mean of model a
    assert texts(axis.texts) == ["undefined"]
    assert texts(axis.get_yticklabels()) == ["a", "b"]
    assert texts(plots.plot_scores(table[:0], ["CC", "NSS"]).axes[0].texts) == ["no scores"]


def test_photos_that_a_mean_or_a_violin_leaves_out_are_counted():
    table = table_of([("a", "IG", 1, 0.5, 2, 3), ("b", "IG", 1, 0.5, 2, 0)], "infinite")
    without = "without 3 infinite photos"
    assert texts(plots.plot_scores(table, ["IG"]).axes[0].texts) == [without]
    scores = pd.DataFrame({"model": [*"aaaaabbbbbc"], "IG": [-np.inf] * 3 + [1.0] * 7 + [-np.inf]})
    assert texts(plots.plot_distributions(scores, ["IG"]).axes[0].texts) == [without, "infinite"]


def test_differences_that_are_unclear_or_negligible_are_marked():
    intervals = {"a": (0.2, 0.1, 0.3, 1), "b": (0.1, -0.1, 0.3, 0), "c": (0.2, 0.1, 0.3, 0)}
    table = table_of([(model, "CC", *rest) for model, rest in intervals.items()], "side")
    axis = plots.plot_scores(table, ["CC"], zero=True, negligible={"CC": 0.05}).axes[0]
    assert [dot.get_markerfacecolor() == "white" for dot in dots(axis)] == [False, True, True]
    (band,) = axis.patches
    assert (band.get_x(), band.get_width()) == (-0.05, 0.1)
    table["mean"], table["infinite"] = np.nan, 7
    assert set(texts(plots.plot_scores(table, ["CC"]).axes[0].texts)) == {"infinite, 7 photos"}


def test_a_model_has_one_colour_everywhere():
    for models in ([*plots.COLOURS], [*plots.COLOURS][2:]):
        table = table_of([(model, "CC", 0.5, 0.4, 0.6) for model in models])
        axis = plots.plot_scores(table, ["CC"]).axes[0]
        assert [dot.get_color() for dot in dots(axis)] == [plots.COLOURS[m] for m in models]
    scores = pd.DataFrame({"model": [*"aaaaabbbbb"], "IG": np.arange(10.0)})
    scores["CC"] = [np.nan] * 4 + [-np.inf, 1, 2, 3, 4, 5.0]
    axes = plots.plot_distributions(scores, ["CC", "IG"]).axes
    colours = [axis.collections[-1].get_facecolor().tolist() for axis in axes[:2]]
    assert colours[0] == colours[1]


def test_statistics_say_so_where_the_viewing_order_is_unknown():
    figure = plots.plot_fixation_statistics([3, 4], [1, 2, 2, 2], [], "pixels")
    assert texts(figure.axes[2].texts) == ["viewing order unknown"]


@pytest.mark.parametrize("most", [7, 40, 95])
def test_bins_of_whole_numbers_hold_equally_many_of_them(most):
    values = np.arange(most + 1)
    counts, _ = np.histogram(values, plots._bins(values))
    assert len(counts) <= 30
    assert len(set(counts[:-1].tolist())) == 1  # no comb
    assert counts.sum() == len(values)


def test_changes_to_infinity_are_the_worst_and_tell_how_many_photos():
    columns = {"IG": [1.5, -np.inf, 0.75], "NSS": [np.nan] * 3, "n": [0, 6, 0]}
    table = pd.DataFrame(columns, index=list("abc"))
    for reference in "ba":  # relative to an infinity nothing can be said, but scores are written
        axis = plots.plot_changes(table, reference, "n").axes[0]
        assert texts(axis.texts) == ["1.50", "-inf\n(6)", "0.75"]
    cells = axis.collections[0]
    assert cells.get_array().reshape(3, 2)[:, 0].tolist() == [0, -2 * plots.CLIPPED, -50]
    assert cells.cmap.get_under().tolist() != list(cells.cmap(0))
    assert axis.get_xlabel() == "in brackets: n"


def test_shown_figure_carries_its_alternative_text_and_is_shown_once(monkeypatch):
    ipython = pytest.importorskip("IPython", reason="needs the extra `notebooks`")
    shown = []
    monkeypatch.setattr(ipython.display, "display", lambda *args, **kw: shown.append((args, kw)))
    figure = plots.plot_maps({"a": np.eye(3)})
    plots.show("A diagonal", "The identity.")
    (first, second) = shown
    assert first == ((figure,), {"metadata": {"alt": "A diagonal"}})
    assert second[0][0].data == "*The identity.*"
    assert plt.get_fignums() == []


def test_save_is_atomic_and_leaves_no_software_name(tmp_path):
    plots.save(plots.plot_maps({"a": np.eye(3)}), tmp_path / "deep" / "a.png")
    (path,) = (tmp_path / "deep").iterdir()
    assert path.name == "a.png"
    with Image.open(path) as image:
        assert "Software" not in image.info


def test_amounts_have_a_tick_each_and_a_point_per_training():
    table = pd.DataFrame({"photos": [50, 50, 500], "CC": [0.5, 0.52, 0.7]})
    axis = plots.plot_amounts(table, ["CC"], "photos").axes[0]
    assert texts(axis.get_xticklabels()) == ["50", "500"]
    assert len(axis.collections[0].get_offsets()) == 3


NARROW = [(-0.008, 0.012), (-0.088, 0.014), (-0.035, 0.013)]


@pytest.mark.parametrize(("low", "high"), [*NARROW, (0.48, 0.88), (1.2, 2.2), (0, 370), (1, 12)])
def test_ticks_are_few_and_do_not_touch(low, high):
    scores = pd.DataFrame({"model": ["a"] * 2, "AUC": [low, high], "CC": [low, high]})
    seen = seen_ticks(plots.plot_distributions(scores, ["AUC", "CC"]), low, high)
    assert 3 <= len(seen) <= 5
    assert all(label.get_text() == "0" for label in seen if abs(label.get_position()[0]) < 1e-9)


def test_long_ticks_beside_long_names_do_not_touch():
    table = table_of([("ML-Net's head, loss as printed", "AUC", 0.0005, -0.0006, 0.0013)])
    with plt.rc_context():
        plots.use_style()
        figure = plots.plot_scores(table, ["AUC", "CC"], zero=True)
        figure.draw_without_rendering()
    seen = texts(seen_ticks(figure, *figure.axes[0].get_xlim(), apart=3))
    assert "0" in seen
    assert len(seen) > 1


def test_whole_numbers_have_whole_ticks():
    updates = plots.plot_curves(range(1, 11), {"loss": range(10)}, "update", "loss").axes[0]
    assert all(tick == round(tick) for tick in updates.get_xticks())
    shares = plots.plot_curves([0, 0.5, 1], {"loss": [2, 1, 0]}, "share", "loss").axes[0]
    assert any(tick != round(tick) for tick in shares.get_xticks())


@pytest.mark.parametrize("crop", [(10, 5, 50, 45), (0, 20, 80, 30), (30, 0, 40, 60)])
def test_looks_are_drawn_over_the_photo_and_a_crop_takes_as_much_room(crop):
    photo = np.zeros((60, 80, 3), np.uint8)
    figure = plots.plot_looks(photo, np.ones((60, 80)), [(20, 30, 0.25, 6)], crop)
    figure.draw_without_rendering()
    whole, _, looks, cropped = figure.axes
    sizes = [(box.width, box.height) for box in (whole.get_position(), cropped.get_position())]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert texts(looks.texts) == ["25%"]
    assert looks.patches[0].center == (20, 30)
    left, top, right, bottom = crop
    assert cropped.images[0].get_array().shape[:2] == (bottom - top, right - left)
    assert f"{(bottom - top) * (right - left) / 4800:.0%}" in cropped.get_title()


def test_curves_are_named_above_the_axes():
    axis = plots.plot_curves([0, 1, 2], {"a": [0, 1, 4], "b": [4, 1, 0]}, "x", "cost").axes[0]
    assert texts(axis.get_legend().get_texts()) == ["a", "b"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("x", "cost")
    assert plots.plot_curves([0, 1], {"a": [0, 1]}, "x", "y").axes[0].get_legend() is None


def test_the_architecture_names_every_shape():
    levels = {"level 1": (256, 60, 80), "level 2": (512, 60, 80)}
    written = texts(plots.plot_architecture((480, 640), levels, 64, (6, 8)).axes[0].texts)
    for shape in ("3 × 480 × 640", "256 × 60 × 80", "768 × 60 × 80", "64 × 60 × 80", "6 × 8"):
        assert shape in " ".join(written)
    raw = next(text for text in written if "raw map" in text)
    assert "ReLU" not in raw  # MLNet.raw_map has none: the head begins with it


def test_a_ladder_from_an_infinite_score_says_so():
    steps = table_of([("a", "CC", 0.1, 0.0, 0.2, 1), ("a", "IG", np.nan, 0.0, 0.2, 1)], "side")
    figure = plots.plot_ladder({"CC": 0.5, "IG": -np.inf}, steps, ["CC", "IG"])
    drawn, spare = figure.axes  # of a grid of two columns
    assert (len(drawn.patches), drawn.get_title()) == (1, "CC")
    assert not spare.axison
    assert figure.get_supxlabel().startswith("IG")
    assert plots.plot_ladder({"IG": -np.inf}, steps, ["IG"]).get_supxlabel().startswith("IG")


def test_a_ladder_does_not_go_on_beyond_an_infinite_score():
    means = enumerate([0.1, np.nan, np.nan, 0.2])
    steps = table_of([(f"rung {n}", "IG", mean, mean, mean, 1) for n, mean in means], "side")
    axis = plots.plot_ladder({"IG": 1.0}, steps, ["IG"]).axes[0]
    # Where the last rung begins is not known.
    assert [bar.get_x() for bar in axis.patches if np.isfinite(bar.get_x())] == [1.0]
    assert len(axis.texts) == 3

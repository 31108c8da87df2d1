"""Figures. Every ``plot_*`` takes arrays and returns a Figure; none shows or computes scores.

All are as wide as :data:`WIDTH` and have at most two columns of panels: their letters can be read
on a phone, 400 pixels wide, too.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from mlnet_utils.runtime import atomic_path

MAP_COLOURS = "magma"
DIFFERENCE_COLOURS = "RdBu_r"
PALETTE = "colorblind"  # seaborn's, after Okabe and Ito (2008)
# One colour per model in every figure; models that are not listed have no colour of their own.
COLOURS = {
    "ML-Net": "#0173b2",
    "uniform": "#949494",
    "centre bias": "#de8f05",
    "inter-observer": "#029e73",
    "gold standard": "#cc78bc",
}
NO_COLOUR = "#404040"
POINTS = "#ffd54a"  # fixations and likely looks, on photos of any colour
UNITS = {
    "AUC": "probability",
    "sAUC": "probability",
    "CC": "correlation",
    "SIM": "shared probability",
    "KL": "nats, less is better",
    "IG": "bits per fixation",
    "NSS": "standard deviations",
}
WIDTH = 6.4  # inches
COLUMNS = 2
TITLE_INCHES = 0.35  # of a picture, in a grid
BAR = {"location": "bottom", "shrink": 0.7, "aspect": 30, "pad": 0.03}  # of colours
BAR_INCHES = 0.7
# Three or four, seldom five.
FEW_TICKS = {"nbins": 4, "steps": (1, 1.5, 2, 2.5, 4, 5, 10), "min_n_ticks": 3}
FEW_POINTS = 12  # are drawn large
CLIPPED = 60  # per cent: a larger change has a colour of its own
# For pages made by nbconvert and nbviewer: on a phone, outputs are as wide as the text around them
# (template classic); code can be moved sideways, and in an output has the letters of code (lab).
PAGE_STYLE = """<style>
@media (max-width: 767px) { div.output_subarea { max-width: 100%; } }
.jp-InputArea-editor .highlight { overflow-x: auto; }
.jp-RenderedMarkdown .highlight pre { font-family: var(--jp-code-font-family, monospace); }
</style>"""
BAND = 1 << 20  # pixels that are painted at a time


def use_style() -> None:
    """Set the look of all notebooks; call it once, in their setup cell."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE)
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 100, "axes.titlesize": "medium"})
    if "ipykernel" in sys.modules:
        # Photos as PNG would make the saved notebooks several MB; nbviewer and git dislike that.
        from IPython.display import HTML, display
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 82})
        display(HTML(PAGE_STYLE))


def overlay(photo: np.ndarray, density: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """A photo (H, W, 3) with its map (H, W) of any non-negative scale on top: (H, W, 3) uint8.

    Where the map is zero the photo keeps its colours. ``strength`` is the map's opacity where it
    peaks, 0..1.
    """
    colour_map, peak = plt.get_cmap(MAP_COLOURS), max(float(density.max()), 1e-12)
    painted = np.empty((*density.shape, 3), np.uint8)
    band = max(1, BAND // density.shape[1])  # a photo of 100 megapixels would take 10 GB at once
    for first in range(0, len(density), band):
        rows = slice(first, first + band)
        scaled = np.sqrt(density[rows] / peak)  # the root shows the weaker regions too
        colours = colour_map(scaled)[..., :3] * 255
        alpha = strength * scaled[..., None]
        painted[rows] = (photo[rows] * (1 - alpha) + colours * alpha).clip(0, 255)
    return painted


# ---- photos and maps ---------------------------------------------------------------------------
def plot_panels(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Rows of pictures: each row maps a title to a photo (H, W, 3), a map (H, W) or
    ``(photo, points)`` for fixations on a photo. A key ``"label"`` names the row.

    A row of more than two pictures goes on in the next line. Maps have scales of their own.
    """
    lines: list[tuple[str, list[tuple[str, object]]]] = []
    for row in rows:
        pictures = [item for item in row.items() if item[0] != "label"]
        for first in range(0, len(pictures), COLUMNS):
            label = "" if first else str(row.get("label", ""))
            lines.append((label, pictures[first : first + COLUMNS]))
    columns = max(len(pictures) for _, pictures in lines)
    firsts = [pictures[0][1] for _, pictures in lines]  # rows may hold photos of different shapes
    shapes = [np.shape(first[0] if isinstance(first, tuple) else first) for first in firsts]
    heights = [WIDTH / columns * shape[0] / shape[1] for shape in shapes]
    titled = {0, *range(len(lines))} if len(lines) > len(rows) else {0}
    options = {"figsize": (WIDTH, sum(heights) + len(titled) * TITLE_INCHES)}
    # Pictures have shapes of their own: no gaps between them.
    options |= {"height_ratios": heights, "squeeze": False, "layout": "compressed"}
    figure, axes = plt.subplots(len(lines), columns, **options)
    for number, (line, (label, pictures)) in enumerate(zip(axes, lines, strict=True)):
        for axis in line[len(pictures) :]:
            axis.axis("off")
        for axis, (title, content) in zip(line, pictures, strict=False):
            _draw(axis, content)
            axis.set_title(title if number in titled else "")
        line[0].set_ylabel(label)
    return figure


def _draw(axis: Axes, content: object) -> AxesImage:
    """Draw a photo, a map, or a photo with fixations."""
    photo, points = content if isinstance(content, tuple) else (np.asarray(content), None)
    smooth = {"cmap": MAP_COLOURS, "interpolation": "bilinear"} if np.ndim(photo) == 2 else {}
    image = axis.imshow(photo, **smooth)
    axis.set(xticks=[], yticks=[], frame_on=False)
    axis.grid(False)
    if points is not None:
        size = 9 if len(points) > FEW_POINTS else 60
        style = {"s": size, "c": POINTS, "edgecolors": "black", "linewidths": 0.4}
        axis.scatter(points[:, 0], points[:, 1], **style)
        axis.set(xlim=(-0.5, photo.shape[1] - 0.5), ylim=(photo.shape[0] - 0.5, -0.5))
    return image


def plot_maps(
    maps: Mapping[str, np.ndarray],
    columns: int = COLUMNS,
    width: float = WIDTH,
    diverging: bool = False,
    unit: str = "",
) -> Figure:
    """Titled maps or photos in a grid.

    With a ``unit`` the maps share a scale, and a colour bar shows it; without, each map's colours
    span its own values. ``diverging``: they share a scale that is centred on zero.
    """
    columns = min(columns, len(maps))
    height, side = np.shape(next(iter(maps.values())))[:2]
    inches = width / columns * height / side + TITLE_INCHES
    bar = BAR_INCHES if unit or diverging else 0
    figure, axes = _grid(len(maps), inches, columns, width, bar, layout="compressed")
    images = []
    for axis, (title, content) in zip(axes, maps.items(), strict=True):
        axis.set_title(title)
        image = _draw(axis, content)
        if np.ndim(content) == 2:
            images.append(image)
    if bar:
        values = np.concatenate([np.ravel(image.get_array()) for image in images])
        low, high = float(values.min()), float(values.max())
        if diverging:
            high = max(abs(low), abs(high), 1e-12)
            low = -high
        for image in images:
            image.set(clim=(low, high), cmap=DIFFERENCE_COLOURS if diverging else MAP_COLOURS)
        figure.colorbar(
            images[0], ax=list(axes), label=unit, ticks=MaxNLocator(**FEW_TICKS),
            format=_short, **BAR,
        )  # fmt: skip
    return figure


def _grid(
    count: int, height: float, columns: int = COLUMNS, width: float = WIDTH, bar: float = 0,
    **options: Any,
) -> tuple[Figure, Sequence[Axes]]:  # fmt: skip
    """A figure of ``count`` panels; in inches the height of a row, and of the bar below them."""
    rows = -(-count // columns)
    options = {"figsize": (width, height * rows + bar), "layout": "constrained", **options}
    figure, axes = plt.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def plot_looks(
    photo: np.ndarray,
    density: np.ndarray,
    looks: Sequence[tuple[float, float, float, float]],
    crop: tuple[int, int, int, int],
) -> Figure:
    """A photo four times: as it is, under its saliency map, with likely looks, and cropped.

    ``photo`` is (H, W, 3) uint8, ``density`` (H, W). A look is x, y, share and radius in pixels of
    the photo; the crop is left, top, right, bottom, the last two exclusive.
    """
    left, top, right, bottom = crop
    kept = density[top:bottom, left:right].sum() / density.sum()
    pictures = {
        "photo": photo,
        "saliency map": overlay(photo, density),
        "likely looks": photo,
        f"crop with {kept:.0%} of the looks": photo[top:bottom, left:right],
    }
    figure = plot_maps(pictures)
    axes = figure.axes
    # Margins give the crop the shape of the photo: all panels are then equally large.
    wide, tall = right - left, bottom - top
    scale = max(wide / photo.shape[1], tall / photo.shape[0])
    across, down = (scale * side / 2 for side in (photo.shape[1], photo.shape[0]))
    axes[3].set(
        xlim=(wide / 2 - across, wide / 2 + across), ylim=(tall / 2 + down, tall / 2 - down)
    )
    for x, y, share, radius in looks:
        for colour, width in (("black", 3), (POINTS, 1.5)):
            circle = plt.Circle((x, y), radius, fill=False, color=colour, linewidth=width)
            axes[2].add_patch(circle)
        style = {"ha": "center", "va": "center", "color": "white", "fontsize": "small"}
        label = axes[2].text(x, y, f"{share:.0%}", **style)
        # Nearly opaque: the line of a neighbour's circle looks like a digit.
        label.set_bbox({"facecolor": "black", "alpha": 0.85, "pad": 1.5, "linewidth": 0})
    return figure


# ---- scores ------------------------------------------------------------------------------------
def plot_history(log: pd.DataFrame) -> Figure:
    """Learning curves: losses, validation scores and learning rate, with the best epoch marked."""
    figure, axes = _grid(4, 2.2, bar=0.4)
    best, dots = log.loc[log["val_loss"].idxmin(), "epoch"], {"marker": "o", "ms": 4}
    axes[0].plot(log["epoch"], log["train_loss"], **dots, label="train")
    axes[0].plot(log["epoch"], log["val_loss"], **dots, color="C1", label="validation")
    axes[1].plot(log["epoch"], log["val_cc"], **dots, color="C1")
    axes[2].plot(log["epoch"], log["val_nss"], **dots, color="C1")
    axes[3].plot(log["epoch"], log["lr"], **dots, color=NO_COLOUR)
    axes[3].set_yscale("log")
    axes[3].yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # not in math mode
    axes[3].yaxis.set_minor_formatter(NullFormatter())
    labels = ("loss", "CC, correlation", "NSS, standard deviations", "learning rate")
    for axis, label in zip(axes, labels, strict=True):
        axis.axvline(best, color="grey", lw=1.2, ls=":", label=f"best epoch, {best:.0f}")
        axis.set_title(label)
        few_ticks(axis.xaxis, integer=True)
        if axis is not axes[3]:
            few_ticks(axis.yaxis)
    axes[3].yaxis.set_major_locator(LogLocator(numticks=4))
    for axis in axes[2:]:
        axis.set_xlabel("epoch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def plot_scores(
    table: pd.DataFrame,
    metrics: Sequence[str],
    zero: bool = False,
    negligible: Mapping[str, float] | None = None,
) -> Figure:
    """Scores with intervals: a panel per metric, a row in it per model.

    ``table`` has columns ``model``, ``metric``, ``mean``, ``low``, ``high``. ``zero`` is for
    differences: it marks zero, and hollow dots mark unclear differences: the interval holds zero,
    or the column ``side``, if any, is 0. ``negligible`` is the size per metric up to which a
    difference does not count, a grey band. A column ``infinite`` counts the photos that a mean
    leaves out.
    """
    models = list(table["model"].unique())
    bands = {} if negligible is None else dict(negligible)
    if not models:
        figure, axis = plt.subplots(figsize=(WIDTH, 0.6))
        _say(axis, "no scores")
        axis.axis("off")
        return figure
    height = 0.3 * len(models) + 1.0
    figure, axes = _grid(len(metrics), height, sharey=True, bar=0.4)
    for axis, metric in zip(axes, metrics, strict=True):
        part = table[table["metric"] == metric].set_index("model").reindex(models)
        axis.margins(x=0.1)  # no dot on the frame
        if zero:
            axis.axvline(0, color="black", lw=1)
        if band := bands.get(metric, 0):
            axis.axvspan(-band, band, color="0.85", zorder=0)
        for y, (model, row) in enumerate(part.iterrows()):
            if not np.isfinite(row["mean"]):
                endless = row.get("infinite", 0) > 0
                _say(axis, f"infinite, {row['infinite']:.0f} photos" if endless else "undefined", y)
                continue
            colour = COLOURS.get(model, NO_COLOUR)
            unclear = zero and (row["low"] <= 0 <= row["high"] or row.get("side", 1) == 0)
            axis.plot([row["low"], row["high"]], [y, y], color=colour, lw=2.5)
            face = "white" if unclear else colour
            axis.plot(row["mean"], y, "o", color=colour, ms=7, mfc=face, mew=1.5)
            _say_endless(axis, row.get("infinite", 0), y)
        axis.set(yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5))
        _name(axis, metric)
    style = {"color": NO_COLOUR, "lw": 2.5, "marker": "o"}
    key = [Line2D([], [], **style, label="mean and 95 % interval")]
    if zero:
        key.append(Line2D([], [], **style, mfc="white", mew=1.5, label="unclear"))
    if bands:
        key.append(Patch(color="0.85", label="negligible"))
    figure.legend(handles=key, loc="outside lower center", ncols=3)
    return figure


def plot_distributions(scores: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Per-photo scores of each model as violins with quartiles, a panel per metric.

    Photos with infinite scores are counted beside the violin that leaves them out. ``scores`` has a
    row per photo and model, with ``model`` and a column per metric.
    """
    models = list(scores["model"].unique())
    height = 0.4 * len(models) + 1.0
    figure, axes = _grid(len(metrics), height, sharey=True)
    colours = {model: COLOURS.get(model, NO_COLOUR) for model in models}
    for axis, metric in zip(axes, metrics, strict=True):
        finite = scores[np.isfinite(scores[metric])]
        sns.violinplot(
            finite, x=metric, y="model", hue="model", ax=axis, cut=0, inner="quart", linewidth=0.8,
            order=models, hue_order=models, palette=colours, legend=False,
        )  # fmt: skip
        endless = scores["model"][np.isinf(scores[metric])].value_counts()
        for y, model in enumerate(models):
            if model not in set(finite["model"]):
                _say(axis, "infinite" if model in endless else "undefined", y)
            else:
                _say_endless(axis, endless.get(model, 0), y)
        axis.set_ylabel("")
        _name(axis, metric)
    return figure


def plot_amounts(table: pd.DataFrame, metrics: Sequence[str], amount: str) -> Figure:
    """Scores against an amount of data: every seed as a point, their mean as a line.

    ``table`` has a row per training, with a column per metric and the column ``amount``.
    """
    figure, axes = _grid(len(metrics), 2.4)
    for axis, metric in zip(axes, metrics, strict=True):
        sns.lineplot(table, x=amount, y=metric, ax=axis, errorbar=None, color="C0")
        sns.scatterplot(table, x=amount, y=metric, ax=axis, color="C0", s=22)
        axis.set(title=metric, ylabel=UNITS.get(metric, ""), xscale="log")
        few_ticks(axis.yaxis)
        ticks = sorted(table[amount].unique())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45)
        axis.minorticks_off()
    return figure


def _name(axis: Axes, metric: str) -> None:
    """Set title, unit and a few ticks of a panel with a metric on its x axis."""
    axis.set(title=metric, xlabel=UNITS.get(metric, ""))
    axis.tick_params(axis="x", labelsize="small")  # −0.04 and −0.02 touch in a narrow panel
    few_ticks(axis.xaxis)
    low, high = axis.get_xlim()
    seen = [tick for tick in axis.get_xticks() if low <= tick <= high]
    if len(" ".join(map(_short, seen))) > 20:  # so do 0.0005 and 0.001: every second is left
        axis.xaxis.set_major_locator(MultipleLocator(2 * (seen[1] - seen[0])))


def few_ticks(*axes: XAxis | YAxis, integer: bool = False) -> None:
    """Set three or four ticks, written as short as possible."""
    for ticks in axes:
        ticks.set_major_locator(MaxNLocator(**FEW_TICKS, integer=integer))
        ticks.set_major_formatter(_short)


def _short(value: float, _: int | None = None) -> str:
    """A tick's number: 0 and 0.01, not 0.000 and 0.010, which touch in narrow panels."""
    return f"{round(value, 9) + 0.0:g}".replace("-", "\N{MINUS SIGN}")


def _say(axis: Axes, reason: str, y: float | None = None) -> None:
    """Write the reason into an empty panel, or into its row at ``y``."""
    where = axis.transAxes if y is None else axis.get_yaxis_transform()
    style = {"ha": "center", "va": "center", "color": "0.4", "fontsize": "small"}
    style["bbox"] = {"facecolor": "white", "pad": 1.5, "linewidth": 0}  # over lines and bands
    axis.text(0.5, 0.5 if y is None else y, reason, transform=where, **style)


def _say_endless(axis: Axes, photos: int, y: float) -> None:
    """Write above the row at ``y`` the number of photos that it leaves out: infinite scores."""
    if photos:
        style = {"ha": "right", "va": "center", "color": "0.25", "fontsize": "x-small"}
        text, where = f"without {photos:.0f} infinite photos", axis.get_yaxis_transform()
        axis.text(0.99, y - 0.36, text, transform=where, **style)


def plot_fixation_statistics(
    per_photo: Sequence[int], per_observer: Sequence[float], saccades: Sequence[float], unit: str
) -> Figure:
    """Histograms: fixations per photo, per observer and photo, and saccade amplitude in ``unit``.

    Saccades are distances between consecutive fixations of an observer. Panels without data are
    empty.
    """
    figure, axes = _grid(3, 2.6)
    panels = (
        (per_photo, "fixations per photo", "photos", "no photos"),
        (per_observer, "fixations per observer", "observers of photos", "observers unknown"),
        (saccades, f"saccade amplitude, {unit}", "saccades", "viewing order unknown"),
    )
    for axis, (values, label, counted, absent) in zip(axes, panels, strict=True):
        values = np.asarray(values)
        axis.set(xlabel=label, ylabel=counted)
        if not len(values):
            axis.set(xticks=[], yticks=[])
            _say(axis, absent)
            continue
        axis.hist(values, _bins(values), edgecolor="white", linewidth=0.3)
        median = np.median(values)
        axis.axvline(median, color="C3", lw=1.5)
        axis.set_title(f"median {median:.3g}", color="C3")
        few_ticks(axis.xaxis, axis.yaxis)
    return figure


def _bins(values: np.ndarray, most: int = 30) -> np.ndarray:
    """Edges of at most so many bins; those of whole numbers hold equally many of them each."""
    low, high = values.min(), values.max()
    if values.dtype.kind not in "iu":
        return np.linspace(low, high, most + 1) if high > low else np.array([low - 0.5, low + 0.5])
    width = -(-(high - low + 1) // most)
    return np.arange(low - 0.5, high + width, width)


def plot_changes(table: pd.DataFrame, reference: str, infinite: str) -> Figure:
    """A heat map of the relative change of each metric when a prediction is changed.

    ``table`` has a row per variant of the prediction, unchanged in the row ``reference``,
    and a column per metric, larger is better; -inf counts as the worst change. The column
    ``infinite`` holds the number of photos with an infinite score: it stands in brackets under
    every infinite mean, and the column's name explains it. Changes beyond :data:`CLIPPED` per cent
    have a colour of their own, that of the colour bar's arrows.
    """
    photos, table = table[infinite], table.drop(columns=infinite)
    change = 100 * (table - table.loc[reference]) / table.loc[reference].abs()
    # Where the reference is infinite there is no relative change, but there is a score to write.
    change = change.fillna(0).where(table.notna()).clip(-2 * CLIPPED, 2 * CLIPPED)
    figure, axis = plt.subplots(figsize=(WIDTH, 0.5 * len(table) + 1.6), layout="constrained")
    labels = table.map(lambda value: f"{value:.2f}").where(
        ~np.isinf(table), table.astype(str).add(photos.map("\n({})".format), axis=0)
    )
    colours = plt.get_cmap("RdBu").with_extremes(under="#7f0000", over="#00205b")
    label = f"change against {reference}, %"
    bar = {**BAR, "extend": "both", "label": label, "ticks": [-CLIPPED, 0, CLIPPED]}
    sns.heatmap(
        change, annot=labels, fmt="", cmap=colours, vmin=-CLIPPED, vmax=CLIPPED,
        ax=axis, linewidths=1, cbar_kws=bar, annot_kws={"size": "small"},
    )  # fmt: skip
    axis.xaxis.tick_top()
    axis.set_yticklabels([name.replace(" (", "\n(") for name in table.index], rotation=0)
    axis.tick_params(length=0, labelsize="small")
    note = f"in brackets: {infinite}" if np.isinf(table).any(axis=None) else ""
    axis.set(xlabel=note, ylabel="")
    return figure


def plot_life(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """The share of the map above zero, and the loss, against updates: a line per training.

    Tables have columns ``update``, ``above zero`` (0..1) and ``loss``.
    """
    figure, axes = _grid(2, 2.6, bar=BAR_INCHES)
    for name, curve in curves.items():
        axes[0].plot(curve["update"], 100 * curve["above zero"], label=name, lw=2)
        axes[1].plot(curve["update"], curve["loss"], lw=1.5)
    axes[0].set(title="map above zero", ylabel="share of cells, %", ylim=(-3, 103))
    axes[1].set(title="loss of the update's photos", ylabel="ML-Net's loss")
    for axis in axes:
        axis.set_xlabel("update")
        few_ticks(axis.xaxis, axis.yaxis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_ladder(start: Mapping[str, float], steps: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """A waterfall: from the scores of the first rung by the differences of the others.

    ``start`` holds the first rung's mean of each metric; ``steps`` has columns ``model``,
    ``metric``, ``mean``, ``low``, ``high`` and ``side`` (0: the sign is not clear, drawn grey). A
    metric that is infinite at the first rung has no panel, and a line says so; where it is
    infinite at a later rung, the bars end there.
    """
    rungs = list(steps["model"].unique())
    endless = [metric for metric in metrics if not np.isfinite(start[metric])]
    metrics = [metric for metric in metrics if metric not in endless]
    figure, axes = _grid(max(1, len(metrics)), 0.34 * len(rungs) + 1, sharey=True)
    if endless:
        figure.supxlabel(f"{', '.join(endless)}: infinite at the first rung", fontsize="small")
    better, worse, unclear = "#0173b2", "#d55e00", "0.65"
    for axis, metric in zip(axes, metrics, strict=False):
        axis.set(yticks=range(len(rungs)), yticklabels=rungs, ylim=(len(rungs) - 0.5, -0.5))
        _name(axis, metric)
        part = steps[steps["metric"] == metric].set_index("model").loc[rungs]
        ends = start[metric] + part["mean"].cumsum(skipna=False)
        begins = ends - part["mean"]
        colours = [{1: better, -1: worse}.get(side, unclear) for side in part["side"]]
        # The edge shows a change that is too small for a bar.
        bars = {"color": colours, "edgecolor": colours, "linewidth": 1.5, "height": 0.6}
        axis.barh(range(len(rungs)), part["mean"], left=begins, **bars)
        spread = [part["mean"] - part["low"], part["high"] - part["mean"]]
        style = {"fmt": "none", "ecolor": "black", "elinewidth": 1}
        axis.errorbar(ends, range(len(rungs)), xerr=spread, **style)
        axis.axvline(start[metric], color="grey", lw=1, ls=":")
        for y in np.flatnonzero(ends.isna()):
            known = np.isfinite(part["mean"].iloc[y])
            _say(axis, "beyond an infinite score" if known else "infinite", y)
    return figure


def show(alt: str, caption: str = "") -> None:
    """Display the latest figure in a notebook, with a visible caption below it.

    ``alt`` describes the picture for those who cannot see it, and is the caption where there is no
    other. nbconvert's template ``classic``, which nbviewer uses, writes it into the image; its
    template ``lab`` (nbconvert 7.17) shows the caption only.
    """
    from IPython.display import Markdown, display

    figure = plt.gcf()
    display(figure, metadata={"alt": alt})
    plt.close(figure)  # or the inline backend shows it again
    display(Markdown(f"*{caption or alt}*"))


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically, without the metadata that differs between machines."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", metadata={"Software": None})


def plot_curves(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str
) -> Figure:
    """Named curves over a common ``x``, told apart by colour and dash; the legend is above."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="tight")
    dashes = ("-", "--", ":", "-.")
    for (name, values), dash in zip(curves.items(), dashes, strict=False):
        axis.plot(x, values, dash, lw=2.5, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    few_ticks(axis.xaxis, integer=all(float(value).is_integer() for value in x))
    few_ticks(axis.yaxis)
    if len(curves) > 1:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2, frameon=False)
    return figure


def plot_architecture(
    photo: tuple[int, int], levels: Mapping[str, tuple[int, int, int]], channels: int,
    prior: tuple[int, int],
) -> Figure:  # fmt: skip
    """ML-Net from top to bottom, every box with the shape (channels x height x width) it gives.

    ``photo`` is (height, width), ``levels`` names the backbone's levels with their shapes, shallow
    to deep, ``channels`` are those of the encoding, ``prior`` the cells (rows, columns).
    """
    figure, axis = plt.subplots(figsize=(5, 6.8), layout="compressed")
    axis.set(xlim=(0, 12), ylim=(0, 14.8))
    axis.axis("off")
    tall, wide = next(iter(levels.values()))[1:]
    total = sum(shape[0] for shape in levels.values())

    def box(x: float, y: float, width: float, text: str, colour: int) -> None:
        face = sns.color_palette("pastel")[colour]
        style = {"boxstyle": "round,pad=0,rounding_size=0.2", "fc": face, "ec": "#444444"}
        axis.add_patch(FancyBboxPatch((x - width / 2, y - 0.7), width, 1.4, **style))
        axis.text(x, y, text, ha="center", va="center", fontsize=12, linespacing=1.25)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "lw": 1.6, "color": "#444444", "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", end, start, arrowprops=style)

    box(2, 14, 3.6, f"photo\n3 × {photo[0]} × {photo[1]}", 7)
    places = np.linspace(2, 10, len(levels))
    arrow((2, 13.3), (2, 12.5))
    for x, (name, shape) in zip(places, levels.items(), strict=True):
        box(x, 11.8, 3.5, f"{name}\n" + " × ".join(map(str, shape)), 0)
        arrow((x, 11.1), (x, 10.3))
    for left, right in pairwise(places):
        arrow((left + 1.75, 11.8), (right - 1.75, 11.8))
    grid = f"{tall} × {wide}"
    box(6, 9.6, 11.5, f"all levels, concatenated\n{total} × {grid}", 0)
    steps = {
        f"3×3 convolution, ReLU\n{channels} × {grid}": (7.4, 2),
        f"1×1 convolution\n1 × {grid}, the raw map": (5.2, 2),
        f"ReLU, × (1 + prior), ReLU\n1 × {grid}": (3.0, 1),
        f"saliency map\n1 × {grid}": (0.8, 7),
    }
    for text, (y, colour) in steps.items():
        arrow((8.1, y + 1.5), (8.1, y + 0.7))
        box(8.1, y, 7.3, text, colour)
    box(2, 3.0, 3.5, f"learned prior\n{prior[0]} × {prior[1]} cells", 1)
    arrow((3.75, 3.0), (4.45, 3.0))
    return figure

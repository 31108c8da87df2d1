"""Figures. Every ``plot_*`` takes arrays and returns a Figure; none shows or computes scores."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlnet_utils.runtime import atomic_path

MAP_COLOURS = "magma"
BAND = 1 << 20  # pixels that are painted at a time
PALETTE = "deep"
TITLE_INCHES = 0.35  # of a picture, in a grid


def use_style() -> None:
    """The look shared by all notebooks; called once, in their setup cell."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE)
    # 9 inches fill nbviewer's column, and leave letters a phone can still show.
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 120, "axes.titlesize": "medium"})
    if "ipykernel" in sys.modules:
        # Photos as PNG would make the saved notebooks several MB; nbviewer and git dislike that.
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 88})


def overlay(photo: np.ndarray, density: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """A photo (H, W, 3) with its map (H, W) of any non-negative scale on top: (H, W, 3) uint8.

    ``strength`` is the map's opacity where it peaks, 0..1.
    """
    colour_map, peak = plt.get_cmap(MAP_COLOURS), max(float(density.max()), 1e-12)
    painted = np.empty((*density.shape, 3), np.uint8)
    band = max(1, BAND // density.shape[1])  # a photo of 100 megapixels would take 10 GB at once
    for first in range(0, len(density), band):
        rows = slice(first, first + band)
        scaled = density[rows] / peak
        colours = colour_map(scaled)[..., :3] * 255
        alpha = strength * np.sqrt(scaled)[..., None]  # the root shows the weaker regions too
        grey = photo[rows].mean(2, keepdims=True) * 0.4 + photo[rows] * 0.6
        painted[rows] = (grey * (1 - alpha) + colours * alpha).clip(0, 255)
    return painted


def plot_panels(rows: Sequence[Mapping[str, object]], width: float = 9.0) -> Figure:
    """Rows of pictures: each row maps a title to a photo (H, W, 3), a map (H, W) or
    ``(photo, points)`` for fixations on a photo. A key ``"label"`` names the row."""
    titles = [title for title in rows[0] if title != "label"]
    firsts = [row[titles[0]] for row in rows]  # rows may hold photos of different shapes
    shapes = [np.shape(first[0] if isinstance(first, tuple) else first) for first in firsts]
    heights = [width / len(titles) * shape[0] / shape[1] for shape in shapes]
    options = {"figsize": (width, sum(heights) + TITLE_INCHES), "height_ratios": heights}
    # Pictures have shapes of their own: no gaps between them.
    options |= {"squeeze": False, "layout": "compressed"}
    figure, axes = plt.subplots(len(rows), len(titles), **options)
    for line, row in zip(axes, rows, strict=True):
        for axis, title in zip(line, titles, strict=True):
            _draw(axis, row[title])
        line[0].set_ylabel(str(row.get("label", "")), fontsize="small")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    return figure


def _draw(axis: Axes, content: object) -> None:
    """A photo, a map, or a photo with fixations."""
    photo, points = content if isinstance(content, tuple) else (np.asarray(content), None)
    axis.imshow(photo, cmap=MAP_COLOURS)  # colours are those of maps; photos have their own
    axis.set(xticks=[], yticks=[], frame_on=False)
    axis.grid(False)
    if points is not None:
        style = {"s": 9, "c": "#ffd54a", "edgecolors": "black", "linewidths": 0.4}
        axis.scatter(points[:, 0], points[:, 1], **style)
        axis.set(xlim=(-0.5, photo.shape[1] - 0.5), ylim=(photo.shape[0] - 0.5, -0.5))


def plot_maps(
    maps: Mapping[str, np.ndarray], columns: int = 4, width: float = 9.0, diverging: bool = False
) -> Figure:
    """Titled maps or photos in a grid; ``diverging`` centres the colours of maps on zero."""
    columns = min(columns, len(maps))
    height, side = np.shape(next(iter(maps.values())))[:2]
    inches = width / columns * height / side + TITLE_INCHES
    figure, axes = _grid(len(maps), columns, width, inches, "compressed")
    for axis, (title, content) in zip(axes, maps.items(), strict=True):
        axis.axis("off")
        axis.set_title(title)
        content = np.asarray(content)
        image = axis.imshow(content, cmap=MAP_COLOURS)
        if diverging and content.ndim == 2:
            limit = max(float(np.abs(content).max()), 1e-12)
            image.set(cmap="RdBu_r", clim=(-limit, limit))
            figure.colorbar(image, ax=axis, shrink=0.7, pad=0.02)
    return figure


def _grid(
    count: int, columns: int, width: float, height: float, layout: str, sharey: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with ``count`` panels in so many columns; ``height`` is that of a row, in inches."""
    rows = -(-count // columns)
    options = {"figsize": (width, height * rows), "layout": layout, "sharey": sharey}
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
    """A photo four times: as it is, under its saliency map, with likely first looks, and cropped.

    ``photo`` is (H, W, 3) uint8, ``density`` (H, W). A look is x, y, share and radius in pixels of
    the photo; the crop is left, top, right, bottom, the last two exclusive.
    """
    left, top, right, bottom = crop
    kept = density[top:bottom, left:right].sum() / density.sum()
    pictures = {
        "photo": photo,
        "saliency map": overlay(photo, density),
        "likely first looks": photo,
        f"crop with {kept:.0%} of the looks": photo[top:bottom, left:right],
    }
    height = 4.5 * photo.shape[0] / photo.shape[1] + TITLE_INCHES
    figure, axes = _grid(4, 2, 9.0, height, layout="compressed")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        _draw(axis, picture)
        axis.set_title(title)
    for x, y, share, radius in looks:
        for colour, width in (("black", 3), ("#ffd54a", 1.5)):
            circle = plt.Circle((x, y), radius, fill=False, color=colour, linewidth=width)
            axes[2].add_patch(circle)
        label = axes[2].text(x, y, f"{share:.0%}", ha="center", va="center", color="white")
        label.set_bbox({"facecolor": "black", "alpha": 0.6, "pad": 1.5, "linewidth": 0})
    return figure


def plot_history(log: pd.DataFrame) -> Figure:
    """Learning curves: losses with the best epoch marked, validation scores, learning rate."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="tight")
    best = log.loc[log["val_loss"].idxmin(), "epoch"]
    twin, dots = axes[1].twinx(), {"marker": "o", "ms": 3}
    axes[0].plot(log["epoch"], log["train_loss"], **dots, label="train")
    axes[0].plot(log["epoch"], log["val_loss"], **dots, label="validation")
    axes[0].axvline(best, color="grey", lw=1, ls=":", label=f"best: epoch {best:.0f}")
    axes[0].set(title="Loss")
    axes[0].legend(fontsize="small")
    lines = axes[1].plot(log["epoch"], log["val_cc"], **dots, color="C2", label="CC")
    lines += twin.plot(log["epoch"], log["val_nss"], marker="s", ms=3, color="C3", label="NSS")
    axes[1].set(title="Validation scores", ylabel="CC")
    axes[1].legend(handles=lines, fontsize="small", loc="lower right")
    twin.set_ylabel("NSS")
    twin.grid(False)
    axes[2].plot(log["epoch"], log["lr"], color="C4")
    axes[2].set(title="Learning rate", yscale="log")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def plot_scores(
    table: pd.DataFrame, metrics: Sequence[str], columns: int = 4, zero: bool = False
) -> Figure:
    """Scores with intervals: a panel per metric, a row in it per model; ``zero`` marks zero.

    ``table`` has columns ``model``, ``metric``, ``mean``, ``low``, ``high``.
    """
    models = list(table["model"].unique())
    if not models:
        figure, axis = plt.subplots(figsize=(9, 0.6))
        axis.text(0.5, 0.5, "no scores", ha="center", va="center")
        axis.axis("off")
        return figure
    figure, axes = _grid(len(metrics), columns, 9, 0.3 * len(models) + 0.8, "tight", sharey=True)
    colours = dict(zip(models, sns.color_palette(PALETTE, len(models)), strict=True))
    for axis, metric in zip(axes, metrics, strict=True):
        part = table[table["metric"] == metric].set_index("model").reindex(models)
        axis.margins(x=0.1)  # no dot on the frame
        axis.xaxis.set_major_locator(MaxNLocator(2))  # panels are narrow, and numbers can be long
        axis.tick_params(axis="x", labelsize="small")
        if zero:
            axis.axvline(0, color="black", lw=1)
        for y, (model, row) in enumerate(part.iterrows()):
            if np.isfinite(row["mean"]):
                axis.plot([row["low"], row["high"]], [y, y], color=colours[model], lw=2.5)
                axis.plot(row["mean"], y, "o", color=colours[model], ms=6)
        axis.set(title=_title(metric), yticks=range(len(models)), yticklabels=models)
        axis.set_ylim(len(models) - 0.5, -0.5)
    return figure


def plot_distributions(scores: pd.DataFrame, metrics: Sequence[str], columns: int = 4) -> Figure:
    """Per-photo scores of each model as violins, a panel per metric.

    ``scores`` has a row per photo and model, with ``model`` and a column per metric.
    """
    figure, axes = _grid(len(metrics), columns, 9, 2.6, "tight", sharey=True)
    models = list(scores["model"].unique())  # one colour each, where some are missing too
    colours = dict(zip(models, sns.color_palette(PALETTE, len(models)), strict=True))
    for axis, metric in zip(axes, metrics, strict=True):
        finite = scores[np.isfinite(scores[metric])]
        sns.violinplot(
            finite, x=metric, y="model", hue="model", ax=axis, cut=0, inner="quart", linewidth=0.8,
            order=models, hue_order=models, palette=colours, legend=False,
        )  # fmt: skip
        axis.set(title=_title(metric), xlabel="", ylabel="")
    return figure


def plot_amounts(table: pd.DataFrame, metrics: Sequence[str], amount: str) -> Figure:
    """Scores against an amount of data: every seed as a point, their mean as a line.

    ``table`` has a row per training, with a column per metric and the column ``amount``.
    """
    figure, axes = plt.subplots(1, len(metrics), figsize=(11, 2.8), squeeze=False, layout="tight")
    for axis, metric in zip(axes.flat, metrics, strict=True):
        sns.lineplot(table, x=amount, y=metric, ax=axis, errorbar=None, color="C0")
        sns.scatterplot(table, x=amount, y=metric, ax=axis, color="C0", s=22)
        axis.set(title=metric, ylabel="", xscale="log")
        ticks = sorted(table[amount].unique())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    return figure


def _title(metric: str) -> str:
    """Title of a panel; only KL is a distance."""
    return f"{metric} (less is better)" if metric == "KL" else metric


def plot_fixation_statistics(
    per_photo: Sequence[int], per_observer: Sequence[float], saccades: Sequence[float], unit: str
) -> Figure:
    """Histograms: fixations per photo, per observer and photo, and saccade amplitude in ``unit``.

    Saccades are distances between consecutive fixations of an observer. What is unknown is empty.
    """
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="tight")
    panels = (
        (per_photo, "Fixations per photo", "fixations", "no photos"),
        (per_observer, "Fixations per observer and photo", "fixations", "observers unknown"),
        (saccades, "Saccade amplitude", unit, "viewing order unknown"),
    )
    for axis, (values, title, label, absent) in zip(axes, panels, strict=True):
        if len(values):
            sns.histplot(np.asarray(values), ax=axis, bins=30, edgecolor="white", linewidth=0.3)
            axis.margins(y=0.3)  # room for the legend above the bars
            median = np.median(values)
            axis.axvline(median, color="C3", lw=1.2, label=f"median {median:.3g}")
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, absent, ha="center", transform=axis.transAxes)
        axis.set(title=title, xlabel=label, ylabel="")
    return figure


def plot_changes(table: pd.DataFrame, reference: str, infinite: str) -> Figure:
    """A heat map of the relative change of each metric when a prediction is changed.

    ``table`` has a row per variant of the prediction, of which ``reference`` is the unchanged one,
    and a column per metric, larger is better; -inf counts as the worst change. The column
    ``infinite`` holds the number of photos with an infinite score: it stands in brackets under
    every infinite mean, and the column's name explains it.
    """
    photos, table = table[infinite], table.drop(columns=infinite)
    change = 100 * (table - table.loc[reference]) / table.loc[reference].abs()
    # Where the reference is infinite there is no relative change, but there is a score to write.
    change = change.fillna(0).where(table.notna())
    figure, axis = plt.subplots(figsize=(8.5, 0.42 * len(table) + 1.2), layout="tight")
    labels = table.map(lambda value: f"{value:.3f}").where(
        ~np.isinf(table), table.astype(str).add(photos.map("\n({})".format), axis=0)
    )
    sns.heatmap(
        change.clip(-100, 100), annot=labels, fmt="", cmap="RdBu", center=0, vmin=-60, vmax=60,
        ax=axis, linewidths=1, cbar_kws={"label": f"change against {reference} (%)"},
    )  # fmt: skip
    note = f"in brackets: {infinite}" if np.isinf(table).any(axis=None) else ""
    axis.set(xlabel=note, ylabel="")
    return figure


def plot_life(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """The share of the map above zero, and the loss, against updates: a line per training.

    Tables have columns ``update``, ``above zero`` (0..1) and ``loss``.
    """
    figure, axes = _grid(2, 2, 9, 3.4, "constrained")
    for name, curve in curves.items():
        axes[0].plot(curve["update"], 100 * curve["above zero"], label=name, lw=2)
        axes[1].plot(curve["update"], curve["loss"], lw=1.5)
    axes[0].set(title="Share of the map above zero", ylabel="%", ylim=(-3, 103))
    axes[1].set(title="Loss of the update's photos", ylabel="ML-Net's loss")
    for axis in axes:
        axis.set_xlabel("update")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_ladder(start: Mapping[str, float], steps: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """A waterfall: from the scores of the first rung by the difference of every further one.

    ``start`` holds the first rung's mean of each metric; ``steps`` has columns ``model``,
    ``metric``, ``mean``, ``low``, ``high`` and ``side`` (0: the sign is not clear, drawn grey).
    """
    rungs = list(steps["model"].unique())
    figure, axes = _grid(len(metrics), len(metrics), 9, 0.34 * len(rungs) + 1, "tight", sharey=True)
    better, worse, unclear = sns.color_palette("colorblind")[0], "#b5442e", "0.65"
    for axis, metric in zip(axes, metrics, strict=True):
        part = steps[steps["metric"] == metric].set_index("model").loc[rungs]
        ends = start[metric] + part["mean"].cumsum()
        begins = ends - part["mean"]
        colours = [{1: better, -1: worse}.get(side, unclear) for side in part["side"]]
        axis.barh(range(len(rungs)), part["mean"], left=begins, color=colours, height=0.6)
        spread = [part["mean"] - part["low"], part["high"] - part["mean"]]
        axis.errorbar(
            ends, range(len(rungs)), xerr=spread, fmt="none", ecolor="black", elinewidth=1
        )
        axis.axvline(start[metric], color="grey", lw=1, ls=":")
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.set(title=_title(metric), yticks=range(len(rungs)), yticklabels=rungs)
        axis.set_ylim(len(rungs) - 0.5, -0.5)
    return figure


def show(alt: str) -> None:
    """Display the latest figure in a notebook, described for those who cannot see it.

    nbviewer (nbconvert's ``classic`` template) writes the output's ``alt`` into the image.
    """
    from IPython.display import display

    figure = plt.gcf()
    display(figure, metadata={"alt": alt})
    plt.close(figure)  # or the inline backend shows it again


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically, without the metadata that differs between machines."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", metadata={"Software": None})

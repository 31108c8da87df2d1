"""Stimuli made from a seed, with a KNOWN fixation density: the embedded sample.

A scene is a textured ground with many similar items. A few differ in colour, orientation, size or
luminance, and "pop out" (Treisman & Gelade 1980; Itti, Koch & Niebur 1998). The density is a
mixture of Gaussians, on every odd item, weighted by its difference, and weakly on the other items,
of a centre bias, and of a uniform floor.

Simulated observers differ in their mixture weights, drawn around the common ones, and in a constant
offset of their gaze, to which scatter is added. Both deviations have the population values as their
mean, and points that leave the photo are folded back. The density is therefore the *exact* expected
distribution of fixations, and the best attainable value of every metric is known.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ImageColor import getrgb
from scipy.special import ndtr

from mlnet_utils.data.geometry import pixel_indices
from mlnet_utils.data.photos import SPLITS, Photo
from mlnet_utils.runtime import atomic_path, progress

HEIGHT, WIDTH = 240, 320
OBSERVERS, FIXATIONS = 15, 10  # per photo; fixations per observer on average
KINDS = ("colour", "orientation", "size", "luminance")
SHAPES = ("disc", "ring", "bar", "leaf", "triangle", "flower")

# Mixture: odd items, all other items together, centre bias, uniform.
SHARES = np.array([0.68, 0.08, 0.18, 0.06])
SHARE_CONCENTRATION = 25.0  # observers' own shares: Dirichlet around SHARES; larger = more alike
ITEM_SPREAD = 14.0  # pixels: deviation of gaze around an item, of which
OFFSET = 4.0  # pixels: the constant offset of one observer
CENTRE_SPREAD = (0.22, 0.19)  # of width and height

# (ground, items...): colours that go together; the odd item takes another of the same palette.
PALETTES = (
    ("#f3ede2", "#5b8e7d", "#d1495b", "#edae49", "#30638e"),
    ("#e9eef2", "#33658a", "#f26419", "#86bbd8", "#758e4f"),
    ("#1f2a38", "#6c8ead", "#ffb563", "#f05d5e", "#a0ddb5"),
    ("#f6e8df", "#7d4f50", "#4f9d9d", "#cc8b86", "#e3b23c"),
    ("#2b2d42", "#8d99ae", "#ef476f", "#ffd166", "#06d6a0"),
    ("#e4e9dc", "#606c38", "#bc6c25", "#457b9d", "#dda15e"),
    ("#fbf3e4", "#3d5a80", "#ee6c4d", "#98c1d9", "#7a9e7e"),
    ("#233d3b", "#7fb7a3", "#f4a259", "#f4e285", "#bc4b51"),
)


@dataclass(frozen=True)
class Stimulus:
    """A scene and everything that is known of it."""

    image: np.ndarray  # (H, W, 3) uint8
    density: np.ndarray  # (H, W) float64, positive, sums to 1: expected distribution of fixations
    centres: np.ndarray  # (K, 2) x, y of all items, odd items first
    salience: np.ndarray  # (K,) share of each item in the density's item terms
    n_odd: int


def make_stimulus(rng: np.random.Generator) -> Stimulus:
    """Draw a scene of 240x320 pixels; all its randomness comes from ``rng``."""
    kind = str(rng.choice(KINDS))
    palette = np.array([getrgb(code) for code in PALETTES[rng.integers(len(PALETTES))]]) / 255
    ground = palette[0]
    centres, cell = _place_items(rng)
    n_odd = int(rng.integers(1, 4))
    strength = rng.uniform(0.7, 1.0, n_odd)

    canvas = _ground(rng, ground)
    own, other = rng.choice(np.arange(1, len(palette)), 2, replace=False)
    shape = str(rng.choice(("bar", "leaf") if kind == "orientation" else SHAPES))
    common_angle = rng.uniform(0, np.pi)
    for i, centre in enumerate(centres):
        colour = palette[own] * rng.uniform(0.95, 1.05)
        size = cell * 0.30 * rng.uniform(0.92, 1.08)
        angle = common_angle + rng.normal(0, 0.08)
        if i >= n_odd:
            if kind == "luminance":  # the others stay close to the ground, whatever the palette
                colour = 0.45 * colour + 0.55 * ground
        elif kind == "colour":
            colour = (1 - strength[i]) * colour + strength[i] * palette[other]
        elif kind == "orientation":
            angle += strength[i] * np.pi / 2
        elif kind == "size":
            size *= 1 + 0.55 * strength[i]
        else:  # darker on light grounds, lighter on dark grounds
            away = 0.0 if ground.mean() > 0.5 else 1.0
            colour = (1 - 0.75 * strength[i]) * colour + 0.75 * strength[i] * away
        _draw(canvas, centre, shape, colour, size, angle)
    grain = rng.normal(0, 0.012, (HEIGHT, WIDTH, 1))
    image = np.round((canvas + grain).clip(0, 1) * 255).astype(np.uint8)

    others = len(centres) - n_odd
    odd_salience = SHARES[0] * strength / strength.sum()
    salience = np.concatenate([odd_salience, np.full(others, SHARES[1] / others)])
    return Stimulus(image, density_of(centres, salience), centres, salience, n_odd)


def draw_fixations(
    stimulus: Stimulus, rng: np.random.Generator, observers: int = OBSERVERS
) -> tuple[np.ndarray, np.ndarray]:
    """Let simulated observers look: (N, 2) float32 x, y inside the photo, (N,) int16 observers."""
    size = np.array([WIDTH, HEIGHT])
    item_share = stimulus.salience / stimulus.salience.sum()
    weights = np.where(np.arange(len(item_share)) < stimulus.n_odd, item_share, 0)
    rest = item_share - weights
    points, who = [], []
    for observer in range(observers):
        shares = rng.dirichlet(SHARE_CONCENTRATION * SHARES)
        offset = rng.normal(0, OFFSET, 2)
        count = 1 + rng.poisson(FIXATIONS - 1)
        source = rng.choice(3, count, p=[shares[0] + shares[1], shares[2], shares[3]])
        # An observer's share of odd items among items follows from the same draw.
        odd = rng.random(count) < shares[0] / (shares[0] + shares[1])
        item = np.where(
            odd,
            rng.choice(len(weights), count, p=weights / weights.sum()),
            rng.choice(len(rest), count, p=rest / rest.sum()),
        )
        scatter = rng.normal(0, np.sqrt(ITEM_SPREAD**2 - OFFSET**2), (count, 2))
        at_item = stimulus.centres[item] + offset + scatter
        at_centre = (size - 1) / 2 + rng.normal(0, 1, (count, 2)) * (CENTRE_SPREAD * size)
        anywhere = rng.uniform(0, 1, (count, 2)) * size - 0.5
        points.append(_fold(np.choose(source[:, None], (at_item, at_centre, anywhere))))
        who.append(np.full(count, observer, np.int16))
    return np.concatenate(points), np.concatenate(who)


def write_sample(folder: str | Path, counts: dict[str, int], seed: int = 2016) -> list[Photo]:
    """Make the sample: ``folder/images/*.png`` and the true ``folder/densities/*.npz``.

    ``counts`` are photos per split, each with its record in the result: fixations, observers, the
    path of the true density. The scene with a given seed, split and number is the same whatever
    else is made. Existing files are replaced, each at once: a training may be reading them.
    """
    folder = Path(folder)
    for name in ("images", "densities"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = [(split, number) for split in counts for number in range(counts[split])]
    photos = []
    for split, number in progress(jobs, "making the sample", unit="photo"):
        rng = np.random.default_rng([seed + 1000 * SPLITS.index(split), number])
        stimulus = make_stimulus(rng)
        points, observers = draw_fixations(stimulus, rng)
        stem = f"{split}_{number:04d}"
        image, density = f"images/{stem}.png", f"densities/{stem}.npz"
        # Not lasting, in a third of the time: the index that declares them complete comes last.
        with atomic_path(folder / image, lasting=False) as temporary:
            # Compressing harder would save little.
            Image.fromarray(stimulus.image).save(temporary, compress_level=1)
        with atomic_path(folder / density, lasting=False) as temporary:
            np.savez(temporary, density=stimulus.density.astype(np.float32))
        photos.append(Photo(stem, image, WIDTH, HEIGHT, split, points, observers, density=density))
    return photos


# ---- the density -------------------------------------------------------------------------------
def density_of(centres: np.ndarray, salience: np.ndarray) -> np.ndarray:
    """(H, W) that sums to 1: the mixture, integrated over every pixel, folded at the border."""
    rows = np.stack([_folded_gaussian(y, ITEM_SPREAD, HEIGHT) for y in centres[:, 1]])
    columns = np.stack([_folded_gaussian(x, ITEM_SPREAD, WIDTH) for x in centres[:, 0]])
    items = (rows * salience[:, None]).T @ columns
    centre_columns, centre_rows = (
        _folded_gaussian((size - 1) / 2, spread * size, size)
        for size, spread in zip((WIDTH, HEIGHT), CENTRE_SPREAD, strict=True)
    )
    centre = SHARES[2] * np.outer(centre_rows, centre_columns)
    return items + centre + SHARES[3] / (HEIGHT * WIDTH)


def _folded_gaussian(mean: float, sigma: float, size: int) -> np.ndarray:
    """(size,) probability of each pixel for a Gaussian folded back at both borders."""
    total = np.zeros(size)
    for period in (-1, 0, 1):  # spreads are far below the size: one fold on each side is exact
        edges = np.arange(size + 1) - 0.5 + 2 * period * size
        total += np.diff(ndtr((edges - mean) / sigma))
        total += np.diff(ndtr((edges - (-1 - mean)) / sigma))  # the mirror image at -0.5
    return total / total.sum()


def _fold(points: np.ndarray) -> np.ndarray:
    """(N, 2) float32: points outside the photo reflected back at its border."""
    size = np.array([WIDTH, HEIGHT])
    position = np.mod(points + 0.5, 2 * size)
    position = np.where(position >= size, 2 * size - position, position)
    folded = (position - 0.5).astype(np.float32)
    # Rounding to float32 must not push a point on the border over it.
    return np.where(pixel_indices(folded) >= size, (size - 1).astype(np.float32), folded)


# ---- the picture -------------------------------------------------------------------------------
def _place_items(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """(K, 2) x, y on a jittered grid with gaps, in random order, and the grid's cell size."""
    rows = int(rng.integers(4, 7))
    cell = HEIGHT / rows
    columns = int(WIDTH // cell)
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    grid = np.stack([x.ravel(), y.ravel()], 1) + 0.5
    keep = rng.permutation(len(grid))[: max(8, int(len(grid) * rng.uniform(0.65, 0.95)))]
    jitter = rng.uniform(-0.16, 0.16, (len(keep), 2))
    left = (WIDTH - columns * cell) / 2
    return (grid[keep] + jitter) * cell + (left, 0.0), cell


def _smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """(H, W) value noise in about -1..1: random values on a coarse grid, smoothly interpolated."""
    result = rng.uniform(-1, 1, (cells + 2, cells + 2))
    for axis, size in enumerate((HEIGHT, WIDTH)):
        position = np.linspace(0, cells, size, endpoint=False)
        low = position.astype(int)
        t = position - low
        t = np.expand_dims(t * t * (3 - 2 * t), 1 - axis)
        a, b = np.take(result, low, axis), np.take(result, low + 1, axis)
        result = a + (b - a) * t
    return result


def _ground(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """(H, W, 3) float: paper with a soft gradient, a texture and a vignette."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    direction = rng.uniform(0, 2 * np.pi)
    along = np.cos(direction) * (x / WIDTH - 0.5) + np.sin(direction) * (y / HEIGHT - 0.5)
    shade = 0.05 * along + 0.035 * _smooth_noise(rng, 5)
    shade += 0.018 * _smooth_noise(rng, 40)
    texture = rng.integers(4)
    if texture == 1:  # woven stripes
        turn = rng.uniform(0, np.pi)
        across = np.cos(turn) * x + np.sin(turn) * y
        shade += 0.014 * np.sin(across * 2 * np.pi / rng.uniform(7, 14))
    elif texture == 2:  # dots
        step = rng.uniform(9, 15)
        dots = np.cos(2 * np.pi * x / step) * np.cos(2 * np.pi * y / step)
        shade -= 0.03 * np.clip((dots - 0.55) * 6, 0, 1)
    elif texture == 3:  # wood-like rings
        rings = _smooth_noise(rng, 3) * 5 + y / rng.uniform(18, 30)
        shade += 0.016 * np.sin(2 * np.pi * rings)
    vignette = 0.05 * (((x / WIDTH - 0.5) ** 2 + (y / HEIGHT - 0.5) ** 2) / 0.5)
    return colour + (shade - vignette)[..., None]


def _draw(
    canvas: np.ndarray, at: np.ndarray, shape: str, colour: np.ndarray, size: float, angle: float
) -> None:
    """Paint one antialiased item with a soft shadow and a little shading, in place."""
    reach = int(np.ceil(size * 1.7)) + 4
    x0, y0 = (np.round(at).astype(int) - reach).clip(0)
    x1, y1 = min(WIDTH, x0 + 2 * reach + 1), min(HEIGHT, y0 + 2 * reach + 1)
    y, x = np.mgrid[y0:y1, x0:x1].astype(float)
    x, y = x - at[0], y - at[1]
    patch = canvas[y0:y1, x0:x1]
    shadow = 0.16 * (0.5 - _distance(shape, x - 0.09 * size, y - 0.13 * size, size, angle) / 5)
    patch *= 1 - shadow.clip(0, 0.16)[..., None]
    cover = (0.5 - _distance(shape, x, y, size, angle)).clip(0, 1)[..., None]
    light = 1 + 0.10 * (-(x + 1.4 * y) / (2.4 * size)).clip(-1, 1)[..., None]
    patch += cover * ((colour * light).clip(0, 1) - patch)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, size: float, angle: float) -> np.ndarray:
    """Signed distance in pixels to a shape's outline (negative inside), about right near it."""
    u = np.cos(angle) * x + np.sin(angle) * y
    v = -np.sin(angle) * x + np.cos(angle) * y
    radius = np.hypot(u, v)
    if shape == "disc":
        return radius - size
    if shape == "ring":
        return np.abs(radius - 0.78 * size) - 0.24 * size
    if shape == "bar":
        return np.hypot(np.maximum(np.abs(u) - 0.95 * size, 0), v) - 0.33 * size
    if shape == "leaf":  # the intersection of two discs
        return np.hypot(u, np.abs(v) + 0.75 * size) - 1.42 * size
    if shape == "triangle":
        sides = [u * np.cos(t) + v * np.sin(t) for t in np.pi / 2 + 2 * np.pi / 3 * np.arange(3)]
        return np.maximum.reduce(sides) - 0.62 * size
    petals = 0.86 + 0.16 * np.cos(5 * np.arctan2(v, u))
    return radius - size * petals

"""First looks and crops on densities whose answer is known."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from miniatures import save_photo

from mlnet_utils.predict.looks import chosen_photos, crop_that_keeps, first_looks


def two_spots(scale=1):
    """(120, 160) times scale: 3/4 of the probability at (40, 30), the rest at (120, 90)."""
    y, x = np.mgrid[: 120 * scale, : 160 * scale] / scale
    places = ((40, 30), (120, 90))
    one, other = (np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 8) for cx, cy in places)
    return 0.75 * one / one.sum() + 0.25 * other / other.sum()


@pytest.mark.parametrize("scale", [1, 5])
def test_looks_are_found_in_order_with_their_shares(scale):
    looks = first_looks(two_spots(scale), count=2)
    places = [place / scale for look in looks for place in (look.x, look.y)]
    assert places == pytest.approx([40, 30, 120, 90], abs=1)
    assert [look.share for look in looks] == pytest.approx([0.75, 0.25], abs=0.01)


def test_no_pixel_counts_twice():
    density = np.random.default_rng(0).random((64, 80))
    looks = first_looks(density, count=40)
    shares = [look.share for look in looks]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1 + 1e-9


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1, 5])
def test_the_crop_keeps_its_share(share, scale):
    density = two_spots(scale)
    left, top, right, bottom = crop_that_keeps(density, share)
    assert density[top:bottom, left:right].sum() / density.sum() >= share - 2e-3
    if share == 0.5:  # one spot is enough
        assert right < 80 * scale
        assert bottom < 60 * scale


@pytest.mark.parametrize("shape", [(601, 800), (443, 700), (40, 3000)])
def test_no_row_or_column_is_lost_where_cells_are_no_whole_pixels(shape):
    last = np.zeros(shape)
    last[-1, -1] = 1
    for density in (last, last[::-1, ::-1]):
        left, top, right, bottom = crop_that_keeps(density)
        assert density[top:bottom, left:right].sum() == 1
    (look,) = first_looks(last, count=1)
    assert (look.y, look.x) == pytest.approx(np.subtract(shape, 1), abs=max(shape) / 320)


@pytest.mark.parametrize("call", [first_looks, crop_that_keeps])
@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.full((4, 4), -1.0), np.ones(4), [[np.nan]]])
def test_no_density_is_refused(call, bad):
    with pytest.raises(ValueError, match="density"):
        call(np.asarray(bad))
    for share in (0, 1.1):
        with pytest.raises(ValueError, match=f"share={share}"):
            crop_that_keeps(two_spots(), share)


def test_photos_are_chosen_by_path_folder_or_default_and_none_is_an_error(tmp_path):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        save_photo(tmp_path / name, 40, 32)
    (tmp_path / "notes.txt").write_text("no photo")
    assert list(chosen_photos(str(tmp_path))) == ["a", "b"]
    assert chosen_photos(str(tmp_path / "b.png"))["b"].shape == (32, 40, 3)
    assert chosen_photos()["astronaut"].shape == (512, 512, 3)
    (tmp_path / "empty").mkdir()
    for place in ("missing.jpg", "empty"):
        with pytest.raises(FileNotFoundError, match=place):
            chosen_photos(str(tmp_path / place))


def test_the_example_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"'skimage.*\[notebooks\]"):
        chosen_photos()


def test_photos_of_one_stem_are_kept_apart_and_a_broken_one_stops_nothing(tmp_path):
    for number, name in enumerate(("x.jpg", "x.png", "sub/x.png")):
        save_photo(tmp_path / name, 40 + number, 32)
    (tmp_path / "broken.jpg").write_text("no photo")
    with pytest.warns(UserWarning, match=r"left out: .*broken\.jpg"):
        photos = chosen_photos(str(tmp_path))
    widths = {name: pixels.shape[1] for name, pixels in photos.items()}
    assert widths == {"x.jpg": 40, "x.png": 41, "sub/x": 42}


@pytest.mark.parametrize("uploaded", [("mine.png",), ()])
def test_colab_shows_a_button_where_no_photo_is_named(monkeypatch, tmp_path, uploaded):
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path / "mine.png", 40, 32)  # Colab writes into the working folder
    colab = ModuleType("google.colab")
    colab.files = SimpleNamespace(upload=lambda: dict.fromkeys(uploaded, b""))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    ((name, photo),) = chosen_photos(example="coffee").items()
    expected = ("mine", (32, 40, 3)) if uploaded else ("coffee", (400, 600, 3))
    assert (name, photo.shape) == expected

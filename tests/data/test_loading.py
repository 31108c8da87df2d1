"""Loading depends on nothing but keys: items, caches, and the order of photos."""

from dataclasses import replace

import pytest
import torch
from conftest import SIGMA, tiny_config

from mlnet_utils.data.geometry import Letterbox, density_on_grid
from mlnet_utils.data.loading import EpochSampler, SaliencyDataset
from mlnet_utils.data.photos import Prepared


# ---- items -------------------------------------------------------------------------------------
def make_dataset(tiny_photos, augment=False, **overrides):
    photos, root = tiny_photos
    prepared = Prepared(root, photos, {"root": ".", "sigma_px": SIGMA})
    return SaliencyDataset(prepared, "train", tiny_config(**overrides), augment)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_an_item_is_the_letterboxed_photo_with_its_ground_truth(tiny_photos):
    item = make_dataset(tiny_photos)[3]
    photo = tiny_photos[0][3]
    assert (item["image"].shape, item["image"].dtype) == ((3, 32, 40), torch.uint8)
    assert item["fixations"].shape == (1, 4, 5)
    assert item["fixations"].sum().item() == len(photo.fixations)
    assert int(item["index"]) == 3
    box = Letterbox(photo.height, photo.width, 32, 40)
    expected = density_on_grid(photo.fixations, box, (4, 5), SIGMA)
    torch.testing.assert_close(item["density"], expected.float()[None])
    # The disc is brighter than all around it, and the fixations are on it.
    brightest = item["image"].float().sum(0).reshape(4, 8, 5, 8).amax((1, 3)).argmax()
    assert item["fixations"].flatten()[brightest] > 0


def test_flips_mirror_everything_together(tiny_photos):
    plain = make_dataset(tiny_photos)[(0, 3)]
    flipped = make_dataset(tiny_photos, augment=True, flip=1.0)[(0, 3)]
    for key in ("image", "density", "fixations"):
        assert torch.equal(flipped[key], plain[key].flip(-1))
        assert not torch.equal(flipped[key], plain[key])


def test_augmentation_depends_on_seed_epoch_and_photo_only_and_on_no_cache(tiny_photos):
    options = {"augment": True, "flip": 0.5}
    first, second = (make_dataset(tiny_photos, **options) for _ in range(2))
    keys = [(epoch, index) for epoch in (0, 1) for index in range(10)]
    ahead = {key: first[key] for key in keys}
    cached = make_dataset(tiny_photos, **options, cache=True)
    for key in reversed(keys):  # in another order
        assert same(ahead[key], second[key])
        assert same(ahead[key], cached[key])
    assert len(cached.images) == len(cached.truths) == 10
    assert all(same(ahead[key], cached[key]) for key in keys)
    assert any(not same(ahead[0, index], ahead[1, index]) for index in range(10))
    other = make_dataset(tiny_photos, **options, seed=1)
    assert any(not same(ahead[key], other[key]) for key in keys)


def test_a_photo_that_changed_size_is_an_error(tiny_photos):
    dataset = make_dataset(tiny_photos)
    dataset.photos = [replace(dataset.photos[0], width=99)]
    with pytest.raises(ValueError, match=r"train0\.png .*61x75.* 99x75"):
        dataset[0]


# ---- order -------------------------------------------------------------------------------------
def indices(batches):
    return [[index for _, index in batch] for batch in batches]


def test_an_epoch_is_a_fixed_permutation_that_can_be_entered_at_any_batch():
    sampler = EpochSampler(10, 4, 0)
    assert indices(sampler) == [[4, 6, 2, 7], [3, 5, 9, 0], [8, 1]]
    sampler.epoch = 1
    whole = list(sampler)
    assert indices(whole) == [[9, 1, 3, 8], [7, 6, 0, 4], [2, 5]]
    assert whole[0][0] == (1, 9)  # keys carry the epoch
    for first in range(4):
        sampler.first_batch = first
        assert len(sampler) == 3 - first
        assert list(sampler) == whole[first:]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_same_global_batches(world):
    whole = indices(EpochSampler(10, 4, 0))
    shares = [EpochSampler(10, 4, 0, rank, world) for rank in range(world)]
    for number, batch in enumerate(whole):
        own = [list(share)[number] for share in shares]
        sizes = [share.batch_sizes(number) for share in shares]
        assert all(total == len(batch) for _, total in sizes)
        used = [i for keys, (n, _) in zip(own, sizes, strict=True) for _, i in keys[:n]]
        assert sorted(used) == sorted(batch)
        # A process without a share of the last batch of 2 still loads a photo, to step along.
        assert all(len(keys) == max(n, 1) for keys, (n, _) in zip(own, sizes, strict=True))

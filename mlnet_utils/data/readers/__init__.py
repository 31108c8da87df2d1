"""One file per dataset: its address, checksum, layout, reader and citation together.

``spec`` has the form of these entries, ``files`` the shared parts of readers. Download and
unpacking live in ``data.download``; splits and preparation in the room above.
"""

from mlnet_utils.data.readers import cat2000, eyecrowd, mit1003, osie, own, salicon
from mlnet_utils.data.readers.spec import DatasetSpec

SYNTHETIC = DatasetSpec(
    "synthetic", "Synthetic stimuli", "synthetic", sigma=8.0, by_hand="`prepare` makes it"
)
DATASETS = {
    spec.name: spec
    for spec in (
        *(SYNTHETIC, osie.SPEC, eyecrowd.SPEC, eyecrowd.WITH_OSIE, *salicon.SPECS),
        *(mit1003.SPEC, cat2000.SPEC, own.SPEC),
    )
}
# Test photos of two benchmarks, for submissions: their fixations are secret, so nothing reads them.
TEST_PHOTOS = {spec.name: spec for spec in (mit1003.MIT300, cat2000.TEST)}


def dataset_spec(name: str) -> DatasetSpec:
    """Look up a dataset by name; the ValueError for an unknown name lists them."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: use one of {', '.join(DATASETS)}")
    return DATASETS[name]

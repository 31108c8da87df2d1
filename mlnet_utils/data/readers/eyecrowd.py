"""EyeCrowd, "Saliency in Crowd" (Jiang, Xu, Zhao; 2014): 500 photos of crowds, 16 observers.

Photos of 1024x768: ``data/stimuli/001.jpg .. 500.jpg`` and ``data/eye/fixations.mat``, as in OSIE.
"""

from pathlib import Path

from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers.osie import read_stimuli_and_cells
from mlnet_utils.data.readers.spec import Archive, DatasetSpec


def read_eyecrowd(root: str | Path) -> list[Photo]:
    """EyeCrowd in its original layout, see :func:`~.osie.read_stimuli_and_cells`."""
    return read_stimuli_and_cells(root, "eyecrowd", (1024, 768))


SPEC = DatasetSpec(
    name="eyecrowd",
    title="EyeCrowd",
    sigma=26.0,  # the authors'
    read=read_eyecrowd,
    folder="eyecrowd",
    val=36,  # the shares of OSIE's rule: 500 * 50 / 700 = 35.7
    test=107,  # 500 * 150 / 700 = 107.1
    archives=(
        Archive(
            name="eyecrowd.zip",
            into="data",
            holds=("stimuli", "eye/fixations.mat"),
            url="https://github.com/NUS-VIP/saliency-in-crowd/archive/master.zip",
            published="saliency-in-crowd-master.zip",
            known={
                "eye/fixations.mat": (
                    "ecf99dcbb4d44c3caa5740361461f6b5775da978f32a87d1cd801c202c3beab6"
                )
            },
        ),
    ),
    citation="M. Jiang, J. Xu, Q. Zhao. Saliency in Crowd. ECCV 2014.",
)

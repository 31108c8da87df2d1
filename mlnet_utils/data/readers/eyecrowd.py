"""EyeCrowd, "Saliency in Crowd" (Jiang, Xu, Zhao; 2014): 500 photos of crowds, 16 observers.

Photos of 1024x768: ``data/stimuli/001.jpg .. 500.jpg`` and ``data/eye/fixations.mat``, as in OSIE.
"""

from functools import partial

from mlnet_utils.data.readers.osie import github_archive, read_osie
from mlnet_utils.data.readers.spec import DatasetSpec

_FIXATIONS = "ecf99dcbb4d44c3caa5740361461f6b5775da978f32a87d1cd801c202c3beab6"
SPEC = DatasetSpec(
    name="eyecrowd",
    title="EyeCrowd",
    sigma=26.0,  # the authors'
    read=partial(read_osie, dataset="eyecrowd", size=(1024, 768)),
    folder="eyecrowd",
    val=50,
    test=100,
    archives=(github_archive("eyecrowd", "saliency-in-crowd", _FIXATIONS),),
    citation="M. Jiang, J. Xu, Q. Zhao. Saliency in Crowd. ECCV 2014.",
)
# A network of both is comparable with that of OSIE alone: validation and test are OSIE's.
WITH_OSIE = DatasetSpec(
    name="osie+eyecrowd",
    title="OSIE and EyeCrowd",
    sigma=24.0,  # of OSIE's photos; EyeCrowd's keep their own
    folder=".",
    joins=("osie", "eyecrowd"),
    by_hand="download osie and eyecrowd",
)

"""CAT2000 (Borji and Itti, 2015): 2000 photos of 1920x1080, 18 observers, 5 s of free viewing.

``trainSet/{Stimuli,FIXATIONLOCS}/<category>/<number>``, 20 categories of 100.
"""

from pathlib import Path

from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers import files
from mlnet_utils.data.readers.spec import Archive, DatasetSpec
from mlnet_utils.runtime import progress

_ADDRESS = "http://saliency.mit.edu"
_CITATION = (
    "A. Borji, L. Itti. CAT2000: A Large Scale Fixation Dataset for Boosting Saliency Research. "
    "arXiv:1505.03581, 2015."
)


def read_cat2000(root: str | Path) -> list[Photo]:
    """CAT2000's training set in its original layout.

    Numbers repeat across categories, so the stem is ``<category>_<number>``. ``fixLocs`` marks
    fixated pixels; observers are only in ``allFixData.mat``, an object that only MATLAB reads.
    A FileNotFoundError where a part of the layout is missing; a ValueError where photos and maps do
    not pair, or are damaged or of another size.
    """
    root = Path(root)
    stimuli = files.need(root / "trainSet" / "Stimuli", "cat2000")
    located = files.need(root / "trainSet" / "FIXATIONLOCS", "cat2000")
    photos = []
    categories, maps = (
        [path.name for path in files.folders_in(folder)] for folder in (stimuli, located)
    )
    files.check_pairs("cat2000", f"categories in {stimuli}", categories, f"in {located}", maps)
    for category in progress(categories, "reading cat2000", unit="category"):
        # Not recursive: some packings keep saliency maps in a folder Output among the stimuli.
        paths = files.by_stem(files.directly_in(stimuli / category, ".jpg"), "cat2000")
        points = files.by_stem(files.directly_in(located / category, ".mat"), "cat2000")
        files.check_pairs(f"cat2000 {category}", "photos", paths, "fixation files", points)
        for stem, file in paths.items():
            size = files.photo_size(file)
            marked = files.fixated_pixels(points[stem], size, "fixLocs")
            image = file.relative_to(root).as_posix()
            photos.append(Photo.from_points(f"{category}_{stem}", image, size, marked))
    return files.check_looked_at("cat2000", photos)


SPEC = DatasetSpec(
    name="cat2000",
    title="CAT2000",
    sigma=40.0,
    read=read_cat2000,
    folder="cat2000",
    val=200,
    test=400,
    archives=(
        Archive.at(
            _ADDRESS, "trainSet", ("Stimuli", "FIXATIONLOCS"), "56ad5c77e6c8f72ed9ef2901628d6e48"
        ),
    ),
    citation=_CITATION,
)
TEST = DatasetSpec(
    name="cat2000-test",
    title="CAT2000, test photos",
    folder="cat2000",
    archives=(Archive.at(_ADDRESS, "testSet", ("Stimuli",), "903ec668df2e5a8470aef9d8654e7985"),),
    citation=_CITATION,
)

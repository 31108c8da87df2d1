"""Where the datasets come from: archives, addresses, checksums.

Addresses, ids and MD5 sums are those that the sources, pysaliency and the datasets' users publish.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlnet_utils.data.archives import Limits


@dataclass(frozen=True)
class Archive:
    """One file of a dataset, and the folder that it becomes.

    Checksums and sizes are those that the source, or a project that uses it, publishes. Where
    there is none, the SHA-256 of the first download is recorded and verified ever after.
    """

    name: str  # under <folder>/archives
    into: str  # the dataset's folder that it becomes
    holds: tuple[str, ...]  # what that folder must contain
    url: str = ""
    drive: str = ""  # id of a file on Google Drive
    published: str = ""  # its name at the source, where that differs
    md5: str = ""
    sha256: str = ""
    size: int = 0  # bytes
    about: int = 0  # bytes, roughly: of a file on Google Drive, to see whether the disk has room
    known: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of files inside, by path

    @property
    def names(self) -> set[str]:
        """File names under which a user may hand it over."""
        return {self.name, self.published or self.name}

    @property
    def page(self) -> str:
        """The address to open in a browser."""
        return f"https://drive.google.com/file/d/{self.drive}/view" if self.drive else self.url


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from. Without archives it is the user's own to place."""

    folder: str  # below the data root
    archives: tuple[Archive, ...] = ()
    instructions: str = ""
    limits: Limits = field(default_factory=Limits)


# ---- the sources -------------------------------------------------------------------------------
_SALICON_IMAGES = Archive(
    "images.zip",
    "images",
    ("train", "val", "test"),
    drive="1g8j-hTT-51IG1UFwP0xTGhLdgIUCW5e5",
    md5="eb2a1bb706633d1b31fc2e01422c5757",
    about=3_000_000_000,  # salicon.net says 3.0G
)
_OSIE = "https://github.com/NUS-VIP/predicting-human-gaze-beyond-pixels"
_OSIE_FIXATIONS = "2aab9133a407e4eff3f57ab5799872b162dbc77ca462c0391762eb5e67deadb9"
_JUDD = "https://people.csail.mit.edu/tjudd/WherePeopleLook/"
_FIRST = "i05june05_static_street_boston_p1010764"  # a photo of MIT1003

SOURCES = {
    # The photos are the same in both editions; fixations and maps are not.
    "salicon-2017": Source(
        "salicon",
        (
            Archive(
                "fixations-2017.zip",
                "fixations-2017",
                ("train", "val"),
                drive="1P-jeZXCsjoKO79OhFUgnj6FGcyvmLDPj",
                published="fixations.zip",
                md5="462b70f4f9e8ea446ac628e46cea8d3d",
            ),
            Archive(
                "maps-2017.zip",
                "maps-2017",
                ("train", "val"),
                drive="1PnO7szbdub1559LfjYHMy65EDC4VhJC8",
                published="maps.zip",
                about=400_000_000,
            ),
            _SALICON_IMAGES,
        ),
    ),
    "salicon-2015": Source(
        "salicon",
        (
            Archive(
                "fixations-2015.zip",
                "fixations-2015",
                ("train", "val"),
                drive="1WVEiXba-I4GN33f0uUl4KhaN1rK7qzs6",
                published="fixations.zip",
                md5="9a22db9d718200fb90252e5010c004c4",
            ),
            _SALICON_IMAGES,
        ),
    ),
    "salicon-json": Source(
        "salicon_examples",
        instructions="place annotations/fixations_<split>.json and the photos below images/",
    ),
    "folder": Source(
        "folder",
        instructions="place images/ and fixations.csv, fixation_maps/ or density_maps/",
    ),
    "osie": Source(
        "osie",
        (
            # GitHub packs a branch anew at any time: the fixations' checksum holds, not the zip's.
            Archive(
                "osie.zip",
                "data",
                ("stimuli", "eye/fixations.mat"),
                url=f"{_OSIE}/archive/master.zip",
                published="predicting-human-gaze-beyond-pixels-master.zip",
                known={"eye/fixations.mat": _OSIE_FIXATIONS},
            ),
        ),
    ),
    "mit1003": Source(
        "mit1003",
        (
            Archive(
                "ALLSTIMULI.zip",
                "ALLSTIMULI",
                (f"{_FIRST}.jpeg",),
                url=f"{_JUDD}ALLSTIMULI.zip",
                md5="0d7df8b954ecba69b6796e77b9afe4b6",
            ),
            Archive(
                "DATA.zip",
                "DATA",
                ("ajs", "hp"),
                url=f"{_JUDD}DATA.zip",
                md5="ea19d74ad0a0144428c53e9d75c2d71c",
            ),
            Archive(
                "ALLFIXATIONMAPS.zip",
                "ALLFIXATIONMAPS",
                (f"{_FIRST}_fixMap.jpg",),
                url=f"{_JUDD}ALLFIXATIONMAPS.zip",
            ),
        ),
    ),
    "cat2000": Source(
        "cat2000",
        (
            Archive(
                "trainSet.zip",
                "trainSet",
                ("Stimuli", "FIXATIONLOCS"),
                url="http://saliency.mit.edu/trainSet.zip",
                md5="56ad5c77e6c8f72ed9ef2901628d6e48",
            ),
        ),
    ),
    # Test photos of the two benchmarks: their fixations are secret.
    "mit300": Source(
        "mit300",
        (
            Archive(
                "BenchmarkIMAGES.zip",
                "BenchmarkIMAGES",
                ("i1.jpg",),
                url="http://saliency.mit.edu/BenchmarkIMAGES.zip",
                md5="03ed32bdf5e4289950cd28df89451260",
            ),
        ),
    ),
    "cat2000-test": Source(
        "cat2000",
        (
            Archive(
                "testSet.zip",
                "testSet",
                ("Stimuli",),
                url="http://saliency.mit.edu/testSet.zip",
                md5="903ec668df2e5a8470aef9d8654e7985",
            ),
        ),
    ),
}

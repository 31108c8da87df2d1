"""The form in which each file of this room describes its dataset."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlnet_utils.data.photos import Photo

UNKNOWN = float("nan")


@dataclass(frozen=True)
class Archive:
    """A file at a source, and the folder of the dataset that it becomes.

    Addresses, ids and checksums are those that the sources, pysaliency and the datasets' users
    publish. Exactly one of ``url`` and ``drive`` is set.
    """

    name: str  # its file name here, under <folder>/archives
    into: str  # the folder that it becomes
    holds: tuple[str, ...]  # files or folders in that folder, by which the archive is recognised
    url: str = ""
    drive: str = ""  # id of a file on Google Drive
    published: str = ""  # its file name at the source, where that differs
    md5: str = ""  # "" where the source publishes none
    known: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of files inside, by path

    @classmethod
    def at(cls, address: str, part: str, holds: tuple[str, ...], md5: str = "") -> "Archive":
        """The file ``<address>/<part>.zip``, which becomes the folder ``part``."""
        return cls(f"{part}.zip", part, holds, url=f"{address}/{part}.zip", md5=md5)

    @property
    def page(self) -> str:
        """The address to open in a browser."""
        return f"https://drive.google.com/file/d/{self.drive}/view" if self.drive else self.url


@dataclass(frozen=True)
class DatasetSpec:
    """The facts that are known of a dataset."""

    name: str
    title: str
    folder: str  # below the data root
    read: Callable[[Path], list[Photo]] | None = None  # takes the dataset's folder
    sigma: float = UNKNOWN  # pixels of the photo that the authors blur fixations with
    px_per_degree: float = UNKNOWN
    val: float = 0  # photos of the published split rule, below 1 a share of them;
    test: float = 0  # 0 = the files have their own split
    archives: tuple[Archive, ...] = ()
    joins: tuple[str, ...] = ()  # datasets: all of the first, the training photos of the others
    parts: tuple[str, ...] = ()  # read below the folder; default: the archives' folders
    own: bool = False  # the user's, in coordinates that the preset may describe
    by_hand: str = ""  # for a dataset without archives: the way into its folder
    citation: str = ""

    @property
    def read_from(self) -> tuple[str, ...]:
        """Files and folders that are read, relative to the dataset's folder."""
        return self.parts or tuple(archive.into for archive in self.archives)

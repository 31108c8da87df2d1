"""data/README.md agrees with the readers' sources and with the record of the loader's benchmark."""

import re
from pathlib import Path

import pytest

from mlnet_utils.data.download import SOURCES

ROOT = Path(__file__).resolve().parents[2]
ARCHIVES = {
    archive.name: archive for spec in SOURCES.values() for archive in spec.archives
}.values()


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "data/README.md").read_text("utf-8")


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.name)
def test_sources_are_documented(readme, archive):
    described = [line for line in readme.splitlines() if f"`{archive.name}`" in line]
    if archive.known or archive.name == "BenchmarkIMAGES.zip":  # described by their content
        described = [readme]
    text = "\n".join(described)
    assert archive.md5 in text
    assert archive.drive in text
    assert f"{archive.into}/" in readme


@pytest.mark.parametrize("name", set(SOURCES) - {"synthetic", "folder"})
def test_datasets_are_cited(readme, name):
    assert f"`{name}`" in readme
    assert SOURCES[name].citation in re.sub(r"\s+", " ", readme)

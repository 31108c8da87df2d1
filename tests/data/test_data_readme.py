"""data/README.md agrees with the readers' sources and with the record of the loader's benchmark."""

import json
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


def test_the_throughput_is_the_recorded_one(readme):
    record = json.loads((ROOT / "results/benchmarks/loader.json").read_text("utf-8"))
    (text,) = (part for part in readme.split("\n\n") if part.startswith("The loader feeds"))
    loaded = {row["workers"]: row["loaded photos/s"] for row in record["speed"]}
    resident = [row["resident MB"] for row in record["memory"]]
    height, width = record["size"]
    photos = record["memory"][-1]["photos"]
    for said in (
        f"at {height}x{width} on {record['hardware']['cores']} CPU cores",
        f"delivers {loaded[0]:.0f} photos/s in the training process and {loaded[2]:.0f} with two",
        f"preset `{record['preset']}` (VGG-16) trains {record['speed'][0]['trained photos/s']:.2f}",
        f"of {photos:,} photos resident memory stays at {resident[-1]:,.0f} MB",
        f"to within {1000 * (max(resident) - min(resident)):.0f} KB",
    ):
        assert said in re.sub(r"\s+", " ", text)

"""Write the repository's address from pyproject.toml into every badge and setup cell.

    python tools/address.py            # rewrite what differs, and list it
    python tools/address.py --check    # only list it; exit code 1 if anything differs

pyproject.toml is the one place where the address is written by hand. Only links to this repository
are touched (Colab, nbviewer, `git+`, `git clone`, CITATION.cff, its files), never links to other
projects. Needs nothing but Python.
"""

import re
import sys
from pathlib import Path

NAME = r"[\w.-]+?/[\w.-]+?"  # owner/repository
# Each pattern has the part that stays, the address, and what must follow it.
PATTERNS = [
    re.compile(rf"(https://colab\.research\.google\.com/github/)({NAME})(?=/)"),
    re.compile(rf"(https://nbviewer\.org/github/)({NAME})(?=/)"),
    re.compile(rf"(git\+https://github\.com/)({NAME})(?=\.git\b|[@#\s\"'\\]|$)", re.MULTILINE),
    re.compile(rf"(git clone https://github\.com/)({NAME})(?=\.git\b|[\s\"'\\`]|$)", re.MULTILINE),
    re.compile(rf"(https://github\.com/)({NAME})(?=/blob/main/(?:docs|mlnet_utils|results)/)"),
    re.compile(rf"(https://raw\.githubusercontent\.com/)({NAME})(?=/main[\"'\\])"),
    re.compile(rf"(repository-code: \"https://github\.com/)({NAME})(?=\")"),
]


def repository_name(root: Path) -> str:
    """``owner/repository`` from pyproject.toml.

    Raises:
        ValueError: no address, or one that Colab and nbviewer cannot open.
    """
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'^Repository = "https://github\.com/({NAME})/?"$', text, re.MULTILINE)
    if not found:
        raise ValueError(
            'pyproject.toml needs Repository = "https://github.com/OWNER/NAME" in [project.urls] '
            "(Colab and nbviewer open notebooks from there)"
        )
    return found[1]


def addressed_files(root: Path) -> list[Path]:
    """The files that may hold the repository's address."""
    notebooks = sorted([*root.glob("notebooks/*.ipynb"), *root.glob("results/*/notebooks/*.ipynb")])
    return [
        *notebooks,
        *(root / name for name in ("README.md", "CITATION.cff", "mlnet_utils/config.py")),
    ]


def with_address(text: str, name: str) -> str:
    """``text`` with every link to this repository pointing to ``name``."""
    for pattern in PATTERNS:
        text = pattern.sub(lambda match: match[1] + name, text)
    return text


def main(root: Path, check: bool) -> int:
    """Rewrite (or only list) the files whose links differ; returns the exit code."""
    name = repository_name(root)
    differing = 0
    for path in filter(Path.is_file, addressed_files(root)):
        text = path.read_text(encoding="utf-8")
        if with_address(text, name) == text:
            continue
        differing += 1
        print(f"{path.relative_to(root)}: {'differs from' if check else 'now points to'} {name}")
        if not check:
            path.write_text(with_address(text, name), encoding="utf-8")
    return 1 if check and differing else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent, "--check" in sys.argv[1:]))

"""The solutions of the notebooks' exercises run as they stand, and no exercise lacks one."""

import json
import re

import pytest
from notebook_checks import ROOT

PAGE = ROOT / "docs" / "exercises.md"
SOLUTION = re.compile(r"^### (.+?)$.*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXERCISE = re.compile(r"^\d\. \*\*(.+?)\.?\*\*", re.MULTILINE)


def solutions():
    """Notebook -> its solutions, by title."""
    parts = re.split(r"^## (\d\d_\w+)$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return {
        name: dict(SOLUTION.findall(part))
        for name, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def exercises(path):
    """Titles in the cell of a notebook that is headed Exercises; it links to their solutions."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    (text,) = [text for text in texts if text.startswith("## Exercises")] or [""]
    assert not text or "docs/exercises.md" in text
    return EXERCISE.findall(text)


SOLUTIONS = [
    pytest.param(
        code,
        id=f"{name}: {title}",
        marks=[pytest.mark.slow] if "mlnet_utils.load()" in code else [],
    )
    for name, found in solutions().items()
    for title, code in found.items()
]


@pytest.mark.parametrize("code", SOLUTIONS)
def test_solution_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "assert " in code or "raise AssertionError" in code
    exec(compile(code, PAGE.name, "exec"), {})


def test_every_exercise_has_its_solution():
    asked = {path.stem: exercises(path) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
    answered = {name: list(found) for name, found in solutions().items()}
    assert {name: titles for name, titles in asked.items() if titles} == answered

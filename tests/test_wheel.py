"""A wheel built from the repository runs the demo's first steps away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    sources = {path.relative_to(REPOSITORY / "src").as_posix() for path in (REPOSITORY / "src").rglob("*.py")}
    data = {f"recurformer/quickstart/{name}" for name in ("train.jsonl", "validation.jsonl", "LICENCE.md")}
    assert sources | data | {"recurformer/py.typed"} <= set(names)
    assert all(name.startswith(("recurformer/", "recurformer-")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Dist: torch" in text


def test_runs_the_demo_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, text=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
            timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("-c", "import recurformer; print(recurformer.__file__)").strip()
    assert Path(where) == target / "recurformer" / "__init__.py"
    out = python(
        "-m", "recurformer", "demo", "--steps", "2", "--set", "data.window=16", "--set", "batch_size=2",
        "--set", "evaluation.batches=1", "--set", "evaluation.batch_size=2",
    )  # fmt: skip
    assert "transformer" in out
    made = {path.name for path in (elsewhere / "demo").iterdir()}
    assert {"recurrent", "first-1", "transformer", "curves.png", "report.html"} <= made

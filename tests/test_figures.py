"""The pictures that need training are drawn from stored measurements; these are what the script would measure now."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import pytest
from helpers import script_of

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_of(FIGURES / "recurrence.py")


def test_the_measurements_are_those_of_the_script(script: ModuleType):
    parts = {**script.TASKS, **script.HYBRIDS, **script.STABILITY}
    assert {path.stem for path in script.DATA.iterdir()} == set(parts)
    for name, settings in parts.items():
        stored = json.loads((script.DATA / f"{name}.json").read_text())
        # What a measurement's settings do not mention yet had its default.
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}
        complete = {**json.loads(json.dumps(defaults, default=str)), **stored["settings"]}
        assert complete == json.loads(json.dumps(dataclasses.asdict(settings))), name
        assert stored["machine"]["cpu"]


def test_the_picture_of_a_gpu_measurement_is_drawn_and_shown(tmp_path: Path):
    script_of(FIGURES / "decode.py").main(tmp_path)
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert (FIGURES / "decode.png").is_file()
    assert "figures/decode.png" in (FIGURES.parent / "decoding.md").read_text()


def test_every_picture_is_drawn_and_shown(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.main([])
    page = (FIGURES.parent / "what-recurrence-buys.md").read_text()
    for name in script.PICTURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in page
        assert (FIGURES / f"{name}.png").is_file()

"""Measures and draws the pictures of docs/what-recurrence-buys.md that need training. Run it from anywhere.

`python docs/figures/recurrence.py` draws every picture from the measurements in docs/figures/data/; those that are
missing are measured first, part by part, each a few minutes on one core. `... PART ...` measures these parts anew.
"""

import json
import pathlib
import sys

from recurformer.experiments.bench.stability import StabilitySettings, bench_stability, draw_stability
from recurformer.experiments.tasks import HybridSettings, TaskSettings, run_hybrids, run_tasks
from recurformer.experiments.tasks.hybrids import draw_hybrids
from recurformer.experiments.tasks.sweep import draw_tasks
from recurformer.files import replacing

HERE = pathlib.Path(__file__).parent
DATA = HERE / "data"
ON_GPU = {"groups": HERE / "gpu" / "groups.json"}  # measured there by the page's commands, never here
GROUPS = {"length": 32, "steps": 300}
SINGLE = ("SSSS", "RSSS", "SRSS", "SSRS", "SSSR")
SEVERAL = ("RRSS", "SSRR", "RSRS")
TEXT = {"length": 32, "steps": 150, "batch_size": 32}

TASKS = {
    **{f"parity-{seed}": TaskSettings(tasks=("parity",), seeds=(seed,), **GROUPS) for seed in range(3)},
    "s3-0": TaskSettings(tasks=("s3",), layers=("first:1", "standard"), length=32, steps=600),
    "s3-1": TaskSettings(tasks=("s3",), layers=("recurrent",), n_layers=(1,), length=32, steps=600),
    **{
        f"s3-{1 + seed}": TaskSettings(
            tasks=("s3",), layers=("recurrent",), n_layers=(1,), length=32, steps=600, seeds=(seed,)
        )
        for seed in (1, 2)
    },
    **{
        f"s3-{3 + seed}": TaskSettings(
            tasks=("s3",), layers=("first:1", "standard"), length=32, steps=600, seeds=(seed,)
        )
        for seed in (1, 2)
    },
    "deep": TaskSettings(tasks=("parity", "s3"), layers=("standard",), n_layers=(4,), **GROUPS),
    "modular": TaskSettings(tasks=("modular",)),
    **{name: TaskSettings(tasks=(name,), **GROUPS) for name in ("dyck", "khop", "selective-copy", "recall")},
}
HYBRIDS = {
    "text-0": HybridSettings(only=SINGLE, **TEXT),
    "text-1": HybridSettings(only=SEVERAL, extra_steps=(), **TEXT),
    "text-3": HybridSettings(only=("RRRS", "SRRR", "SRSR"), extra_steps=(), **TEXT),
    "text-2": HybridSettings(only=("RRRR",), extra_steps=(), **TEXT),
    **{
        f"parity-hybrids-{seed}": HybridSettings(
            on="parity", n_layers=3, n_heads=16, length=16, steps=150, batch_size=32, extra_steps=(), seeds=(seed,)
        )
        for seed in range(3)
    },
}
STABILITY = {"stability": StabilitySettings()}
PICTURES = {
    "tasks": (
        "parity-0",
        "parity-1",
        "parity-2",
        "s3-1",
        "s3-2",
        "s3-3",
        "s3-0",
        "s3-4",
        "s3-5",
        "deep",
        "modular",
        "dyck",
        "khop",
        "selective-copy",
        "recall",
    ),
    "groups": ("groups",),
    "hybrids-text": ("text-0", "text-1", "text-3", "text-2"),
    "hybrids-parity": ("parity-hybrids-0", "parity-hybrids-1", "parity-hybrids-2"),
    "stability": ("stability",),
}


def measured(part: str, anew: bool) -> dict:
    """A part's measurement, from its file or made now."""
    if part in ON_GPU:
        return json.loads(ON_GPU[part].read_text())
    file = DATA / f"{part}.json"
    if anew or not file.is_file():
        print(f"measuring {part}", flush=True)
        if part in TASKS:
            results = run_tasks(TASKS[part])
        elif part in HYBRIDS:
            results = run_hybrids(HYBRIDS[part])
        else:
            results = bench_stability(STABILITY[part])
        DATA.mkdir(exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
    return json.loads(file.read_text())


def joined(parts: tuple[str, ...]) -> dict:
    """Several parts as one measurement."""
    if len(parts) == 1:
        return measured(parts[0], anew=False)
    all_of_them = [measured(part, anew=False) for part in parts]
    seeds = sorted({row["seed"] for results in all_of_them for row in results["rows"]})
    rows = [row for results in all_of_them for row in results["rows"]]
    return {**all_of_them[0], "rows": rows, "settings": {**all_of_them[0]["settings"], "seeds": seeds}}


def main(parts: list[str]) -> None:
    unknown = set(parts) - {*TASKS, *HYBRIDS, *STABILITY}
    if unknown:
        raise SystemExit(f"no part {', '.join(unknown)}; choose of {', '.join([*TASKS, *HYBRIDS, *STABILITY])}")
    for part in parts:
        measured(part, anew=True)
    if parts:
        return
    for name, needed in PICTURES.items():
        results = joined(needed)
        draw = {"tasks": draw_tasks, "hybrids": draw_hybrids, "stability": draw_stability}[results["benchmark"]]
        (HERE / f"{name}.png").write_bytes(draw(results))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Evaluate finished runs on texts and on zero-shot items: `python runs/evaluate.py RUN... --data DIR --tasks DIR`.

Writes RUN/evaluation.json. It holds, for each text, what `recurformer eval RUN --data DIR --json` prints, and for all
tasks what `recurformer eval RUN --tasks DIR --json` prints, both of the newest checkpoint. One process loads each model
once. Texts and tasks that the file already has are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recurformer import zeroshot
from recurformer.evaluation import evaluate, open_data
from recurformer.files import replacing
from recurformer.store.checkpoints import newest_checkpoint
from recurformer.text import open_model
from recurformer.training.run import read_run_config
from recurformer.units import short_number

FILE = "evaluation.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data", action="append", default=[], metavar="DIR", help="prepared folder; may be repeated")
    parser.add_argument("--tasks", metavar="DIR", help="folder of zero-shot items")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    try:
        for run in given.runs:
            evaluate_run(run, given.data, given.tasks, given.batch_size, given.limit, given.device)
            release()
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def evaluate_run(
    run: Path, data: Sequence[str], tasks: str | None, batch_size: int, limit: int | None, device: str
) -> dict[str, Any]:
    """Evaluate a run on what its evaluation.json lacks, and return all that the file then holds.

    Raises:
        ValueError: for a folder that is no run, or data that are missing.
    """
    config, file = read_run_config(run), run / FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    missing = [path for path in data if Path(path).name not in found]
    if not missing and (tasks is None or "tasks" in found):
        return found
    checkpoint = newest_checkpoint(run / "checkpoints", lambda message: None)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint to evaluate")
    if found.setdefault("step", checkpoint.step) != checkpoint.step:
        raise ValueError(f"{file} is of step {found['step']}, and the run is at {checkpoint.step}; delete it")
    model, tokenizer, _ = open_model(checkpoint.path, device, "auto")
    window = config.data.window
    for path in missing:
        with open_data(path, tokenizer, model.config.vocab_size) as dataset:
            result = evaluate(model, dataset, window=window, batch_size=batch_size)
        found[Path(path).name] = result.to_dict()
        save(file, found)
        print(f"{run.name}: {Path(path).name}: {result.loss:.4f} nats a token ({short_number(result.tokens)} tokens)")
    if tasks is not None and "tasks" not in found:
        if tokenizer is None:
            raise ValueError(f"{run} has no tokenizer beside its model")
        results = [
            zeroshot.evaluate_task(model, tokenizer, file, window=window, batch_size=2 * batch_size, limit=limit)
            for file in zeroshot.find_tasks([tasks]).values()
        ]
        found["tasks"] = [result.to_dict() for result in results]
        save(file, found)
        print(f"{run.name}: " + ", ".join(f"{r.task} {r.accuracy:.3f}" for r in results), flush=True)
    return found


def save(file: Path, found: dict[str, Any]) -> None:
    """Write the results so far."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def release() -> None:
    """Free the memory that was kept for the last model's shapes."""
    from recurformer.experiments.bench.timing import release as release_memory
    from recurformer.scan.fused.engines import release_engines

    if torch.cuda.is_available():
        release_engines()
    release_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main())

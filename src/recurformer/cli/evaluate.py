"""`recurformer eval`: perplexity of a text, accuracy of zero-shot items."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recurformer.cli.common import device_option

if TYPE_CHECKING:
    from recurformer.data import Tokenizer
    from recurformer.model import LanguageModel


@click.command("eval")
@click.argument("run", type=click.Path())
@click.option("--data", type=click.Path(), metavar="DIR|FILE", help="Prepared folder, or a text file, which gets the "
              "tokenizer of RUN.  [default: the validation data of RUN]")  # fmt: skip
@click.option("--text-field", default="text", metavar="NAME", help="Field of a JSON line, or column of a table, that "
              "holds the text of --data.")  # fmt: skip
@click.option("--window", type=click.IntRange(min=1), metavar="N", help="Positions of one sequence. No token sees "
              "further back.  [default: the window of RUN's training, else 512]")  # fmt: skip
@click.option("--batch-size", default=16, type=click.IntRange(min=1), help="Sequences at once. It does not change the "
              "result.")  # fmt: skip
@click.option("--max-batches", type=click.IntRange(min=1), metavar="N", help="Batches to read at most.  [default: all]")
@click.option("--tasks", multiple=True, type=click.Path(), metavar="FILE|DIR", help="Zero-shot items to score in place "
              "of a text; may be repeated. A folder stands for all its .jsonl and .jsonl.gz files.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Items of each task at most.  [default: all]")
@click.option("--scan", default="auto", help="Scan of the recurrent layers.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object as output.")
def evaluate(
    run: str,
    data: str | None,
    text_field: str,
    window: int | None,
    batch_size: int,
    max_batches: int | None,
    tasks: tuple[str, ...],
    limit: int | None,
    scan: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure perplexity and bits per byte of the model in RUN, or its zero-shot accuracy.

    RUN is the folder of a training run, whose best checkpoint is taken, or of a model. Every token of the text but the
    first of a document is predicted exactly once. With --tasks, the result is the share of the items whose right choice
    is the most probable one.
    """
    from recurformer.evaluation import evaluate, locate, open_data, run_of, run_setting
    from recurformer.text import open_model

    if tasks and (data or max_batches):
        raise ValueError("--tasks scores items, --data and --max-batches a text; run the two apart")
    if limit and not tasks:
        raise ValueError(f"--limit is {limit}, but there are no --tasks; --max-batches limits a text")
    model, tokenizer, folder = open_model(run, device, scan)
    window = int(window or run_setting(folder, "data", "window") or 512)
    if tasks:
        _score(model, tokenizer, folder, tasks, window, batch_size, limit, as_json)
        return
    if data is None:
        named, home = run_setting(folder, "data", "validation"), run_of(folder)
        if named is None or home is None:
            raise ValueError(f"{run} names no validation data; give --data")
        data = locate(named, home)
    with open_data(data, tokenizer, model.config.vocab_size, folder, text_field=text_field) as dataset:
        result = evaluate(
            model, dataset, window=window, batch_size=batch_size, max_batches=max_batches, progress=not as_json
        )
    if not math.isfinite(result.loss):
        raise ValueError(
            f"the loss of {folder} is {result.loss}: its weights hold NaN or infinity, or its dtype overflows; use an "
            "earlier checkpoint, or float32"
        )
    if as_json:
        values = {"model": str(folder), "data": data, "window": window, **result.to_dict()}
        print(json.dumps(values))
        return
    print(f"model          {folder}")
    print(f"data           {data}: {result.tokens:,} tokens predicted, window {window}")
    print(f"loss           {result.loss:.4f} nats a token")
    print(f"perplexity     {result.perplexity:.3f}")
    if not math.isnan(result.bits_per_byte):
        print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"speed          {result.tokens / result.seconds:,.0f} tokens/s on {model.embedding.weight.device}")


def _score(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    folder: Path,
    tasks: tuple[str, ...],
    window: int,
    batch_size: int,
    limit: int | None,
    as_json: bool,
) -> None:
    """Score zero-shot items and print the accuracies."""
    from recurformer import zeroshot

    files = zeroshot.find_tasks(tasks)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer beside its model; save one into it (recurformer.save)")
    options = {"window": window, "batch_size": batch_size, "limit": limit, "progress": not as_json}
    results = [zeroshot.evaluate_task(model, tokenizer, file, **options) for file in files.values()]
    if as_json:
        print(json.dumps({"model": str(folder), "window": window, "tasks": [r.to_dict() for r in results]}))
    else:
        zeroshot.show(results)

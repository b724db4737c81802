"""`recurformer eval`: perplexity of a text, accuracy of zero-shot items."""

from __future__ import annotations

import click

from recurformer.cli.common import device_option


@click.command("eval")
@click.argument("run", type=click.Path())
@click.option("--data", type=click.Path(), metavar="DIR|FILE", help="Prepared folder, or a text file that is "
              "tokenized as RUN's text was.  [default: the validation data of RUN]")  # fmt: skip
@click.option("--window", type=click.IntRange(min=1), metavar="N", help="Positions of one sequence; no token sees "
              "further back.  [default: the window RUN was trained with, else 512]")  # fmt: skip
@click.option(
    "--batch-size", default=16, type=click.IntRange(min=1), help="Sequences at once; does not change the result."
)
@click.option(
    "--max-batches", type=click.IntRange(min=1), metavar="N", help="Stop after N batches.  [default: read all]"
)
@click.option("--tasks", multiple=True, type=click.Path(), metavar="FILE|DIR", help="Score zero-shot items instead of "
              "a text; a folder stands for all its .jsonl and .jsonl.gz files. May be repeated.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N items of each task.")
@click.option("--scan", default="auto", help="How recurrent layers are evaluated.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    run: str,
    data: str | None,
    window: int | None,
    batch_size: int,
    max_batches: int | None,
    tasks: tuple[str, ...],
    limit: int | None,
    scan: str,
    device: str,
    as_json: bool,
) -> None:
    """Perplexity, and bits per byte of the source text, of the model in RUN (a run's or a model's folder; of a run, its
    best checkpoint). Every token but a document's first is predicted exactly once.

    With --tasks, zero-shot accuracy: the part of the items whose right choice is the most probable one.
    """
    import json

    from recurformer.evaluation.perplexity import evaluate, locate, open_data, run_of, run_setting
    from recurformer.generation.text import open_model

    if tasks and (data or max_batches):
        raise ValueError("--tasks scores items, --data and --max-batches a text; run the two apart")
    if limit and not tasks:
        raise ValueError(f"--limit is {limit}, but there are no --tasks; --max-batches limits a text")
    model, tokenizer, folder = open_model(run, device, scan)
    if tasks:
        from recurformer.evaluation import zeroshot

        files = zeroshot.find_tasks(tasks)
        if tokenizer is None:
            raise ValueError(f"{folder} has no tokenizer beside its model; save one into it (recurformer.save)")
        window = int(window or run_setting(folder, "data", "window") or 512)
        results = [
            zeroshot.evaluate_task(
                model, tokenizer, file, window=window, batch_size=batch_size, limit=limit, progress=not as_json
            )
            for file in files.values()
        ]
        if as_json:
            print(json.dumps({"model": str(folder), "window": window, "tasks": [r.to_dict() for r in results]}))
        else:
            zeroshot.show(results)
        return
    if data is None:
        named, home = run_setting(folder, "data", "validation"), run_of(folder)
        if named is None or home is None:
            raise ValueError(f"{run} names no validation data; give --data")
        data = locate(named, home)
    window = int(window or run_setting(folder, "data", "window") or 512)
    with open_data(data, tokenizer, model.config.vocab_size, folder) as dataset:
        result = evaluate(
            model, dataset, window=window, batch_size=batch_size, max_batches=max_batches, progress=not as_json
        )
    if as_json:
        values = {"model": str(folder), "data": data, "window": window, **result.to_dict()}
        print(json.dumps(values))
        return
    print(f"model          {folder}")
    print(f"data           {data}: {result.tokens:,} tokens predicted, window {window}")
    print(f"loss           {result.loss:.4f} nats a token")
    print(f"perplexity     {result.perplexity:.3f}")
    if result.bits_per_byte == result.bits_per_byte:
        print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"speed          {result.tokens / result.seconds:,.0f} tokens/s on {model.embedding.weight.device}")

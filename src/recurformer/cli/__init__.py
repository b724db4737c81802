"""The `recurformer` command: verbs to functions, nothing else. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from recurformer.version import __version__


@click.group(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="recurformer")
def cli() -> None:
    """Train, evaluate, decode and compare Recurrent Transformers."""


def main(arguments: Sequence[str] | None = None, command: click.Command = cli, name: str = "recurformer") -> None:
    """Run a command; bad input ends in one line on stderr and exit code 2."""
    try:
        code = command.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except BrokenPipeError:  # `recurformer ... | head`: nobody reads on, and the flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        print("recurformer: interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print("recurformer: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", required=True, type=click.Path(), metavar="DIR", help="Folder to make.")
@click.option("--tokenizer", default="bytes", metavar="bytes|FILE|train-bpe:N", help="UTF-8 bytes; a tokenizer.json, "
              "a SentencePiece .model or a saved folder; or a BPE of N tokens, learned here.")  # fmt: skip
@click.option("--text-field", default="text", metavar="NAME", help="Where a JSON line or a table keeps its text.")
@click.option("--split", default="train", metavar="NAME", help="Split of a Hugging Face dataset.")
@click.option("--append-eos/--no-append-eos", default=True, help="End each document with the tokenizer's end token.")
@click.option("--shard-tokens", type=click.IntRange(min=1), default=100_000_000, metavar="N", help="A shard ends with "
              "the first document that brings it to N tokens.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes that tokenize.  [default: one a "
              "core; only one for a small input]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace DIR when it is a prepared folder.")
@click.option("--quiet", is_flag=True, help="Show nothing but errors.")
def prepare(
    inputs: tuple[str, ...],
    out: str,
    tokenizer: str,
    text_field: str,
    split: str,
    append_eos: bool,
    shard_tokens: int,
    workers: int | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Tokenize text into DIR, from which runs are trained and evaluated.

    INPUT is a file (.txt, .md, .jsonl, each also .gz or .zst, or .parquet), a folder, a quoted glob, or a Hugging Face
    dataset, hf:NAME or hf:NAME:CONFIGURATION. DIR appears when it is complete, and not before.
    """
    from recurformer import data

    made = data.prepare(
        inputs, out, tokenizer, shard_tokens=shard_tokens, workers=workers, append_eos=append_eos,
        text_field=text_field, split=split, overwrite=overwrite, progress=not quiet,
    )  # fmt: skip
    if not quiet:
        click.echo(
            f"{made.folder}: {made.n_tokens:,} tokens of {made.n_documents:,} documents ({made.n_bytes:,} bytes), "
            f"vocabulary {made.vocab_size:,} as {made.dtype}, {made.n_shards} shard{'s' if made.n_shards > 1 else ''}"
        )


class _DocumentsSettings(click.Command):
    """A command whose help ends with every setting of a training run."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from recurformer.training.config import reference

        for section, summary, entries in reference():
            with formatter.section(f"Settings of [{section}]" if section else "Settings"):
                if summary:
                    formatter.write_text(summary)
                formatter.write_dl([(e.name, f"{e.doc}  [default: {e.default}]") for e in entries], col_max=26)


@cli.command(cls=_DocumentsSettings)
@click.option("--config", "config_file", type=click.Path(), help="TOML, YAML or JSON file of settings.", metavar="FILE")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change one setting; may be repeated.")
@click.option("--out", type=click.Path(), metavar="RUN", help="Folder of the run; required but for --dry-run.")
@click.option("--init-from", type=click.Path(), metavar="FOLDER", help="Start from the weights of this model or run; "
              "short for --set init_from=FOLDER.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue RUN from its newest checkpoint, with its own configuration "
              "unless --config gives one.")  # fmt: skip
@click.option("--allow-change", multiple=True, metavar="NAME", help="Let this setting differ from the resumed run's; "
              "the new value holds from the next step on.")  # fmt: skip
@click.option("--stop-at", type=click.IntRange(min=0), metavar="STEP", help="Save and stop at this step.")
@click.option("--dry-run", is_flag=True, help="Print what the run will cost here (parameters, memory, time, disk), and "
              "write nothing. The data may be missing.")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1), metavar="N", help="With --dry-run: as many as torchrun would "
              "start, a GPU each.  [default: those that it has started]")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Show nothing but errors.")
def train(
    config_file: str | None,
    settings: tuple[str, ...],
    out: str | None,
    init_from: str | None,
    resume: bool,
    allow_change: tuple[str, ...],
    stop_at: int | None,
    dry_run: bool,
    processes: int | None,
    quiet: bool,
) -> int:
    """Train a model into RUN: config.json, metrics.jsonl, checkpoints/ and, at the end, plots/.

    SIGINT (Ctrl-C) and SIGTERM save after the step at hand and exit with 130 and 143; a second one aborts at once. The
    exit code is 0 when the run is finished or --stop-at is reached, and 2 after an error.
    """
    import json

    from recurformer import training
    from recurformer.report import load_runs, write_report
    from recurformer.training.distributed import environment

    if init_from is not None:
        settings = (*settings, f"init_from={json.dumps(init_from)}")

    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'; only --dry-run goes without.")
    if processes is not None and not dry_run:
        raise click.UsageError("--processes is for --dry-run; torchrun --nproc-per-node starts several.")
    own = Path(out or ".") / "config.json"
    file = str(own) if out and resume and config_file is None and own.is_file() else config_file
    if dry_run:
        from rich.console import Console

        from recurformer.training import estimate

        rank, started, _ = environment()
        if rank == 0:
            found = estimate.estimate(training.load_config(file, settings), processes or started)
            estimate.show(found, Console(width=80))
        return 0
    assert out is not None
    try:
        result = training.train(
            training.load_config(file, settings), out,
            resume=resume, allow_change=allow_change, stop_at=stop_at, quiet=quiet,
        )  # fmt: skip
    except training.EndedElsewhereError:
        return 2
    except training.TrainingError as error:
        raise click.ClickException(str(error)) from error
    if result.signal is not None:
        return 128 + result.signal
    if environment()[0] == 0:
        write_report(load_runs([out]), Path(out) / "plots", f"Training run {Path(out).name}")
    return 0


def device_option(command):
    """--device, as every verb that runs a model has it."""
    return click.option("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")(
        command
    )


@cli.command("eval")
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

    from recurformer.evaluation.perplexity import evaluate, open_data, run_setting
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
    if (data := data or run_setting(folder, "data", "validation")) is None:
        raise ValueError(f"{run} names no validation data; give --data")
    window = int(window or run_setting(folder, "data", "window") or 512)
    with open_data(data, tokenizer, model.config.vocab_size) as dataset:
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


@cli.command()
@click.argument("run", type=click.Path())
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; may be repeated: all "
              "prompts run as one batch.  [default: the start of a text]")  # fmt: skip
@click.option("--max-new-tokens", default=200, type=click.IntRange(min=0), help="Tokens generated at most.")
@click.option("--temperature", default=0.8, type=float, help="0 takes the most probable token.")
@click.option("--top-k", default=0, type=int, help="Sample among the K most probable tokens; 0: all.")
@click.option("--top-p", default=1.0, type=float, help="Sample among the fewest tokens of at least this probability.")
@click.option("--min-p", default=0.0, type=float, help="Leave out tokens below this part of the top probability.")
@click.option("--repetition-penalty", default=1.0, type=float, help="Above 1: tokens seen before become less probable.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help=r"End before this text, besides the end of "
              r"text; \n and \t may be spelled out. May be repeated.")  # fmt: skip
@click.option("--samples", default=1, type=click.IntRange(min=1), help="Continuations of each prompt.")
@click.option("--seed", type=int, help="Of the sampling.  [default: another one each time]")
@click.option("--scan", default="auto", help="How recurrent layers read the prompt.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a continuation.")
def generate(
    run: str,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    stops: tuple[str, ...],
    samples: int,
    scan: str,
    device: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue prompts with the model in RUN (a run's or a model's folder; of a run, its best checkpoint). A single
    continuation is printed as it comes, several are printed at the end, each under its number."""
    import json
    from dataclasses import asdict

    from recurformer.generation.text import complete, open_model

    model, tokenizer, folder = open_model(run, device, scan)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer beside its model; save one into it (recurformer.save)")
    prompts = prompts or ("",)
    single = len(prompts) == 1 and samples == 1 and not as_json
    spelled_out = tuple(stop.replace("\\n", "\n").replace("\\t", "\t") for stop in stops)
    options = {"stops": spelled_out, "samples": samples, **sampling}

    def show(text: str) -> None:
        print(text, end="", flush=True)

    started = False

    def show_after_prompt(text: str) -> None:
        nonlocal started
        show(text if started else prompts[0] + text)
        started = True

    found = complete(model, tokenizer, prompts, max_new_tokens, show=show_after_prompt if single else None, **options)
    if single:
        print("" if started else prompts[0])
        return
    for number, completion in enumerate(found, 1):
        if as_json:
            print(json.dumps(asdict(completion), ensure_ascii=False))
        else:
            print(f"--- {number} ---\n{completion.prompt}{completion.text}")


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...")
@click.option(
    "--out", default="compare", type=click.Path(), metavar="DIR", help="Folder for curves.png and report.html."
)
@click.option("--by", metavar="NAME,...", help="One row for all runs that share these: their best. NAME is layers, "
              "kind, width, params, tokens, lr, beta2, seed or a setting, as optimizer.beta1.")  # fmt: skip
def compare(runs: tuple[str, ...], out: str, by: str | None) -> None:
    """Training runs side by side: a table here, the curves as a picture and one self-contained page in DIR."""
    from rich.console import Console

    from recurformer.report import load_runs, show, show_groups, write_report

    loaded = load_runs(runs)
    if by is not None:
        loaded = show_groups(loaded, [name.strip() for name in by.split(",") if name.strip()], Console())
    curves, page = write_report(loaded, out)
    if by is None:
        show(loaded, Console())
    print(f"curves: {curves}\npage:   {page}")


@cli.group()
def bench() -> None:
    """Measure speed and memory, and model memory traffic."""


@bench.command("scan")
@click.option("--length", "lengths", multiple=True, default=(256,), type=int, metavar="N", help="Positions; may be "
              "repeated.")  # fmt: skip
@click.option("--batch-size", default=16, type=int, help="Sequences.")
@click.option("--d-model", default=256, type=int, help="Width of the residual stream.")
@click.option("--n-layers", default=4, type=int, help="Layers.")
@click.option("--n-heads", default=4, type=int, help="Heads.")
@click.option("--vocab-size", default=256, type=int, help="Of the language model around the layers.")
@click.option("--dtype", default="fp32", help="fp32, or bf16 (autocast: weights stay float32).")
@click.option("--path", "paths", multiple=True, metavar="NAME", help="A scan by its name, standard or peer; may be "
              "repeated.  [default: all]")  # fmt: skip
@click.option("--backward/--forward-only", default=True, help="A training step without the optimizer, or inference.")
@click.option("--repeats", default=5, type=int, help="Timed runs, of which the median counts.")
@click.option("--warmup", default=1, type=int, help="Runs before them.")
@click.option("--peer-repeats", type=int, metavar="N", help="Timed runs of the peer, which is slow.  [default: as "
              "many]")  # fmt: skip
@click.option("--threads", type=int, metavar="N", help="Of the CPU.  [default: as PyTorch chooses]")
@click.option("--seed", default=0, type=int, help="Of weights and tokens.")
@device_option
@click.option("--out", type=click.Path(), metavar="DIR", help="Folder for scan.json and scan.png.")
def bench_scan(lengths: tuple[int, ...], paths: tuple[str, ...], device: str, out: str | None, **shape: Any) -> None:
    """Time and peak memory of the reference, every faster scan and standard layers, in one run.

    Times are medians after warm-up; the paths take turns. Memory is what a run holds beyond model and tokens. The
    package recurrent-transformer-pytorch, when it is installed, is measured beside them as "peer", at the same widths
    and without what it adds to the paper's layer.
    """
    from recurformer.experiments.bench import scan
    from recurformer.generation.text import pick_device

    settings = scan.ScanSettings(
        lengths=lengths, paths=paths or scan.PATHS, device=str(pick_device(device)), **shape
    )  # fmt: skip
    _bench("scan", scan.bench_scan, scan.show_scan, scan.draw_scan, settings, out)


def _with_progress(work: Any) -> Any:
    """What `work` returns, called with a function that shows (what, done, total) as a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("start", total=None)
        return work(lambda what, done, total: bar.update(task, description=what, completed=done, total=total))


def _bench(name: str, measure: Any, show: Any, draw: Any, settings: Any, out: str | None) -> None:
    """Measure, print the table on 100 columns or more, and write NAME.json and NAME.png into a folder."""
    from rich.console import Console

    from recurformer.experiments.bench import common

    _make_folder(out)
    results = _with_progress(lambda report: measure(settings, report))
    show(results, Console(width=max(100, Console().width)))
    if out is not None:
        print("\n".join(map(str, common.write(out, name, results, draw(results)))))


def _names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """A list of names with commas between."""
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _sizes(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """A list of whole numbers with commas between."""
    try:
        return tuple(int(number) for number in _names(context, parameter, value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers; write them as 64,128") from None


def timing_options(command):
    """What every benchmark of a GPU has."""
    for option in (
        click.option("--dtype", default="bf16", help="bf16, or fp32."),
        click.option("--repeats", default=5, type=int, help="Timed runs, of which the median counts."),
        click.option("--warmup", default=3, type=int, help="Runs before them."),
        click.option("--seed", default=0, type=int, help="Of weights and inputs."),
        device_option,
        click.option("--out", type=click.Path(), metavar="DIR", help="Folder for the numbers (JSON) and a picture."),
    ):
        command = option(command)
    return command


compile_option = click.option("--compile/--no-compile", default=None, help="Fuse element-wise steps of standard "
                              "layers.  [default: on a GPU]")  # fmt: skip


@bench.command("layer")
@click.option("--batch-size", default=64, type=int, help="Sequences.")
@click.option("--length", default=512, type=int, metavar="N", help="Positions.")
@click.option("--d-model", default=1024, type=int, help="Width of the residual stream.")
@click.option("--n-heads", default=16, type=int, help="Query heads.")
@click.option("--n-kv-heads", type=int, metavar="G", help="Key-value heads.  [default: as many as query heads]")
@click.option("--stack", default=1, type=int, metavar="L", help="Layers on top of each other; times are of one.")
@click.option("--scans", default="auto", callback=_names, metavar="NAME,...", help="How the recurrent layer is "
              "evaluated, a row each.")  # fmt: skip
@click.option("--standard/--no-standard", default=True, help="Measure a standard layer beside it.")
@click.option("--official", type=click.Path(), metavar="CHECKOUT", help="Folder with the code of "
              "github.com/geniucos/recurrent-transformer, whose blocks are measured in the same run.")  # fmt: skip
@click.option("--backward/--forward-only", default=True, help="Forward and backward besides the forward alone.")
@click.option("--inputs", default=3, type=int, help="Different inputs that the runs take in turn.")
@compile_option
@timing_options
def bench_layer(scans: tuple[str, ...], device: str, out: str | None, **shape: Any) -> None:
    """One layer, or a stack of them: forward, and forward and backward, beside a standard layer."""
    from recurformer.experiments.bench import layer
    from recurformer.generation.text import pick_device

    settings = layer.LayerSettings(scans=scans, device=str(pick_device(device)), **shape)
    _bench("layer", layer.bench_layer, layer.show_layer, layer.draw_layer, settings, out)


@bench.command("model")
@click.option("--presets", default="150m-12", callback=_names, metavar="NAME,...", help="Shapes.")
@click.option("--kinds", default="standard,recurrent,first:1,first:3", callback=_names, metavar="KIND,...",
              help="Of their layers.")  # fmt: skip
@click.option("--tokens", default=262_144, type=int, help="Of one optimizer step.")
@click.option("--length", default=512, type=int, metavar="N", help="Positions of a sequence.")
@click.option("--micro-batch-sizes", default="64,128", callback=_sizes, metavar="B,...", help="Sequences at once, each "
              "tried.")  # fmt: skip
@click.option("--recurrent-micro-batch-sizes", default="", callback=_sizes, metavar="B,...", help="Sequences at once "
              "in the recurrent layers of a hybrid, each tried beside the same number in all layers.")  # fmt: skip
@click.option("--recompute", default="off", type=click.Choice(["off", "on", "both"]), help="Evaluate standard layers "
              "again in the backward.")  # fmt: skip
@click.option("--scan", default="auto", help="How recurrent layers are evaluated.")
@compile_option
@timing_options
def bench_model(recompute: str, device: str, out: str | None, **options: Any) -> None:
    """Whole optimizer steps: tokens a second of recurrent models and hybrids against the Transformer, each with its own
    fastest micro-batch."""
    from recurformer.experiments.bench import model
    from recurformer.generation.text import pick_device

    again = {"off": (False,), "on": (True,), "both": (False, True)}[recompute]
    settings = model.ModelSettings(recompute=again, device=str(pick_device(device)), **options)
    _bench("model", model.bench_model, model.show_model, model.draw_model, settings, out)


@bench.command("prefill")
@click.option("--presets", default="300m-6,300m-24", callback=_names, metavar="NAME,...", help="Shapes.")
@click.option("--scans", default="auto", callback=_names, metavar="NAME,...", help="How recurrent layers read, a row "
              "each; engine: as generation does.")  # fmt: skip
@click.option("--standard/--no-standard", default=True, help="Measure standard layers beside them.")
@click.option("--length", default=2048, type=int, metavar="N", help="Positions of the prompt.")
@click.option("--batch-size", default=1, type=int, help="Prompts.")
@click.option("--inputs", default=3, type=int, help="Different prompts that the runs take in turn.")
@timing_options
def bench_prefill(device: str, out: str | None, **options: Any) -> None:
    """Reading a prompt: tokens a second against what streaming the weights once a position allows."""
    from recurformer.experiments.bench import prefill
    from recurformer.generation.text import pick_device

    settings = prefill.PrefillSettings(device=str(pick_device(device)), **options)
    _bench("prefill", prefill.bench_prefill, prefill.show_prefill, prefill.draw_prefill, settings, out)


@bench.command("decode")
@click.option("--models", default="300m-6,300m-24:standard", callback=_names, metavar="PRESET:KIND,...",
              help="Shapes; recurrent without a kind.")  # fmt: skip
@click.option("--batch-sizes", default="1,64", callback=_sizes, metavar="B,...", help="Rows that continue at once, "
              "each tried.")  # fmt: skip
@click.option("--contexts", default="1024", callback=_sizes, metavar="N,...", help="Slots that the last timed token "
              "sees, each tried.")  # fmt: skip
@click.option("--step", "steps", default="auto", callback=_names, metavar="NAME,...", help="auto, plain (PyTorch "
              "operations) or fused (kernels), a row each.")  # fmt: skip
@click.option("--tokens", default=16, type=int, help="Of one timed run.")
@click.option("--huggingface/--no-huggingface", default=False, help="Also time generate, of Hugging Face and ours, on "
              "the same weights, one row.")  # fmt: skip
@timing_options
def bench_decode(device: str, out: str | None, **options: Any) -> None:
    """Decoding: milliseconds a token over batch and context, against what reading weights and cache once allows.

    Recurrent and standard models run in the same engine. The cache holds random pairs; no prompt is read.
    """
    from recurformer.experiments.bench import decode
    from recurformer.generation.text import pick_device

    settings = decode.DecodeSettings(device=str(pick_device(device)), **options)
    _bench("decode", decode.bench_decode, decode.show_decode, decode.draw_decode, settings, out)


@bench.command("traffic")
@click.option("--measure", is_flag=True, help="Read what a GPU's memory really moves, with NVIDIA's profiler ncu.")
@click.option("--length", "lengths", multiple=True, type=int, metavar="N", help="Positions; may be repeated.  "
              "[default: powers of two from 64 to 65536; measured: 256 to 4096]")  # fmt: skip
@click.option("--batch-size", type=int, help="Sequences.  [default: 1; measured: 16]")
@click.option("--n-heads", default=16, type=int, help="Query heads.")
@click.option("--n-kv-heads", type=int, metavar="G", help="Key-value heads.  [default: as many as query heads]")
@click.option("--head-dim", default=64, type=int, help="Width of a head.")
@click.option("--element-bytes", default=2, type=int, help="Of queries, keys, values and outputs.")
@click.option("--chunk", type=int, metavar="C", help="Positions of a chunk, a power of two.  [default: pure tiling]")
@click.option("--leaf", default=1, type=int, help="Positions that read each other directly, a power of two.")
@click.option("--scan", default="fused", help="Measured: how the layer is evaluated, in pure tiling.")
@click.option("--backward/--forward-only", default=False, help="Measured: forward and backward.")
@click.option("--replay", default="app-range", help="Measured: ncu reads the counters around the whole scan, or around "
              "every kernel (kernel: slow).")  # fmt: skip
@click.option("--out", type=click.Path(), metavar="DIR", help="Folder for traffic.json and traffic.png.")
def bench_traffic(
    measure: bool,
    lengths: tuple[int, ...],
    batch_size: int | None,
    scan: str,
    backward: bool,
    replay: str,
    out: str | None,
    **shape: Any,
) -> None:
    """HBM traffic of a recurrent layer over the length: of its attention, modelled, naive against tiled; with --measure
    the DRAM bytes of one layer in bf16 in pure tiling, and how they grow."""
    from rich.console import Console

    from recurformer.experiments.bench import common, traffic

    given: dict[str, Any] = {"lengths": lengths} if lengths else {}
    given |= {"batch_size": batch_size} if batch_size is not None else {}
    if measure:
        if (shape["n_kv_heads"], shape["element_bytes"], shape["chunk"], shape["leaf"]) != (None, 2, None, 1):
            raise ValueError("--measure is of pure tiling in bf16; drop --n-kv-heads, --element-bytes, --chunk, --leaf")
        settings = traffic.MeasureSettings(
            n_heads=shape["n_heads"], head_dim=shape["head_dim"], scan=scan, backward=backward, replay=replay, **given
        )
        name = f"traffic-measured{'-backward' if backward else ''}"
        _bench(name, traffic.measure_traffic, traffic.show_measured, traffic.draw_measured, settings, out)
        return
    settings = traffic.TrafficSettings(**given, **shape)
    results = traffic.bench_traffic(settings)
    traffic.show_traffic(results, Console())
    if out is not None:
        made = common.write(out, "traffic", results, traffic.draw_traffic(results))
        print("\n".join(map(str, made)))


@bench.command("stability")
@click.option("--d-model", default=64, type=int, help="Width of the models followed over distance.")
@click.option("--n-layers", default=2, type=int, help="Their layers.")
@click.option("--n-heads", default=4, type=int, help="Heads of every model.")
@click.option("--length", default=128, type=int, help="Positions; distances are measured from the last one.")
@click.option("--steps", default=100, type=int, help="Training steps before the second look.")
@click.option("--lr", default=4e-3, type=float, help="Learning rate of that training.")
@click.option("--uniform-width", default=128, type=int, help="Width of the single layer with uniform attention.")
@click.option("--training/--no-training", "grid", default=True, help="Also train a grid of depths, widths and learning "
              "rates, and report gradient norms.")  # fmt: skip
@click.option("--seed", default=0, type=int, help="Of weights and data.")
@click.option("--out", type=click.Path(), metavar="DIR", help="Folder for stability.json and stability.png.")
def bench_stability(grid: bool, out: str | None, **settings: Any) -> None:
    """Gradients over distance, fresh and trained, with bounds for one layer; gradient norms while training.

    Recurrent and standard models and an Elman network, on the text inside the package. A few minutes on a CPU.
    """
    from rich.console import Console

    from recurformer.experiments.bench import common, stability

    if not grid:
        settings["depths"] = ()
    chosen = stability.StabilitySettings(**settings)
    _make_folder(out)
    console = Console(stderr=True)
    with console.status("start") as status:
        results = stability.bench_stability(chosen, status.update)
    stability.show_stability(results, Console())
    if out is not None:
        print("\n".join(map(str, common.write(out, "stability", results, stability.draw_stability(results)))))


@cli.group()
def tasks() -> None:
    """State-tracking tasks: train small models, score them at and beyond the training length."""


@tasks.command("list")
def tasks_list() -> None:
    """The tasks, their vocabularies and shortest lengths."""
    from rich.console import Console

    from recurformer.experiments.bench.common import show_table
    from recurformer.experiments.tasks import TASKS, make_task

    made = [(name if family.limits is None else f"{name}[:K]", make_task(name)) for name, family in TASKS.items()]
    cells = [[name, str(task.vocab_size), str(task.shortest), task.about] for name, task in made]
    notes = ["With K left out: as described here."]
    show_table(
        Console(width=max(100, Console().width)),
        "",
        ["task", "tokens", "shortest", "answer at each position"],
        cells,
        notes,
        left=1,
    )


def _training_options(command):
    """What the verbs that train small models share."""
    for option in (
        click.option("--d-model", default=64, type=int, help="Width of every model."),
        click.option("--batch-size", default=64, type=int, help="Sequences of a training step."),
        click.option("--seed", "seeds", multiple=True, default=(0,), type=int, help="May be repeated: one run each."),
        click.option("--scan", default="auto", help="How recurrent layers are evaluated."),
        device_option,
        click.option("--out", type=click.Path(), metavar="DIR", help="Folder for the results and the picture."),
    ):
        command = option(command)
    return command


def _make_folder(out: str | None) -> None:
    """A name that can't be a folder fails before the work, not after it."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)


@tasks.command("run")
@click.argument("names", nargs=-1, required=True, metavar="TASK...")
@click.option("--layers", multiple=True, default=("recurrent", "first:1", "standard"), metavar="KIND",
              help="recurrent, standard or first:K; may be repeated.")  # fmt: skip
@click.option("--n-layers", multiple=True, default=(2,), type=int, help="Depth; may be repeated.")
@click.option("--n-heads", default=16, type=int, help="Heads of every model.")
@click.option("--position", default="alibi", help="alibi, rope or none.")
@click.option("--length", default=16, type=int, help="Positions of the training sequences.")
@click.option("--curriculum", multiple=True, type=int, metavar="N", help="Train at this shorter length first, until it "
              "is learned; may be repeated, rising.")  # fmt: skip
@click.option("--factor", "factors", multiple=True, default=(1, 2, 4, 8), type=int, help="Test at this multiple of it; "
              "may be repeated.")  # fmt: skip
@click.option("--steps", default=300, type=int, help="Training steps of each model.")
@click.option("--lr", default=3e-3, type=float, help="Peak learning rate.")
@click.option("--test-count", default=256, type=int, help="Sequences of each test.")
@click.option("--minutes", type=float, help="Train each model no longer than this.  [default: without limit]")
@_training_options
def tasks_run(names: tuple[str, ...], device: str, out: str | None, **settings: Any) -> None:
    """Train models on TASKs (see `recurformer tasks list`) and score them at the training length and beyond.

    Models of one depth have the same parameters. Every sequence is new; accuracy counts the second half of the
    positions.
    """
    from recurformer.experiments.tasks import sweep
    from recurformer.generation.text import pick_device

    chosen = sweep.TaskSettings(tasks=names, device=str(pick_device(device)), **settings)
    _bench("tasks", sweep.run_tasks, sweep.show_tasks, sweep.draw_tasks, chosen, out)


@tasks.command("hybrids")
@click.argument("on", default="text", metavar="[text|TASK]")
@click.option("--n-layers", default=4, type=int, help="Layers of every model.")
@click.option("--n-heads", default=8, type=int, help="Heads of every model.")
@click.option("--length", default=64, type=int, help="Positions of the training sequences.")
@click.option("--steps", default=200, type=int, help="Training steps of each model.")
@click.option("--lr", default=4e-3, type=float, help="Peak learning rate.")
@click.option("--placement", "only", multiple=True, metavar="LETTERS", help="R recurrent and S standard, first to "
              "last; may be repeated.  [default: all of interest]")  # fmt: skip
@_training_options
def tasks_hybrids(on: str, device: str, out: str | None, **settings: Any) -> None:
    """Which layers need recurrence: none, each single one, the first or last few, every other one, all.

    On the text inside the package, or on a task. The Transformer is also trained for twice and four times the steps, to
    compare at equal cost.
    """
    from recurformer.experiments.tasks import hybrids
    from recurformer.generation.text import pick_device

    chosen = hybrids.HybridSettings(on=on, device=str(pick_device(device)), **settings)
    _bench("hybrids", hybrids.run_hybrids, hybrids.show_hybrids, hybrids.draw_hybrids, chosen, out)


@cli.command()
@click.argument("source", type=click.Path(), metavar="SRC")
@click.argument("destination", type=click.Path(), metavar="DST")
@click.option("--to", default="recurformer", type=click.Choice(["recurformer", "hf", "llama", "official"]),
              help="Kind of folder to write.")  # fmt: skip
@click.option("--layers", metavar="KINDS", help="Change the layers: recurrent, standard, first:K, or the numbers of "
              "the recurrent ones, as 0,5.  [default: as they are]")  # fmt: skip
@click.option("--tokenizer", metavar="bytes|FILE|DIR", help="Put this one beside the model.  [default: that of SRC]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16", "fp64"]), help="Of the written parameters.  "
              "[default: as stored]")  # fmt: skip
def convert(
    source: str, destination: str, to: Any, layers: str | None, tokenizer: str | None, dtype: str | None
) -> None:
    """Write the model in SRC as another kind of folder, DST, which appears when it is complete.

    SRC is a model's or a run's folder, a Llama-style folder of Hugging Face (Llama, Mistral, Qwen2, Qwen3), or an
    official checkpoint. A recurformer folder loads in transformers as it is (import recurformer.hf first); "hf" adds
    what generation and tokenizers want there. Models without recurrent layers can be written as "llama".
    """
    import torch

    from recurformer import interop

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    config = interop.convert(
        source, destination, to, layers=layers, tokenizer=tokenizer, dtype=None if dtype is None else types[dtype]
    )
    count, kind = config.num_parameters(embedding=True), config.kind
    print(f"{destination}: {count:,} parameters, {config.n_layers} layers ({kind}), as {to}")


@cli.command()
@click.argument("target", required=False, metavar="[FOLDER|PRESET]")
@click.option("--layers", metavar="KIND", help="Of a preset: recurrent, standard or first:K.  [default: recurrent]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(target: str | None, layers: str | None, as_json: bool) -> None:
    """What a model is made of, and the scan that would run it here; without an argument, the presets. Then versions,
    devices and installed extras."""
    import json

    from recurformer import info

    if target is None and layers is not None:
        raise ValueError(f"--layers is {layers!r}, but no preset is named; give one of them")
    facts = None if target is None else info.describe(target, layers)
    if as_json:
        print(json.dumps({**(facts or {}), **info.environment()}))
        return
    if facts is None:
        info.show_presets()
    else:
        info.show(facts)
        print()
    info.show_environment()


@cli.command()
@click.option("--out", default="demo", type=click.Path(path_type=Path), metavar="DIR", help="Folder of data and runs.")
@click.option("--steps", type=click.IntRange(min=1), default=240, help="Optimizer steps of each model.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a training setting of all models.")
def demo(out: Path, steps: int, settings: tuple[str, ...]) -> None:
    """Train, compare and sample three small models. What is finished in OUT is kept, what was interrupted continues."""
    from recurformer.experiments.demo import run_demo
    from recurformer.training import TrainingError

    try:
        run_demo(out, steps, settings)
    except TrainingError as error:
        raise click.ClickException(str(error)) from error

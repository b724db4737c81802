"""`recurformer train`: a training run, or what it will cost."""

from __future__ import annotations

from pathlib import Path

import click

from recurformer.cli.common import command_line


class _DocumentsSettings(click.Command):
    """A command whose help ends with every setting of a training run."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from recurformer.training.reference import reference

        for section, summary, entries in reference():
            with formatter.section(f"Settings of [{section}]" if section else "Settings"):
                if summary:
                    formatter.write_text(summary)
                formatter.write_dl([(e.name, f"{e.doc}  [default: {e.default}]") for e in entries], col_max=26)


@click.command(cls=_DocumentsSettings)
@click.option("--config", "config_files", multiple=True, type=click.Path(), metavar="FILE", help="TOML, YAML or JSON "
              "file of settings.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change one setting; may be repeated.")
@click.option("--out", type=click.Path(), metavar="RUN", help="Folder of the run; required but for --dry-run.")
@click.option("--init-from", type=click.Path(), metavar="FOLDER", help="Start from the weights of this model or run; "
              "short for --set init_from=FOLDER.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue RUN from its newest checkpoint, with its own configuration "
              "unless --config gives one. With --config, RUN may be new.")  # fmt: skip
@click.option("--allow-change", multiple=True, metavar="NAME", help="Let this setting differ from the resumed run's; "
              "the new value holds from the next step on.")  # fmt: skip
@click.option("--stop-at", type=click.IntRange(min=0), metavar="STEP", help="Save and stop at this step.")
@click.option("--dry-run", is_flag=True, help="Print what the run will cost here (parameters, memory, time, disk), and "
              "write nothing. The data may be missing.")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1), metavar="N", help="With --dry-run: as many as torchrun would "
              "start, a GPU each.  [default: those that it has started]")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Show nothing but errors.")
def train(
    config_files: tuple[str, ...],
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

    SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 end the run after its step: it saves, and exits with 128 + the
    signal's number (Ctrl-C: 130). A second SIGINT or SIGTERM aborts at once. The exit code is 0 when the run is
    finished or --stop-at is reached, and 2 after an error.
    """
    from recurformer import training
    from recurformer.report import load_runs, write_report
    from recurformer.training.torchrun import torchrun_environment

    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'; only --dry-run goes without.")
    if processes is not None and not dry_run:
        raise click.UsageError("--processes is for --dry-run; torchrun --nproc-per-node starts several.")
    if allow_change and not resume:
        raise click.UsageError(f"--allow-change {allow_change[0]} is for --resume; a new run takes any setting.")
    file = _configuration(config_files, out if resume else None)
    if dry_run:
        from rich.console import Console

        from recurformer.training import estimate

        rank, started, _ = torchrun_environment()
        if rank == 0:
            found = estimate.estimate(
                training.read_train_config(file, settings, init_from=init_from, data_may_be_missing=True),
                processes or started,
            )
            estimate.show(found, Console(width=80))
        return 0
    assert out is not None
    try:
        result = training.train(
            training.read_train_config(file, settings, init_from=init_from), out,
            resume=resume, allow_change=allow_change, stop_at=stop_at, quiet=quiet,
        )  # fmt: skip
    except training.EndedElsewhereError:
        return 2
    except training.TrainingError as error:
        raise click.ClickException(str(error)) from error
    if result.signal is not None:
        return 128 + result.signal
    if torchrun_environment().rank == 0:
        write_report(load_runs([out]), Path(out) / "plots", f"Training run {Path(out).name}", command=command_line())
    return 0


def _configuration(files: tuple[str, ...], resumed: str | None) -> str | None:
    """Return the file of a run's configuration: the one that was given, that of the resumed run, or None."""
    if len(files) > 1:
        raise click.UsageError(
            f"--config is given {len(files)} times, and one file is a run's; merge {', '.join(files)}"
        )
    if files or resumed is None:
        return files[0] if files else None
    own = Path(resumed) / "config.json"
    if not own.is_file():
        raise click.UsageError(
            f"there is no run in {resumed} to resume: it has no config.json. Correct --out, or give --config to start "
            "a run there"
        )
    return str(own)

"""The `recurformer` command: verbs to functions, nothing else. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from recurformer.version import __version__


@click.group(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="recurformer")
def cli() -> None:
    """Train, evaluate, decode and compare Recurrent Transformers."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input ends in one line on stderr and exit code 2."""
    try:
        code = cli.main(args=arguments, prog_name="recurformer", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        print("recurformer: interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print("recurformer: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class _DocumentsSettings(click.Command):
    """A command whose help ends with every setting of a training run."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from recurformer.training.config import reference

        for section, summary, entries in reference():
            with formatter.section(f"Settings: [{section}]" if section else "Settings"):
                if summary:
                    formatter.write_text(summary)
                formatter.write_dl([(e.name, f"{e.doc}  [default: {e.default}]") for e in entries], col_max=26)


@cli.command(cls=_DocumentsSettings)
@click.option("--config", "config_file", type=click.Path(), help="TOML, YAML or JSON file of settings.", metavar="FILE")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change one setting; may be repeated.")
@click.option("--out", required=True, type=click.Path(), metavar="RUN", help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Continue RUN from its newest checkpoint, with its own configuration "
              "unless --config gives one.")  # fmt: skip
@click.option("--allow-change", multiple=True, metavar="NAME", help="Let this setting differ from the resumed run's; "
              "the new value holds from the next step on.")  # fmt: skip
@click.option("--stop-at", type=click.IntRange(min=0), metavar="STEP", help="Save and stop at this step.")
@click.option("--quiet", is_flag=True, help="Show nothing but errors.")
def train(
    config_file: str | None,
    settings: tuple[str, ...],
    out: str,
    resume: bool,
    allow_change: tuple[str, ...],
    stop_at: int | None,
    quiet: bool,
) -> int:
    """Train a model into RUN: config.json, metrics.jsonl and checkpoints/.

    SIGINT (Ctrl-C) and SIGTERM save after the step at hand and exit with 130 and 143; a second one aborts at once. The
    exit code is 0 when the run is finished or --stop-at is reached, and 2 after an error.
    """
    from pathlib import Path

    from recurformer import training

    own = Path(out) / "config.json"
    file = str(own) if resume and config_file is None and own.is_file() else config_file
    try:
        result = training.train(
            training.load_config(file, settings), out,
            resume=resume, allow_change=allow_change, stop_at=stop_at, quiet=quiet,
        )  # fmt: skip
    except training.TrainingError as error:
        raise click.ClickException(str(error)) from error
    return 0 if result.signal is None else 128 + result.signal


if __name__ == "__main__":
    main()

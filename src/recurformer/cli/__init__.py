"""The `recurformer` command: the table of its verbs, and what an error looks like.

Every verb has a module of its own. The module imports click alone; the verb's function imports the rest when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from recurformer.cli.groups import LazyGroup
from recurformer.version import __version__

VERBS = {
    "prepare": "recurformer.cli.prepare:prepare",
    "train": "recurformer.cli.train:train",
    "eval": "recurformer.cli.evaluate:evaluate",
    "generate": "recurformer.cli.generate:generate",
    "compare": "recurformer.cli.compare:compare",
    "info": "recurformer.cli.info:info",
    "convert": "recurformer.cli.convert:convert",
    "bench": "recurformer.cli.bench:bench",
    "tasks": "recurformer.cli.tasks:tasks",
    "demo": "recurformer.cli.demo:demo",
}
"""Name of each verb -> the module and the function that run it, in the order of `recurformer --help`."""

LONGEST_MESSAGE = 1500  # characters


@click.group(
    cls=LazyGroup,
    homes=VERBS,
    context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
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
    text = " ".join(message.split())
    if len(text) > LONGEST_MESSAGE:  # a name in it is long; the remedy stands at the end
        text = f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
    print(f"recurformer: error: {text}", file=sys.stderr)
    sys.exit(2)

"""The `recurformer` command: the table of its verbs, and what an error looks like.

Every verb has a module of its own. The module imports click alone; the verb's function imports the rest when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from recurformer.cli.errors import comes_from_interrupt, in_words
from recurformer.cli.groups import LazyGroup
from recurformer.cli.streams import drop_output, prepare_streams, say
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


@click.group(
    cls=LazyGroup,
    homes=VERBS,
    context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="recurformer")
def cli() -> None:
    """Train, evaluate, decode and compare Recurrent Transformers."""


def main(arguments: Sequence[str] | None = None, command: click.Command = cli, name: str = "recurformer") -> None:
    """Run a command and exit. Bad input ends in one line on stderr and exit code 2.

    Args:
        arguments: words of the command line. None: those of this process.
        command: the command to run.
        name: of the program, in its help.
    """
    prepare_streams()
    stdout = sys.stdout
    words = sys.argv[1:] if arguments is None else list(arguments)
    code: Any = None
    try:
        code = command.main(args=words, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message())
        sys.exit(2)
    except SystemExit as stop:
        # Where nobody reads on, rich exits with 1 while it handles the error, and click after it has replaced stdout.
        if isinstance(stop.__context__, BrokenPipeError) or sys.stdout is not stdout:
            sys.stdout = stdout
            _reader_left()
        raise
    except BrokenPipeError:
        _reader_left()
    except BaseException as error:  # the tokenizers' PanicException is no Exception
        if isinstance(error, click.Abort) or comes_from_interrupt(error):
            say("recurformer: interrupted")
            sys.exit(130)
        message = in_words(error, words)
        if message is None:
            raise
        drop_output()
        say(f"recurformer: error: {message}")
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _reader_left() -> None:
    """Exit well: in `recurformer ... | head` nobody reads on."""
    drop_output()
    sys.exit(0)

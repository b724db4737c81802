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
    _open_standard_streams()
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
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        from recurformer.hardware import is_out_of_memory
        from recurformer.reading import brief

        if is_out_of_memory(error):
            _fail(f"out of memory ({brief(error)}); {_less_memory(arguments)}")
        if isinstance(error, ValueError | OSError):
            _fail(str(error))
        raise
    except (click.Abort, KeyboardInterrupt):
        print("recurformer: interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _open_standard_streams() -> None:
    """Open the null device for stdin, stdout and stderr where the caller has closed them. Otherwise the next file to be
    opened gets such a descriptor, and messages are written into it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 (as long as the process)


LESS_MEMORY = {
    "train": "lower micro_batch_size, recurrent_micro_batch_size, evaluation.batch_size or data.window, or set "
    "recompute (a resumed run also needs --allow-change NAME)",
    "eval": "lower --batch-size or --window",
    "generate": "give fewer prompts at once or a shorter one, or lower --samples or --max-new-tokens",
    "prepare": "lower --workers",
    "convert": "use a machine with more memory: the whole model is held once",
    "tasks": "lower --batch-size or --d-model",
    "demo": "close other programs, or lower --set batch_size=N",
}
"""Name of a verb -> the options by which it takes less memory."""


def _less_memory(arguments: Sequence[str] | None) -> str:
    words = sys.argv[1:] if arguments is None else arguments
    verb = next((word for word in words if not word.startswith("-")), "")
    return LESS_MEMORY.get(verb, "lower the batch size or the length")


def _fail(message: str) -> None:
    text = " ".join(message.split())
    if len(text) > LONGEST_MESSAGE:  # a name in it is long; the remedy stands at the end
        text = f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
    print(f"recurformer: error: {text}", file=sys.stderr)
    sys.exit(2)

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


if __name__ == "__main__":
    main()

"""`recurformer compare`: training runs side by side."""

from __future__ import annotations

import click

from recurformer.cli.common import command_line


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...")
@click.option(
    "--out", default="compare", type=click.Path(), metavar="DIR", help="Folder for curves.png and report.html."
)
@click.option("--by", metavar="NAME,...", help="Columns that make groups, a row each for its best run. NAME is "
              "layers, kind, width, params, tokens, lr, beta2, seed or a setting, as optimizer.beta1.")  # fmt: skip
def compare(runs: tuple[str, ...], out: str, by: str | None) -> None:
    """Compare training runs: a table here, a picture of the curves and a page in DIR.

    The page holds the table, the curves, the settings that differ and the samples, and needs no other file.
    """
    from rich.console import Console

    from recurformer.report import load_runs, show, show_groups, write_report

    loaded = load_runs(runs)
    if by is not None:
        loaded = show_groups(loaded, [name.strip() for name in by.split(",") if name.strip()], Console())
    curves, page = write_report(loaded, out, command=command_line())
    if by is None:
        show(loaded, Console())
    print(f"curves: {curves}\npage:   {page}")

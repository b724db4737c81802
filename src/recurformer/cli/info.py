"""`recurformer info`: a model's facts, versions and devices."""

from __future__ import annotations

import click


@click.command()
@click.argument("target", required=False, metavar="[FOLDER|PRESET]")
@click.option(
    "--layers", metavar="KIND", help="Kind of a preset's layers: recurrent, standard or first:K.  [default: recurrent]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object as output.")
def info(target: str | None, layers: str | None, as_json: bool) -> None:
    """Show a model's shape and size, the algorithms that would run it here, versions and devices.

    Without an argument, show the presets. Installed extras are listed too.
    """
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

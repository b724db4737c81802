"""`recurformer info`: a model's facts, versions and devices."""

from __future__ import annotations

import click


@click.command()
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

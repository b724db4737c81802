"""Draws decode.png for docs/decoding.md from what `recurformer bench decode` measured on a GPU."""

import json
import pathlib

from recurformer.experiments.bench.decode import draw_decode

HERE = pathlib.Path(__file__).parent


def main(out: pathlib.Path = HERE) -> None:
    results = json.loads((HERE / "gpu" / "decode.json").read_text())
    (out / "decode.png").write_bytes(draw_decode(results))


if __name__ == "__main__":
    main()

"""Puts the result of `make demo` into README.md: `python docs/figures/demo.py demo` after it."""

import io
import re
import shutil
import sys
from pathlib import Path

from rich.console import Console

from recurformer.experiments.demo import MODELS
from recurformer.report import load_runs, show

README = Path(__file__).parents[2] / "README.md"


def main(folder: Path) -> None:
    runs = load_runs([folder / name for name in MODELS])
    buffer = io.StringIO()
    show(runs, Console(file=buffer, width=80))
    table = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
    start = runs[0].events("start")[0]
    versions = start["versions"]
    steps = runs[0].events("train")[-1]["step"]
    seconds = sum(run.events("train")[-1]["seconds"] for run in runs)
    where = f"{start['device']}, {start['threads']} threads, Python {versions['python']}, PyTorch {versions['torch']}"
    shutil.copy(folder / "curves.png", README.parent / "docs" / "figures" / "demo.png")
    window, batch = runs[0].config["data"]["window"], runs[0].config["batch_size"]
    text = f"""The demo trains three models with the same 786,432 matrix parameters on the same tokens in one order:
the `nano` preset with all layers recurrent, with only the first one recurrent, and a Transformer of twice the layers.
The text (Austen, Newton, State of the Union addresses) is inside the package. On {where},
{steps} steps of {batch} windows of {window} bytes took {seconds:.0f} seconds of training and printed

```
{table}
```

![Validation loss of the three models against tokens and against seconds](docs/figures/demo.png)

One seed and a very short run: this shows the tools, it does not measure the architecture. The page `demo/report.html`
adds samples and settings."""
    old = README.read_text(encoding="utf-8")
    new, count = re.subn(
        r"(<!-- demo -->\n).*?(<!-- /demo -->)", lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.DOTALL
    )
    assert count == 1
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

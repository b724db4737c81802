"""`python -m recurformer` is the `recurformer` command."""

from recurformer.cli import main

main()

"""Benchmarks, tasks, theory and the demo: nothing else of the package imports them."""

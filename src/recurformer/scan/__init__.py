"""Scans: several exact algorithms that turn the inputs of a recurrent layer into its outputs.

All scans have the signature of `recurformer.scan.reference.reference_scan` and are tested against it.
`recurformer.scan.algorithms` lists them by name, and `recurformer.choose` decides which one runs.
"""

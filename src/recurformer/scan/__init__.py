"""Recurrent layers, evaluated: one job ("given a layer's inputs x, return its outputs z"), several exact algorithms.

Every scan has the signature of `recurformer.scan.reference.reference_scan` and answers to it in tests.
`recurformer.scan.algorithms` has them by name, `recurformer.choose` decides which one runs.
"""

"""Speed and memory, measured; HBM traffic of the tiling, modelled and measured.

Each benchmark returns its rows and what they were made under as one dictionary that is ready for JSON; `show` functions
print tables, `draw` functions make pictures.
"""

from recurformer.experiments.bench.decode import DecodeSettings, bench_decode
from recurformer.experiments.bench.layer import LayerSettings, bench_layer
from recurformer.experiments.bench.memory import peak_memory
from recurformer.experiments.bench.model import ModelSettings, bench_model
from recurformer.experiments.bench.prefill import PrefillSettings, bench_prefill
from recurformer.experiments.bench.scan import ScanSettings, bench_scan
from recurformer.experiments.bench.traffic import MeasureSettings, TrafficSettings, bench_traffic, measure_traffic

__all__ = [
    "DecodeSettings",
    "LayerSettings",
    "MeasureSettings",
    "ModelSettings",
    "PrefillSettings",
    "ScanSettings",
    "TrafficSettings",
    "bench_decode",
    "bench_layer",
    "bench_model",
    "bench_prefill",
    "bench_scan",
    "bench_traffic",
    "measure_traffic",
    "peak_memory",
]

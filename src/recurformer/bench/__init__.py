"""Speed and memory of the scans, measured; HBM traffic of the tiling, modelled.

Each benchmark returns its rows and what they were made under as one dictionary that is ready for JSON; `show` functions
print tables, `draw` functions make pictures.
"""

from recurformer.bench.memory import peak_memory
from recurformer.bench.scan import ScanSettings, bench_scan
from recurformer.bench.traffic import TrafficSettings, bench_traffic

__all__ = ["ScanSettings", "TrafficSettings", "bench_scan", "bench_traffic", "peak_memory"]

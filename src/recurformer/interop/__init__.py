"""Models of other projects, read into ours. The core imports nothing of this."""

from recurformer.interop.official import load_official

__all__ = ["load_official"]

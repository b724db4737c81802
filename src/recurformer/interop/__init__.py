"""Models of other projects, read into ours and, where they can be, written back. The core imports nothing of this."""

from recurformer.interop.conversion import convert
from recurformer.interop.llama import load_llama, save_llama
from recurformer.interop.official import load_official, save_official

__all__ = ["convert", "load_llama", "load_official", "save_llama", "save_official"]

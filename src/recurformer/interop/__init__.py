"""Models of other projects, read into ours and, where possible, written back. No other room but the command uses it."""

from recurformer.interop.conversion import convert
from recurformer.interop.llama import load_llama, save_llama
from recurformer.interop.official import load_official, save_official

__all__ = ["convert", "load_llama", "load_official", "save_llama", "save_official"]

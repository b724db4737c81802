"""Graphs of both passes of one shape, recorded once and replayed for every chunk of every call.

An engine belongs to one stack of L layers of one shape (L = 1: a layer by itself). It owns the buffers of a chunk of C
positions, and runs a chunk of every layer as one step. Layer l is at chunk w - l at step w, so the layers of a stack
work on different chunks at the same time. A step is recorded once as a CUDA graph. The table in device memory holds
whatever differs between chunks, calls and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from recurformer.layer import LayerMaths
from recurformer.scan.fused.backward import BackwardPass
from recurformer.scan.fused.forward import ForwardPass
from recurformer.scan.fused.shape import EngineShape
from recurformer.scan.fused.table import Slot, TableEntries
from recurformer.scan.fused.weights import GradientSums
from recurformer.scan.fused.workspace import DeviceFacts, Workspace

OUTSIDE = -(2**30)  # a step at which no layer has a chunk


class Engine:
    """Buffers and graphs of one shape.

    Args:
        shape: of the stack.
        facts: of the device. Default: those of `shape.device`.
    """

    def __init__(self, shape: EngineShape, facts: DeviceFacts | None = None) -> None:
        self.shape = shape
        self.workspace = Workspace(shape, facts)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        # A stream of its own for recording: the shared one belongs to one device, and its workspaces to all graphs.
        self.stream = torch.cuda.Stream(shape.device) if self.workspace.facts.on_gpu else None

    @cached_property
    def forward(self) -> ForwardPass:
        """The forward pass; its buffers are made when it is first needed."""
        return ForwardPass(self.workspace)

    @cached_property
    def backward(self) -> BackwardPass:
        """The backward pass; its buffers are made when it is first needed."""
        return BackwardPass(self.workspace)

    @property
    def bytes(self) -> int:
        """Bytes of all buffers made so far."""
        return self.workspace.bytes

    def load(self, layers: Sequence[LayerMaths], slopes: Tensor | None) -> None:
        """Copy the weights of the layers, and the slopes of ALiBi."""
        self.workspace.weights.load(layers, slopes)

    def run_forward(self, steps: int, entries: TableEntries) -> None:
        """Write outputs and pairs, and the tensors that are kept for the backward."""
        self._run("forward", self.forward.step, steps, entries)

    def run_restore(self, steps: int, entries: TableEntries) -> None:
        """Write queries and pairs that the forward did not keep."""
        self._run("restore", self.backward.restore, steps, entries)

    def run_backward(self, steps: int, entries: TableEntries) -> GradientSums:
        """Write the gradients of the first layer's inputs, and return those of all weights."""
        sums = self.backward.gradients
        sums.zero()
        self._run("backward", self.backward.step, steps, entries)
        return sums

    def _run(self, name: str, step: Callable[[], None], steps: int, entries: TableEntries) -> None:
        """Do a step several times, w counting from 0."""
        if self.stream is None:
            for w in range(steps):
                self.workspace.fill_table(entries.row(w))
                step()
            return
        if name not in self.graphs:
            self.workspace.fill_table(entries.row(OUTSIDE))
            self.graphs[name] = self._record(step, self.stream)
        self.workspace.fill_table(entries.row(0))
        for _ in range(steps):
            self.graphs[name].replay()

    def _record(self, step: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """Return the graph of a step, which also advances w."""
        stream.wait_stream(torch.cuda.current_stream())
        # Once outside of all chunks: kernels are compiled and libraries set up, and nothing is written.
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize(self.shape.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
            self.workspace.table[Slot.STEP : Slot.STEP + 1].add_(1)
        return graph

    def wait(self) -> None:
        """Wait for recorded steps that still run, because their graphs must outlive them."""
        if self.graphs:
            torch.cuda.synchronize(self.shape.device)

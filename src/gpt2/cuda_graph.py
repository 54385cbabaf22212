"""A computation on a GPU as a CUDA graph: one call launches all its kernels, where Python would launch them singly."""

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


def record(function: Function, *inputs: Tensor) -> Function:
    """Return a function of tensors on a CUDA device recorded, for inputs of the shape of these or of fewer rows.

    It may not wait for the device. What it writes elsewhere, e.g. gradients, lies in the same place each time; its
    outputs are copies. Random numbers are drawn anew each time. These inputs are overwritten.
    """
    device = inputs[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function(*inputs)  # loads what must not be loaded while recording
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function(*inputs)

    def replay(*new_inputs: Tensor) -> tuple[Tensor, ...]:
        for memory, new in zip(inputs, new_inputs, strict=True):
            memory[: len(new)].copy_(new.contiguous().pin_memory(), non_blocking=True)  # does not wait for the device
        with torch.cuda.device(device):
            graph.replay()
        return tuple(output.clone() for output in outputs)

    return replay

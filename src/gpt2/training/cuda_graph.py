"""A computation on a GPU as a CUDA graph: one call launches all its kernels, where Python would launch them singly."""

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


def capture(function: Function, *inputs: Tensor) -> Function:
    """Capture a function, which may not wait for the device, of inputs on a CUDA device, which are overwritten.

    The captured one takes tensors on the CPU, of these inputs' shapes or of fewer rows; the other rows then stay what
    they were, and the outputs still have all rows. The outputs are copies; what the function writes elsewhere, e.g.
    gradients, lies in the same place each time. Random numbers are drawn anew.
    """
    device = inputs[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function(*inputs)  # loads what must not be loaded while capturing
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

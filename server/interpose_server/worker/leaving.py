"""Saved tensors on their way to where the publisher reads them, while the model goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from interpose.errors import InternalError
from interpose.graph.values import TensorSpec
from interpose.wire.tensors import encode_tensor, tensor_spec


@dataclass(frozen=True, slots=True)
class Leaving:
    """Args:
    spec: known at once.
    ready: whether `data` neither waits nor copies.
    bring: the tensor in this machine's memory; waits for it if need be.
    """

    spec: TensorSpec
    ready: Callable[[], bool]
    bring: Callable[[], torch.Tensor]

    def data(self) -> memoryview:
        """Its bytes, in row-major order. Raises InternalError if the device failed on the way."""
        return encode_tensor(self.bring()).data


def leave(tensor: torch.Tensor) -> Leaving:
    """Begin to bring a final value to this machine's memory; nothing may change it from here on.

    Called on the engine's thread, which it doesn't hold up: what has to be copied is copied on a stream of its own,
    or by whoever asks for the bytes.

    Raises:
        BadArgument: the tensor has no wire form.
    """
    spec = tensor_spec(tensor)
    start = STARTS.get(tensor.device.type)
    if start is not None:
        return Leaving(spec, *start(tensor.detach()))
    here = tensor.detach().cpu()
    return Leaving(spec, here.is_contiguous, lambda: here)


class SideStreams:
    """Copies from CUDA devices into pinned memory, on one stream a device, beside the model's.

    Pinned memory comes from torch's cache of it, which gives a block out again only when the copy into it is over
    and its bytes have been published.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, tensor: torch.Tensor) -> tuple[Callable[[], bool], Callable[[], torch.Tensor]]:
        with torch.cuda.device(tensor.device):
            plain = tensor.resolve_conj().resolve_neg()
            side = self._streams.get(tensor.device)
            if side is None:
                side = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            # The value may still have to be computed; and what the model computes next doesn't wait for the copy.
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            host = torch.empty(plain.shape, dtype=plain.dtype, pin_memory=True)
            over = torch.cuda.Event()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(side):
                host.copy_(plain, non_blocking=True)
                over.record(side)
            # The engine may let go of the tensor before the copy is over: its memory isn't given out until then.
            plain.record_stream(side)

        def bring() -> torch.Tensor:
            try:
                over.synchronize()
            except RuntimeError as error:
                raise InternalError("the device failed before a value had left it") from error
            return host

        return over.query, bring


STARTS: dict[str, Callable[[torch.Tensor], tuple[Callable[[], bool], Callable[[], torch.Tensor]]]] = {
    "cuda": SideStreams().start
}
"""By kind of device: how to begin. Others are copied on the spot."""

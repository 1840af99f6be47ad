"""The methods by which torch's tensors are moved, cast and copied, for what holds several."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adatape_kernels.arguments import shown

if TYPE_CHECKING:  # Python has Self from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Self


class TensorMethods:
    """Moves, casts and copies all tensors of an object at once, as `torch.Tensor` does with one.

    What a tensor means decides whether it is cast. Values are; offsets, lengths and indices keep
    their dtype whatever is asked for, and only move. Gradients pass as they do through the methods
    of a tensor.
    """

    @property
    def device(self) -> torch.device:
        """The device on which all tensors lie; each class says so."""
        raise NotImplementedError

    def _with_tensors(
        self, of_values: Callable[[Tensor], Tensor], of_numbers: Callable[[Tensor], Tensor]
    ) -> "Self":
        """Return the object with other tensors, or itself where each of them stayed the same.

        Each class defines it.

        Args:
            of_values: gives what takes the place of a tensor that may be cast.
            of_numbers: gives what takes the place of offsets, lengths and indices.
        """
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> "Self":
        """Return the object on another device or in another dtype.

        Args:
            args, kwargs: those of `torch.Tensor.to`, in any of its forms: a dtype, a device, both,
                or a tensor to be like; then non_blocking, copy and memory_format.

        Returns:
            The object itself where nothing changes and no copy is asked for.

        Raises:
            TypeError: `torch.Tensor.to` does not take such arguments.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
            >>> batch.to("cpu", torch.float64).data.dtype, batch.to(torch.float32) is batch
            (torch.float64, True)
        """
        flags = [given for given in args if isinstance(given, bool)] + [False, False]
        target = args[0] if args else kwargs.get("device", kwargs.get("other"))
        device: Any = self.device
        if isinstance(target, Tensor):
            device = target.device
        elif isinstance(target, str | int | torch.device) and not isinstance(target, bool):
            device = target
        moved = {
            "non_blocking": kwargs.get("non_blocking", flags[0]),
            "copy": kwargs.get("copy", flags[1]),
        }
        try:
            return self._with_tensors(
                lambda values: values.to(*args, **kwargs),
                lambda numbers: numbers.to(device, **moved),
            )
        except TypeError:
            given = ", ".join([*map(shown, args), *(f"{k}={shown(v)}" for k, v in kwargs.items())])
            raise TypeError(
                f"to: expected a device, a dtype or a tensor, as Tensor.to does, got {given}"
            ) from None

    def cpu(self) -> "Self":
        """Return the object on the host.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
            >>> batch.cpu() is batch
            True
        """
        return self.to("cpu")

    def cuda(
        self, device: int | str | torch.device | None = None, non_blocking: bool = False
    ) -> "Self":
        """Return the object on a GPU.

        Args:
            device: which one; None for the current one.
            non_blocking: whether a copy from pinned memory may still run when this returns.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
            >>> batch = batch.cuda(non_blocking=True) if torch.cuda.is_available() else batch
        """
        return self._with_tensors(
            lambda values: values.cuda(device, non_blocking),
            lambda numbers: numbers.cuda(device, non_blocking),
        )

    def half(self) -> "Self":
        """Return the object with its values in float16.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> half = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8)).half()
            >>> half.data.dtype, half.cu_inputs.dtype
            (torch.float16, torch.int32)
        """
        return self.to(torch.float16)

    def bfloat16(self) -> "Self":
        """Return the object with its values in bfloat16.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8)).bfloat16().dtype
            torch.bfloat16
        """
        return self.to(torch.bfloat16)

    def double(self) -> "Self":
        """Return the object with its values in float64.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8)).double().dtype
            torch.float64
        """
        return self.to(torch.float64)

    def float(self) -> "Self":
        """Return the object with its values in float32.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8)).half().float().dtype
            torch.float32
        """
        return self.to(torch.float32)

    def pin_memory(self) -> "Self":
        """Return the object in page-locked memory of the host, as a DataLoader asks for it.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
            >>> batch = batch.pin_memory() if torch.cuda.is_available() else batch
        """
        return self._with_tensors(Tensor.pin_memory, Tensor.pin_memory)

    def detach(self) -> "Self":
        """Return the object over the same memory, without a history of gradients.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8, requires_grad=True))
            >>> batch.data.requires_grad, batch.detach().data.requires_grad
            (True, False)
        """
        return self._with_tensors(Tensor.detach, Tensor.detach)

    def clone(self) -> "Self":
        """Return a copy, through which gradients pass.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
            >>> _ = batch.clone().data.fill_(1.0)
            >>> batch.data.sum().item()
            0.0
        """
        return self._with_tensors(torch.clone, torch.clone)

"""torch's FSDP2 around a model: each rank holds a part of each parameter alone."""

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.layers import ElasticEncoder
from adatape_kernels.models import Classifier
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.distributed.shared_gradients import Compute, LossOfModel

# For each model that is divided a copy without parameters, from which a whole one is made.
_PLAIN: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()


def check_fsdp() -> None:
    """Raise ValueError where torch has no FSDP2 that takes what a rank has not used for zeros."""
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(
            "parallel: expected ddp with a torch whose FSDP2 has no "
            f"set_reduce_scatter_unused_params, as {torch.__version__}, got fsdp"
        )


class DividedParameters:
    """Computes a model whose parameters are divided among the ranks, as are their gradients.

    The encoder's layers are brought together one after another, in the forward pass and once more
    in the backward pass, and everything else for the whole step. A model that halts is brought
    together at once: how often its layers are called depends on the images of a rank, and ranks
    bring together the same things in the same order.

    Args:
        model: the model on this rank's device, equal on all ranks; it is divided in place.
        ranks: the processes.
        optimizer: that of the model's parameters, whose state is divided with them.
        averaged: the moving average of the model's parameters, which is divided too.
    """

    def __init__(
        self,
        model: Classifier,
        ranks: Ranks,
        optimizer: Optimizer | None = None,
        averaged: AveragedModel | None = None,
    ):
        self.module = LossOfModel(model)
        self.ranks = ranks
        self._used: set[str] = set()
        whole = dict(model.named_parameters())
        _divide(model, ranks)
        if averaged is not None:
            _divide(averaged.module, ranks)
        if optimizer is not None:
            _divide_state(optimizer, whole, dict(model.named_parameters()))
        for prefix, module in model.named_modules():
            if _is_unit(module):
                _Uses(module, prefix, self._used)

    def __call__(self, compute: Compute, **limits: Any) -> Any:
        """Call the model, as LossOfModel does."""
        return self.module(compute, **limits)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return this rank's parts of the parameters."""
        return self.module.parameters()

    @contextlib.contextmanager
    def backward_pass(self, last: bool) -> Iterator[None]:
        """Bring together the gradients of a part of the step while its backward pass runs.

        Behind the last part a parameter that no rank has used has the gradient None.
        """
        yield
        if not last:
            return
        parameters = dict(self.module.model.named_parameters())
        device = next(iter(parameters.values())).device
        used = torch.tensor([name in self._used for name in parameters], device=device).int()
        self._used.clear()
        counts = self.ranks.summed(used).tolist()
        for parameter, count in zip(parameters.values(), counts, strict=True):
            if not count:
                parameter.grad = None


class _Uses:
    """Notes which parameters of a module get gradients from this rank's own backward pass."""

    def __init__(self, module: nn.Module, prefix: str, used: set[str]):
        self._prefix, self._used = prefix, used
        # torch has brought the parameters together before this is called.
        self._first = module.register_forward_pre_hook(self._register)

    def _register(self, module: nn.Module, inputs: object) -> None:
        """Watch the parameters of the module's first call, which all later calls have."""
        self._first.remove()
        for name, parameter in module.named_parameters(self._prefix):
            if not is_part(parameter):
                note = functools.partial(self._note, name)
                parameter.register_post_accumulate_grad_hook(note)

    def _note(self, name: str, parameter: Tensor) -> None:
        self._used.add(name)


def is_divided(model: nn.Module) -> bool:
    """Return whether each rank holds a part of a model's parameters alone."""
    return model in _PLAIN


def is_part(tensor: Tensor) -> bool:
    """Return whether a tensor is divided among the ranks."""
    return hasattr(tensor, "full_tensor")


def part_of(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor that is divided."""
    divided: Any = tensor
    part: Tensor = divided.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return all rows of a tensor; all ranks call this together where it is divided."""
    if not is_part(tensor):
        return tensor
    divided: Any = tensor
    found: Tensor = divided.full_tensor()
    return found


def whole_model(model: nn.Module) -> nn.Module:
    """Return a model with whole parameters on each rank; all ranks call this together.

    Args:
        model: any model; one that is not divided is returned.
    """
    plain = _PLAIN.get(model)
    if plain is None:
        return model
    divide_again(model)
    tensors = {name: whole(tensor).detach() for name, tensor in model.state_dict().items()}
    plain.load_state_dict(tensors, assign=True)
    return plain.train(model.training)


def divide_again(model: nn.Module) -> None:
    """Give up the parameters of other ranks that evaluating a model has brought together."""
    for module in model.modules():
        if _is_unit(module):
            unit: Any = module
            unit.reshard()


def _is_unit(module: nn.Module) -> bool:
    """Return whether the parameters of a module are brought together when it is called."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _divide(model: nn.Module, ranks: Ranks) -> None:
    """Divide a model's parameters in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            nothing = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(module, name, nothing)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (ranks.count,))
    encoder = getattr(model, "encoder", None)
    if type(encoder) is ElasticEncoder:
        for layer in encoder.layers:
            fully_shard(layer, mesh=mesh)
    root: Any = fully_shard(model, mesh=mesh)
    root.set_reduce_scatter_unused_params(True)
    _PLAIN[model] = plain


def _divide_state(
    optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Let an optimizer go on with parameters that were divided.

    Args:
        optimizer: that of the whole parameters.
        before: the whole parameters by name.
        after: the divided ones.
    """
    from torch.distributed.tensor import distribute_tensor

    names: dict[Tensor, str] = {parameter: name for name, parameter in before.items()}
    states = {names[parameter]: state for parameter, state in optimizer.state.items()}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = [after[names[parameter]] for parameter in group["params"]]
    for name, state in states.items():
        like: Any = after[name]
        optimizer.state[like] = {
            # All ranks hold the same whole tensor, so that none has to be sent.
            key: distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
            if value.shape == like.shape
            else value
            for key, value in state.items()
        }

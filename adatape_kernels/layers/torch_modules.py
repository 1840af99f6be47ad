"""torch's own modules: set up as AdaTape's public code does, and when a kernel may replace them."""

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from adatape_kernels import ops

NORM_EPS = 1e-6
"""Epsilon of every LayerNorm, as in the public JAX code; torch's own default is 1e-5."""

_PLAIN_WEIGHTS = (nn.Parameter, Tensor)


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear module whose weight is Xavier uniform and whose bias is zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a kernel may take a module's weight and bias instead of calling the module.

    That is true of a module that does what its class, `kind`, does and no more. Everything else is
    called: another class, be it an adapter, a subclass, or what parametrisation, quantisation or
    sharding made of the module; a module that `is_bare` says no to; one whose weight is no ordinary
    tensor. This is the one place that decides so, and takes a fraction of a microsecond.

    Args:
        module: a submodule of one of our layers.
        kind: `nn.Linear` or `nn.LayerNorm`.
    """
    if type(module) is not kind or not is_bare(module):
        return False
    weight = module.__dict__["_parameters"].get("weight")
    if type(weight) in _PLAIN_WEIGHTS:
        return True
    # A subclass of Tensor that wraps other tensors, such as a sharded or a quantised one, has a
    # method that takes it apart; another may answer torch's functions itself. The tensors that
    # torch traces with do neither.
    return (
        weight is not None
        and not hasattr(type(weight), "__tensor_flatten__")
        and type(weight).__torch_function__ is nn.Parameter.__torch_function__
    )


def is_bare(module: nn.Module) -> bool:
    """Return whether calling a module runs the forward of its class and nothing else.

    Pruning and the old weight_norm are hooks. Hooks on all modules of a process at once do not
    count: torch's FLOP counter and its profilers set them, and are to see what runs without them.
    torch has no public way to ask for hooks, which is why this reads the module's dictionary.
    """
    fields = module.__dict__
    return not (
        fields["_forward_pre_hooks"]
        or fields["_forward_hooks"]
        or fields["_backward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields.get("_compiled_call_impl") is not None
        or "forward" in fields
    )


def make_weights(module: nn.Module) -> None:
    """Let pruning and the old norms of weights make a module's parameters anew.

    They do so in hooks that run when the module is called, which is for who reads its parameters
    instead. Other hooks, which are there for the call's arguments, do not run.
    """
    for hook in module.__dict__["_forward_pre_hooks"].values():
        if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm)):
            hook(module, ())


def bias_of(module: nn.Linear | nn.LayerNorm) -> Tensor:
    """Return the bias of a plain module, or zeros where it has none."""
    bias: Tensor | None = module.bias
    return module.weight.new_zeros(module.weight.shape[0]) if bias is None else bias


def add_norm(x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x + branch and its norm: by the op, or by calling a norm that is not plain."""
    if is_plain(norm, nn.LayerNorm):
        return ops.add_layer_norm(x, branch, norm.weight, bias_of(norm), norm.eps)
    total = (x + branch).to(x.dtype)
    return total, norm(total)

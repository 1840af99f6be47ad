"""Runs a call of an op, forward and backward, as a user or below the public functions."""

import torch

from adatape_kernels import ops
from adatape_kernels.op_types import FFN, wide_dtype
from adatape_kernels.ops.op import NotServed, use_backend
from fuzz.breakages import broken
from fuzz.op_contract import judged
from fuzz.op_tensors import contiguous, laid_out
from fuzz.verdict import ERRORS, Fault, check_refusal, first_line

RESULTS = {
    "tape_select": ("indices", "weights", "counts", "ponder"),
    "tape_gather": ("tape", "offsets"),
    "tape_read": ("tape", "offsets", "indices", "weights", "counts", "ponder"),
    "elastic_attention": ("out",),
    "dual_ffn": ("y",),
    "add_layer_norm": ("total", "normed"),
    "elastic_attention_qkvpacked": ("out",),
    "compact_rows": ("packed", "kept_inputs", "kept_tapes", "source"),
    "accumulate_rows": ("sum",),
    "accumulate_rows_": ("sum",),
}
TORCH_RESULTS = {
    "tape_select": ("weights", "ponder", "indices", "counts"),
    "tape_gather": ("tape", "offsets"),
    "tape_read": ("tape", "weights", "ponder", "offsets", "indices", "counts"),
    "elastic_attention": ("out", "lse"),
    "dual_ffn": ("y", "hidden", "tape_hidden"),
    "add_layer_norm": ("total", "normed", "mean", "rstd"),
    "elastic_attention_qkvpacked": ("out", "lse"),
    "compact_rows": RESULTS["compact_rows"],
    "accumulate_rows": ("sum",),
    "accumulate_rows_": (),
}
DIFFERENTIABLE = {
    "tape_select": ("weights", "ponder"),
    "tape_gather": ("tape",),
    "tape_read": ("tape", "weights", "ponder"),
    "elastic_attention": ("out",),
    "dual_ffn": ("y",),
    "add_layer_norm": ("total", "normed"),
    "elastic_attention_qkvpacked": ("out",),
    "compact_rows": ("packed",),
    "accumulate_rows": ("sum",),
    "accumulate_rows_": (),
}
_FFN_NAMES = [f"{kind}{name}" for kind in ("", "tape_") for name in FFN._fields]
_BACKWARD_RESULTS = {
    "tape_select": ("dquery", "dkeys"),
    "tape_gather": ("dbank", "dweights"),
    "elastic_attention": ("dq", "dk", "dv"),
    "dual_ffn": ("dx", *(f"d{name}" for name in _FFN_NAMES)),
    "add_layer_norm": ("dx", "dweight", "dbias"),
    "elastic_attention_qkvpacked": ("dqkv",),
    "compact_rows": ("ddata",),
    "accumulate_rows": ("dtotal", "drows", "dweights", "dtotal_weights"),
}


class NotRun(Exception):
    """The call was refused, rightly, or its backend does not serve it: there are no results."""


def run(case, call):
    """Run a call that is broken already where the case says so, and count what ran.

    Returns:
        Results by name, gradients as "d" and the argument's name, or raises NotRun or Fault; and
        how the contract judges the call.
    """
    with use_backend(case["backend"]):
        return (_run_public if case["level"] == "public" else _run_torch)(case, call)


def attempt(judgement, backend, function):
    """Call a function; compare how that ends with what the contract says."""
    status, why = judgement
    try:
        results = function()
    except Exception as error:
        if status != "valid":
            check_refusal(error, (*ERRORS, NotServed))
            raise NotRun from None
        if isinstance(error, NotServed) and backend != "eager":
            check_refusal(error, (NotServed,))
            raise NotRun from None
        text = f"{type(error).__name__}: {first_line(error)}"
        raise Fault("refused a valid call", text) from error
    if status == "invalid":
        raise Fault("accepted an invalid call", why)
    return results


def with_breakages(case, call, place):
    """Return arguments in which what the case breaks at this place is broken."""
    call = dict(call)
    for name, argument, where in case["breakages"]:
        field = argument.rpartition(".")[2]
        ffn = call.get(argument.removesuffix(f".{field}"))
        if where != place:
            continue
        if argument in call:
            if not (case["level"] == "torch" and isinstance(call[argument], bool | None)):
                call[argument] = broken(name, call[argument])
        elif isinstance(ffn, FFN) and field in FFN._fields:
            changed = ffn._replace(**{field: broken(name, getattr(ffn, field))})
            call[argument.removesuffix(f".{field}")] = changed
        elif isinstance(ffn, FFN) and field == "tuple":
            call[argument.removesuffix(".tuple")] = tuple(ffn)[:3]
    return call


def torch_arguments(op, call):
    """Return the arguments of the torch op for a valid call of the public function."""
    call = {
        name: value.int()
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and op != "dual_ffn"
        else value
        for name, value in call.items()
    }
    if op != "dual_ffn":
        return call
    rows, of_tape = len(call["x"]), call["tape_ffn"]
    end, middle = call["num_rows"], call["num_input_rows"]
    on_device = isinstance(end, torch.Tensor)
    middle = end if of_tape is None else middle
    bounds = torch.stack([middle.long(), end.long()]) if on_device else None
    split = (None if of_tape is not None else rows) if on_device else middle
    most_tapes = 0 if of_tape is None else rows if on_device else end - middle
    parameters = (*call["input_ffn"], *(of_tape or (None,) * 4))
    return {
        "x": call["x"],
        "num_input_rows": split,
        "max_tape_rows": most_tapes,
        "bounds": bounds,
        "activation": call["activation"],
        **dict(zip(_FFN_NAMES, parameters, strict=True)),
    }


def cotangents(case, results):
    """Return a gradient for each differentiable result, by name."""
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    layout = case["layouts"].get("cotangent", "contiguous")
    found = {}
    for name in DIFFERENTIABLE[case["op"]]:
        x = results[name]
        dense = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        found[name] = laid_out(dense, layout)
        if case.get("dense"):
            found[name] = contiguous(found[name])
    return found


def _leaves(call):
    """Return differentiable copies of the float tensors by name, those of an FFN with a dot."""
    leaves = {}
    for name, value in call.items():
        parts = (
            {f"{name}.{field}": p for field, p in zip(FFN._fields, value, strict=True)}
            if isinstance(value, FFN)
            else {name: value}
        )
        for part, x in parts.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type == "cpu":
                leaves[part] = x.detach().requires_grad_()
    return leaves


def _with_leaves(call, leaves):
    return {
        name: FFN(*(leaves.get(f"{name}.{f}", p) for f, p in zip(FFN._fields, value, strict=True)))
        if isinstance(value, FFN)
        else leaves.get(name, value)
        for name, value in call.items()
    }


def _run_public(case, call):
    op = case["op"]
    judgement = judged(op, call, "public")
    leaves = _leaves(call) if case["gradients"] and DIFFERENTIABLE[op] else {}
    given = _with_leaves(call, leaves)
    function = getattr(ops, op)
    raw = attempt(judgement, case["backend"], lambda: function(**given))
    results = dict(zip(RESULTS[op], _flat(raw), strict=True))
    given_gradients = cotangents(case, results)
    outputs = [results[name] for name in given_gradients]
    if judgement[0] != "valid" or not any(x.requires_grad for x in outputs):
        return _detached(results), judgement
    if _change_kept(case, given, results):
        judgement = _judged_after_change(op, given, results)
    grads = attempt(
        judgement,
        case["backend"],
        lambda: torch.autograd.grad(
            outputs, list(leaves.values()), list(given_gradients.values()), allow_unused=True
        ),
    )
    results |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return _detached(results), judgement


def _run_torch(case, call):
    op = case["op"]
    judgement = judged(op, call, "torch")
    forward, backward = (getattr(torch.ops.adatape, n, None) for n in (op, f"{op}_bwd"))
    raw = attempt(judgement, case["backend"], lambda: forward(*call.values()))
    results = dict(zip(TORCH_RESULTS[op], _flat(raw), strict=True))
    if op == "accumulate_rows_":
        results["sum"] = call["total"]
    if op in ("tape_read", "accumulate_rows_") or not case["gradients"] or judgement[0] != "valid":
        return results, judgement
    changed = _change_kept(case, call, results)
    arguments = backward_arguments(op, call, results, cotangents(case, results))
    broken_arguments = with_breakages(case, arguments, "backward")
    judgement = judged(op, broken_arguments, "backward")
    values = list(broken_arguments.values())
    grads = attempt(judgement, case["backend"], lambda: backward(*values))
    if changed or any(where == "backward" for _, _, where in case["breakages"]):
        judgement = ("open", "what the backward got is not what the forward gave")
    results |= zip(_BACKWARD_RESULTS[op], _flat(grads), strict=True)
    if op == "accumulate_rows" and call["total_weights"] is None:
        # The gradient of the total is that of the sum, and nobody makes a copy of it.
        results = {n: x for n, x in results.items() if n not in ("dtotal", "dtotal_weights")}
    return results, judgement


def backward_arguments(op, call, results, given):
    """Return the arguments of the op of the backward pass, by name, in their order."""
    match op:
        case "tape_select":
            return {
                "query": call["query"], "keys": call["keys"], "dweights": given["weights"],
                "dponder": given["ponder"], "indices": results["indices"],
                "counts": results["counts"], "average_query": call["average_query"],
                "loss_type": call["loss_type"],
            }  # fmt: skip
        case "tape_gather":
            kept = {name: call[name] for name in ("bank", "indices", "weights", "counts")}
            return {"dtape": given["tape"], **kept}
        case "elastic_attention":
            saved = {"out": results["out"], "lse": results["lse"]}
            q, k, v, *rest = call.items()
            return {"dout": given["out"], **dict((q, k, v)), **saved, **dict(rest)}
        case "elastic_attention_qkvpacked":
            qkv, *rest = call.items()
            saved = {"out": results["out"], "lse": results["lse"]}
            return {"dout": given["out"], **dict([qkv]), **saved, **dict(rest)}
        case "compact_rows":
            source, rows = results["source"], len(call["data"])
            return {"dpacked": given["packed"], "source": source, "rows": rows}
        case "accumulate_rows":
            before = None if call["total_weights"] is None else call["total"]
            return {"dsum": given["sum"], **call, "total": before}
        case "dual_ffn":
            rest = {n: call[n] for n in ("num_input_rows", "bounds", "activation", *_FFN_NAMES)}
            saved = {name: results[name] for name in ("hidden", "tape_hidden")}
            return {"dy": given["y"], "x": call["x"], **saved, **rest}
        case "add_layer_norm":
            return {
                "dtotal": given["total"], "dnormed": given["normed"], "total": results["total"],
                "weight": call["weight"], "mean": results["mean"], "rstd": results["rstd"],
            }  # fmt: skip
    raise KeyError(op)


def _change_kept(case, call, results):
    """Change values in place behind autograd's back; return whether there was anything to change.

    int64 arguments are converted, so that what the backward keeps is no memory of the caller.
    """
    changed = False
    for name, argument, where in case["breakages"]:
        kept = results.get(argument, call.get(argument))
        if where != "between" or not isinstance(kept, torch.Tensor) or kept.dtype != torch.int32:
            continue
        new = broken(name, kept)
        if new.shape == kept.shape and kept.numel() and 0 not in kept.stride():
            kept.detach().numpy()[...] = new.numpy()
            changed = True
    return changed


def _judged_after_change(op, call, results):
    """Return how the contract judges the backward of a public call after such a change."""
    grads = {name: results[name].detach() for name in DIFFERENTIABLE[op]}
    values = {name: _plain(value) for name, value in {**call, **results}.items()}
    if op == "tape_read":
        key_dim = call["query"].shape[1]
        values["keys"], op = values["bank"][..., :key_dim], "tape_select"
    if op in ("elastic_attention", "elastic_attention_qkvpacked"):
        out = values["out"]
        values["lse"] = out.new_zeros(out.shape[1], out.shape[0], dtype=wide_dtype(out.dtype))
    arguments = backward_arguments(op, values, values, grads)
    for name in ("indices", "counts", "cu_inputs", "cu_tapes", "source"):
        if name in arguments and arguments[name].dtype == torch.int64:
            arguments[name] = arguments[name].int()
    status, why = judged(op, arguments, "backward")
    return ("open", "values changed before the backward") if status == "valid" else (status, why)


def _plain(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def _flat(raw):
    """Return the results one after another; a selection among them is four."""
    if raw is None:
        return []
    if isinstance(raw, torch.Tensor):
        return [raw]
    flat = []
    for each in raw:
        flat += _flat(each)
    return flat


def _detached(results):
    return {name: x.detach() for name, x in results.items()}

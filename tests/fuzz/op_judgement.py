"""Compares the results of a valid call with the exact ones, bit by bit where bits are promised."""

import torch

from adatape_kernels.op_types import FFN, wide_dtype
from fuzz import plain_ops
from fuzz.op_running import cotangents
from fuzz.op_tensors import same_bits
from fuzz.row_judgement import check_accumulated, check_compacted
from fuzz.selection_judgement import check_selection
from fuzz.verdict import Fault


def judge(case, call, results):
    """Raise Fault where results of a valid call of the public function's arguments are wrong."""
    op = case["op"]
    if op == "compact_rows":
        check_compacted(call, results, cotangents(case, results))
        return
    if op in ("accumulate_rows", "accumulate_rows_"):
        check_accumulated(call, results)
    if op == "elastic_attention_qkvpacked":
        case, call, results = _apart(case, call, results)
    if "indices" in results:
        keys = call["keys"] if op == "tape_select" else call["bank"][..., : call["query"].shape[1]]
        check_selection(call | {"keys": keys}, results)
    if op in ("tape_gather", "tape_read"):
        counts = call["counts"] if op == "tape_gather" else results["counts"]
        expected = torch.nn.functional.pad(counts.long().cumsum(0), (1, 0)).int()
        _check("offsets", torch.equal(results["offsets"], expected), results["offsets"])
    if op == "add_layer_norm":
        total = (call["x"] + call["branch"]).to(call["x"].dtype)
        _check("total", same_bits(results["total"], total), "another sum")
    for draws in _draws(wide_dtype(_dtype_of(call))):
        try:
            _judge_numbers(case, call, results, draws)
            return
        except Fault as fault:
            found = fault
    raise found


def _draws(of_sums):
    """Yield how often noise is drawn, by the dtype of the numbers that it disturbs; more decide."""
    yield {torch.float64: 4}
    # One draw may by chance be small, where a result is a single number.
    yield {torch.float64: 64}
    # In float64 numbers are close to each other. In the dtype of the sums those that cancel may do
    # so to the last bit, as ours may.
    if of_sums != torch.float64:
        yield {torch.float64: 64, of_sums: 64}


def _apart(case, call, results):
    """Return what is the same of `elastic_attention`, of a case in which one tensor is q, k and v.

    So the gradients of the three are judged by the errors of each.
    """
    case = {**case, "op": "elastic_attention"}
    parts = zip("qkv", call["qkv"].unbind(1), strict=True)
    results = dict(results)
    if "dqkv" in results:
        results |= zip(("dq", "dk", "dv"), results.pop("dqkv").unbind(1), strict=True)
    return case, {**dict(parts), **call}, results


def _judge_numbers(case, call, results, draws):
    """Raise Fault where numbers differ from the exact ones by more than rounding explains.

    `draws` is one of `_draws`.
    """
    op = case["op"]
    function, leaves = _FUNCTIONS[op](call, results)
    given = cotangents(case, results)
    dtype = _dtype_of(call)
    wide = wide_dtype(dtype)
    with torch.autograd.set_detect_anomaly(False):
        exact = _evaluate(function, leaves, given, torch.float64)
        plain = _evaluate(function, leaves, given, dtype, plain_ops.PEER)
        farthest = {name: _Farthest(x) for name, x in exact.items()}
        for of_numbers, number in draws.items():
            for seed in range(case["seed"], case["seed"] + number):
                jitter = _Noise(seed, dtype, wide)
                drawn = _evaluate(function, leaves, given, of_numbers, jitter)
                for name, each in farthest.items():
                    each.take(drawn[name].double())
        noise = {name: each.result() for name, each in farthest.items()}
    if op == "add_layer_norm":
        for found in (exact, plain, noise):
            found["dx"] = found["dbranch"] = found.pop("dtotal")
    finite = all(x.isfinite().all() for x in leaves.values())
    sound = None if finite else _sound_examples(op, call, results)
    for name, expected in exact.items():
        ours = results.get(name)
        if name not in given and (ours is None or (not finite and sound is None)):
            continue
        if name not in given and sound is not None and not sound.all():
            if name in ("dkeys", "dbank") and ours.dim() == 2:
                continue
            ours, expected, plain[name], noise[name] = (
                x[sound] for x in (ours, expected, plain[name], noise[name])
            )
        eps = torch.finfo(ours.dtype).eps
        if name == "dbranch":  # a branch of a wider dtype gets the gradient of x, converted
            eps = max(eps, torch.finfo(dtype).eps)
        _compare(name, ours, plain[name], expected, noise[name], finite or name in given, eps)


def _sound_examples(op, call, results):
    """Return the mask of examples that read finite numbers only; None where there is none.

    Gradients of the others are products of 0 and infinity, which depend on how one writes them.
    """
    if op == "dual_ffn":
        odd = [call["x"], *call["input_ffn"], *(call["tape_ffn"] or ())]
        # An infinite pre-activation by its bias alone has a slope, which is 0 or 1.
        del odd[2]
        return torch.tensor(True) if all(x.isfinite().all() for x in odd) else None
    if op not in ("tape_select", "tape_read"):
        return None
    bank = call["keys"] if op == "tape_select" else call["bank"]
    sound = []
    for i, count in enumerate(results["counts"].tolist()):
        own = bank if bank.dim() == 2 else bank[i]
        read = own[results["indices"][i, :count].long().flatten()]
        sound.append(bool(read.isfinite().all() and call["query"][i].isfinite().all()))
    return torch.tensor(sound, dtype=torch.bool)


def _dtype_of(call):
    """Return the dtype of a call, which is that of its first argument."""
    return next(iter(call.values())).dtype


class _Noise(plain_ops.Exact):
    """Disturbs what is wide by rounding errors of the wide dtype, the rest by the narrow one's."""

    def __init__(self, seed, dtype, wide):
        self.generator = torch.Generator().manual_seed(seed + 2)
        self.narrow_eps, self.wide_eps = torch.finfo(dtype).eps, torch.finfo(wide).eps

    def wide(self, x):
        return self._disturbed(x, self.wide_eps)

    def __call__(self, x):
        return self._disturbed(x, self.narrow_eps)

    def _disturbed(self, x, eps):
        draw = 2 * torch.rand(x.shape, generator=self.generator, dtype=x.dtype) - 1
        return x * (1 + eps * (draw + draw.sign()))


def _evaluate(function, leaves, given, dtype, jitter=plain_ops.EXACT):
    """Return results and gradients, "d" and the leaf's name, by torch's autograd in a dtype."""
    with torch.enable_grad():
        inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
        disturbed = {name: jitter.wide(x) for name, x in inputs.items()}
        results = function(disturbed, jitter)
        outputs = [results[name] for name in given if results[name].requires_grad]
        weights = [given[name].to(dtype) for name in given if results[name].requires_grad]
        weights = [jitter.wide(x) for x in weights]
        names = list(inputs)
        grads = (
            torch.autograd.grad(outputs, list(inputs.values()), weights, allow_unused=True)
            if outputs
            else [None] * len(names)
        )
    found = {name: x.detach() for name, x in results.items()}
    for name, grad in zip(names, grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(inputs[name]) if grad is None else grad
    return found


class _Farthest:
    """Of each element, the draw that is farthest from the exact one, or is not finite."""

    def __init__(self, exact):
        self.exact, self.found = exact, exact
        self.unstable = torch.zeros_like(exact, dtype=torch.bool)

    def take(self, draw):
        farther = (draw - self.exact).abs() > (self.found - self.exact).abs()
        self.found = torch.where(farther | ~draw.isfinite(), draw, self.found)
        self.unstable |= _class(draw) != _class(self.exact)

    def result(self):
        # An infinity whose sign is that of noise, or which comes and goes with it, is none.
        odd = self.unstable & ~self.exact.isfinite()
        return torch.where(odd, torch.where(self.exact.isnan(), 0, torch.nan), self.found)


def _compare(name, ours, plain, exact, noise, classes, eps):
    """Raise Fault unless an error is below twice that of plain torch, and what noise explains."""
    _check(name, ours.shape == exact.shape, f"shape {tuple(ours.shape)}")
    plain, ours64 = plain.double(), ours.double()
    info = torch.finfo(ours.dtype)
    finite = (
        exact.isfinite() & plain.isfinite() & noise.isfinite() & (exact.abs() < info.max * 0.98)
    )
    if classes:
        odd = ~exact.isfinite() & ~noise.isfinite() & ~plain.isfinite()
        same = (_class(exact) == _class(plain)) & (_class(exact) == _class(noise))
        wrong = odd & same & (_class(ours64) != _class(exact))
        _check(name, not wrong.any(), _first("wrong infinity or NaN", wrong, ours64, exact))
    if not finite.any():
        return
    wrong = finite & ~ours64.isfinite()
    _check(name, not wrong.any(), _first("not finite", wrong, ours64, exact), "not finite")
    error, allowed, noisy = ((x - exact)[finite].abs().max() for x in (ours64, plain, noise))
    largest = exact[finite].abs().max()
    # In float64 the "exact" results have errors of their own.
    factor = 64 if ours.dtype == torch.float64 else 16
    bound = 2 * allowed + factor * noisy + factor / 8 * eps * largest + info.tiny
    wrong = finite & ((ours64 - exact).abs() > bound)
    text = _first(f"error {error:.3g}, allowed {bound:.3g}", wrong, ours64, exact)
    _check(name, bool(error <= bound), text)


def _class(x):
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0.0))


def _first(what, wrong, ours, exact):
    if not wrong.any():
        return what
    where = tuple(wrong.nonzero()[0].tolist())
    return f"{what}: at {where} expected {exact[where].item():.9g}, got {ours[where].item():.9g}"


def _check(name, condition, text, kind="wrong result"):
    if not condition:
        raise Fault(f"{kind} {name}", f"{name}: {text}")


def _select(call, results):
    def function(leaves, jitter):
        weights, ponder = plain_ops.read_along(
            leaves["query"], leaves["keys"], results["indices"], results["counts"],
            call["average_query"], call["loss_type"], jitter,
        )  # fmt: skip
        return {"weights": weights, "ponder": ponder}

    return function, {"query": call["query"], "keys": call["keys"]}


def _gather(call, results):
    def function(leaves, jitter):
        bank, weights = leaves["bank"], leaves["weights"]
        rows = len(results["tape"])
        return {"tape": plain_ops.gather(bank, call["indices"], weights, call["counts"], rows)}

    return function, {"bank": call["bank"], "weights": call["weights"]}


def _read(call, results):
    key_dim, rows = call["query"].shape[1], len(results["tape"])

    def function(leaves, jitter):
        query, bank = leaves["query"], leaves["bank"]
        weights, ponder = plain_ops.read_along(
            query, bank[..., :key_dim], results["indices"], results["counts"],
            call["average_query"], call["loss_type"], jitter,
        )  # fmt: skip
        tape = plain_ops.gather(bank, results["indices"], weights, results["counts"], rows)
        return {"tape": tape, "weights": weights, "ponder": ponder}

    return function, {"query": call["query"], "bank": call["bank"]}


def _attention(call, results):
    def function(leaves, jitter):
        offsets = call["cu_inputs"], call["cu_tapes"]
        q, k, v = leaves.values()
        return {"out": plain_ops.attention(q, k, v, *offsets, call["softmax_scale"], jitter)}

    return function, {name: call[name] for name in "qkv"}


def _ffn(call, results):
    end = len(call["x"]) if call["num_rows"] is None else int(call["num_rows"])
    middle = end if call["tape_ffn"] is None else int(call["num_input_rows"])
    leaves = {"x": call["x"]}
    for name in ("input_ffn", "tape_ffn"):
        if call[name] is not None:
            leaves |= {f"{name}.{f}": p for f, p in zip(FFN._fields, call[name], strict=True)}

    def function(leaves, jitter):
        x, *parameters = leaves.values()
        of_tape = parameters[4:] or None
        return {
            "y": plain_ops.ffn(x, middle, end, parameters[:4], of_tape, call["activation"], jitter)
        }

    return function, leaves


def _accumulate(call, results):
    leaves = {n: call[n] for n in ("total", "rows", "weights", "total_weights")}

    def function(leaves, jitter):
        rest = leaves["weights"], leaves.get("total_weights")
        return {"sum": plain_ops.accumulate(leaves["total"], leaves["rows"], call["source"], *rest)}

    return function, {n: x for n, x in leaves.items() if x is not None}


def _norm(call, results):
    def function(leaves, jitter):
        total, weight, bias = leaves.values()
        return {
            "total": total * 1,
            "normed": plain_ops.norm(total, weight, bias, call["eps"], jitter),
        }

    return function, {"total": results["total"], "weight": call["weight"], "bias": call["bias"]}


_FUNCTIONS = {
    "tape_select": _select,
    "tape_gather": _gather,
    "tape_read": _read,
    "elastic_attention": _attention,
    "dual_ffn": _ffn,
    "add_layer_norm": _norm,
    "accumulate_rows": _accumulate,
    "accumulate_rows_": _accumulate,
}

"""Calls of torch.ops in which one argument is wrong, made in a process whose crash is noticed.

`python hostile_calls.py BACKEND` takes each valid call of small_calls.py, spoils one argument after
another in every way that it knows, and makes the call on the backend. Each must be refused in one
line, or give what the eager backend gives. `python hostile_calls.py adatape_cpu` calls the kernels
of csrc/cpu directly, below all of Python, and `adatape_cuda` those of csrc/cuda, which see no value
and so may give anything as long as they stay inside their memory.
"""

import sys

import emulation
import small_calls
import torch

from adatape_kernels.ops.op import operation, use_backend

DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int32, torch.int64, torch.complex64]
WRONG_NUMBERS = [-(2**62), -(2**31), -1, 0, 1, 33, 2**31, 2**62, 2**63, 2**70]
WRONG_FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0]
NOT_NUMBERS = [None, "x", 2.5, 1j, True, [1], object]


def spoiled(value):
    """Yield (how, another value) for an argument."""
    if isinstance(value, torch.Tensor):
        yield from spoiled_tensors(value)
    elif isinstance(value, bool):
        yield from (("as", other) for other in (None, "x", 1j, [True]))
    elif isinstance(value, str):
        yield from (("as", other) for other in (None, "", "x" * 1000, 5, "entropy\0"))
    elif isinstance(value, float):
        yield from (("as", other) for other in (*WRONG_FLOATS, *NOT_NUMBERS))
    else:
        yield from (("as", other) for other in (*WRONG_NUMBERS, value + 1, value - 1))
        yield from (("as", other) for other in NOT_NUMBERS)


def spoiled_tensors(x):
    yield "as", None
    yield "as", 5
    yield "more dimensions", x[None]
    yield "a dimension behind", x[..., None]
    yield "flat", x.reshape(-1)
    yield "scalar", x.reshape(-1)[0]
    yield "meta", x.to("meta")
    yield "sparse", x.to_sparse()
    for d in range(x.dim()):
        yield f"longer in {d}", torch.cat([x, x.narrow(d, 0, 1)], d)
        yield f"shorter in {d}", x.narrow(d, 0, x.shape[d] - 1)
        yield f"empty in {d}", x.narrow(d, 0, 0)
        yield f"half as long in {d}", x.narrow(d, 0, x.shape[d] // 2)
        yield f"much longer in {d}", torch.cat([x] * 40, d)
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield f"{dtype}", x.to(dtype)
    if x.is_floating_point():
        yield "nan", torch.full_like(x, float("nan"))
        yield "inf", torch.full_like(x, float("inf"))
        return
    if x.dtype == torch.bool:
        yield "all", torch.ones_like(x)
        return
    limits = torch.iinfo(x.dtype)
    for number in (-1, limits.min, limits.max, 10**8, 7, 0):
        for place in (0, x.numel() // 2, x.numel() - 1):
            other = x.clone()
            other.view(-1)[place] = number
            yield f"{number} at {place}", other
        yield f"{number} everywhere", torch.full_like(x, number)
    yield "reversed", x.flip(0)
    yield "one less", x - 1
    yield "one more", x + 1


def refusal(error):
    """Return None for a refusal as it should be, else what is wrong with it."""
    text, kind = str(error), type(error).__name__
    of_torch = "Expected a value of type" in text or "Overflow when unpacking" in text
    if of_torch or "cannot serve" in text or (DIRECT and isinstance(error, NotImplementedError)):
        return None  # the dispatcher's own, which no kernel sees
    if "\n" in text.partition("\nException raised from")[0]:
        return f"{kind} of several lines: {text[:300]}"
    right = isinstance(error, ValueError | TypeError) or DIRECT
    if not right or ": expected " not in text:
        return f"{kind}: {text[:300]}"
    return None


def tensors_of(results):
    return list(results) if isinstance(results, tuple) else [results]


def difference(actual, expected):
    """Return None where results are alike, as far as a look for gross errors can tell."""
    for i, (a, e) in enumerate(zip(tensors_of(actual), tensors_of(expected), strict=True)):
        if a.shape != e.shape or a.dtype != e.dtype or a.device != e.device:
            return f"result {i}: {a.dtype} {tuple(a.shape)}, not {e.dtype} {tuple(e.shape)}"
        tolerance = 0.05 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if not torch.allclose(a.double(), e.double(), tolerance, tolerance, equal_nan=True):
            return f"result {i} differs: {(a.double() - e.double()).abs().max()}"
    return None


def made(function, args, backend=None):
    """Return a call's results, or the error that it raised."""
    try:
        if backend is None:
            return function(*args)
        with use_backend(backend):
            return function(*args)
    except Exception as error:
        return error


def in_a_copy(op):
    """Return an op that works in place as a function that leaves its arguments and returns them."""

    def call(first, *rest):
        written = first.clone() if isinstance(first, torch.Tensor) else first
        op(written, *rest)
        return written

    return call


def verdict(op, args, how):
    """Make a call and return what is wrong with what came of it, or None."""
    public = getattr(torch.ops.adatape, op)
    called = getattr(getattr(torch.ops, SERVED_BY), op) if DIRECT else public
    if op.endswith("_"):
        public, called = in_a_copy(public), in_a_copy(called)
    flags = (
        [True]
        if SERVED_BY == "adatape_cuda"
        and op in ("tape_select_bwd", "tape_gather_bwd", "tape_read_bwd")
        else []
    )
    result = made(called, [*args, *flags], None if DIRECT else SERVED_BY)
    if isinstance(result, Exception):
        return refusal(result)
    # A backward that has another scale than its forward had may exceed the range of a half.
    rescaled = op.startswith("elastic_attention") and op.endswith("_bwd") and args[-1] != 0.5
    # Kernels for a GPU store an entry's gradient, as an example reads no entry of its bank twice.
    twice = SERVED_BY in ("triton", "cuda") and _reads_twice(op, *args)
    if how in ("nan", "inf") or rescaled or twice or SERVED_BY == "adatape_cuda":
        return None
    expected = made(public, args, "eager")
    if isinstance(expected, Exception):
        return f"taken, though eager says: {expected}"
    return difference(result, expected)


def _reads_twice(op, *args):
    """Whether an example reads an entry of a bank of its own more than once."""
    if op not in ("tape_select_bwd", "tape_read_bwd"):
        return False
    bank, (indices, counts) = args[1], args[-4:-2]
    reads = [row[:count].flatten() for row, count in zip(indices, counts.tolist(), strict=True)]
    return bank.dim() == 3 and any(len(row.unique()) < len(row) for row in reads)


def main():
    calls = 0
    dtype = torch.float32
    for op in small_calls.OPS:
        if SERVED_BY == "adatape_cuda" and "cuda" not in operation(op).implementations:
            continue
        on_cuda = SERVED_BY in ("cuda", "adatape_cuda")
        half = on_cuda and op.startswith("elastic_attention")
        for own_banks in (True, False) if "tape" in op else (True,):
            args = small_calls.call_of(
                op,
                torch.float16 if half else dtype,
                own_banks=own_banks,
                head_dim=64 if half else 8,
            )
            names = small_calls.names_of(op)
            wrong = verdict(op, args, "valid")
            assert wrong is None, (op, wrong)
            for place, name in enumerate(names):
                for how, value in spoiled(args[place]):
                    shown = repr(value)[:40] if how == "as" else how
                    label = f"{op} own_banks={own_banks} {name} {shown}"
                    print(f"call {label}", flush=True)
                    wrong = verdict(op, [*args[:place], value, *args[place + 1 :]], how)
                    calls += 1
                    if wrong is not None:
                        print(f"WRONG {label}: {wrong}", flush=True)
    print(f"{calls} calls")


if __name__ == "__main__":
    SERVED_BY = sys.argv[1]
    DIRECT = SERVED_BY.startswith("adatape_")
    torch.set_num_threads(1)
    if SERVED_BY in ("cuda", "adatape_cuda"):
        emulation.load_cuda_host(emulation.cuda_host_library())
    if SERVED_BY == "triton":
        emulation.keep_the_interpreter_ready()
    main()

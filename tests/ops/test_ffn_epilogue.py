"""The first product of `dual_ffn` in Triton with what follows it: its tiles, its choice."""

import importlib

import pytest
import torch
from checks import assert_same_bits
from ffn_cases import by_reference, double, gradients, inputs

from adatape_kernels.ops import dual_ffn, ffn_products, triton_runtime
from adatape_kernels.ops.device_facts import KIB, DeviceFacts

pytest.importorskip("triton")
OP = "dual_ffn"
UP = importlib.import_module("adatape_kernels.ops.dual_ffn.triton_up")
EPILOGUE = importlib.import_module("adatape_kernels.ops.dual_ffn.triton_epilogue")

A100 = DeviceFacts("A100", 163 * KIB, 108, (8, 0))
H200 = DeviceFacts("H200", 227 * KIB, 132, (9, 0))
B200 = DeviceFacts("B200", 227 * KIB, 148, (10, 0))
SMALL = DeviceFacts("RTX 5090", 99 * KIB, 170, (12, 0))
BOTH = (EPILOGUE.SavedBytes.FORWARD, EPILOGUE.SavedBytes.BACKWARD)


def parameters(dim, dtype):
    shapes = (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)
    return *(torch.empty(s, dtype=dtype, device="meta") for s in shapes), None, None, None, None


@pytest.mark.runs_no_op
@pytest.mark.parametrize(
    ("facts", "dim", "dtype", "expected"),
    [
        (H200, 384, torch.bfloat16, (True, True)),
        (H200, 768, torch.bfloat16, (False, True)),
        (H200, 1536, torch.float16, (False, False)),
        (H200, 390, torch.bfloat16, (False, False)),  # read element by element
        (H200, 384, torch.float32, (False, False)),
        (A100, 384, torch.bfloat16, (False, False)),
        (B200, 384, torch.bfloat16, (False, False)),
        (SMALL, 384, torch.bfloat16, (False, False)),
    ],
    ids=str,
)
def test_it_is_chosen_where_arithmetic_says_so(monkeypatch, facts, dim, dtype, expected):
    monkeypatch.setattr(EPILOGUE, "facts_of", lambda _: facts)
    x = torch.empty(50, dim, dtype=dtype, device="meta")
    assert tuple(EPILOGUE.pays(x, parameters(dim, dtype), saved) for saved in BOTH) == expected


@pytest.mark.runs_no_op
def test_two_blocks_fit_a_multiprocessor():
    x, w2 = torch.empty(9, 384, dtype=torch.bfloat16), [torch.empty(384, 64)]
    tiles = UP.up_tiles(x, w2, H200)
    threads = 32 * tiles.options["num_warps"]
    assert tiles.blocks * threads * tiles.options["maxnreg"] <= 65536
    assert [UP.up_tiles(x, w2, d).blocks for d in (A100, H200, B200, SMALL)] == [1, 2, 1, 1]


@pytest.mark.backends("triton")
@pytest.mark.parametrize("facts", [A100, SMALL], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("end", [150, 131, 0], ids=str)
def test_all_devices_forms_agree(monkeypatch, device, facts, end):
    """Operands by address and by descriptor; numpy's products of the two round differently."""
    x, *ffns, dy = inputs(
        150, device=device, dtype=torch.float16, dim=32, hidden=144, tape_hidden=80
    )
    x[end:] = dy[end:] = torch.nan
    given = x, min(131, end), *ffns, dy, torch.tensor(end, device=device)
    with ffn_products("epilogue"):
        expected = gradients(dual_ffn, *given)
        few = facts._replace(multiprocessors=3)
        monkeypatch.setattr(UP, "facts_of", lambda _: few)
        with triton_runtime.recording(run=True) as launches:
            actual = gradients(dual_ffn, *given)
    described = [each.arguments["in_desc"] is not None for each in launches]
    assert described == [facts is SMALL] * 3
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 4e-3 * e.abs().max()


@pytest.mark.backends("triton")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_rows_keep_their_bits_in_other_company(device, activation):
    """The pre-activations and activations of a row, wherever it stands in a tile."""
    x, *ffns, _ = inputs(160, device=device, dtype=torch.float16, dim=32, hidden=48, tape_hidden=16)
    flat = tuple(p for f in ffns for p in f)

    def up(rows, middle):
        counts = middle, len(rows) - middle
        return UP.forward(rows, counts, None, activation, UP.pairs(flat), sliced=True)

    whole, part = up(x, 140), up(x[37:151].clone(), 103)
    for all_rows, some in zip(whole, part, strict=True):
        assert_same_bits(some[0], all_rows[0][37:])
        assert_same_bits(some[1], all_rows[1][:11])


@pytest.mark.backends("triton")
@pytest.mark.parametrize("counts", [(0, 20), (20, 20), (20, 0), (0, 0)], ids=str)
def test_one_kind_or_none(device, counts):
    middle, end = counts
    x, *ffns, dy = inputs(24, device=device, dtype=torch.float16, dim=16, hidden=32, tape_hidden=16)
    middle = min(middle, end)
    with ffn_products("epilogue"):
        actual = gradients(dual_ffn, x, middle, *ffns, dy, end)
    rounded = gradients(by_reference, x, middle, *ffns, dy, end)
    x, dy, *ffns = double(x, dy, *ffns)
    exact = gradients(by_reference, x, middle, *ffns, dy, end)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        error, allowed = (a - e).abs().max(), 2 * (r - e).abs().max() + 1e-3
        assert error <= allowed

"""Spare rows: few numbers of rows in bfloat16 on a CPU, which nobody but torch's products sees."""

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adatape_kernels import ElasticBatch, layers, models
from adatape_kernels.layers import encoder as encoder_module
from adatape_kernels.layers import feed_forward, spare_rows
from adatape_kernels.layers.spare_rows import rounded_rows

OP = None
DIM = 16
ROWS = 100  # no other size of the products below is as large
BF16 = torch.bfloat16


class ProductRows(TorchDispatchMode):
    """Collects the numbers of rows of all products in bfloat16."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if tensors and tensors[0].dtype == BF16:
            if name in ("mm", "addmm", "bmm", "linear", "convolution", "convolution_backward"):
                sizes = [size for each in tensors for size in each.shape]
            elif name == "dual_ffn":  # (x, num_input_rows, max_tape_rows, …)
                sizes = args[1:3]
            elif name == "dual_ffn_bwd":  # (dy, x, hidden, tape_hidden, …)
                sizes = [len(args[2]), len(args[3])]
            else:
                sizes = []
            self.found.update(size for size in sizes if size > ROWS)
        return func(*args, **(kwargs or {}))


def encoder(tape_ffn_dim=8):
    torch.manual_seed(0)
    make = functools.partial(layers.TapeReader, DIM, topk=2, halt_threshold=99.0, query="gap")
    readers = {1: make(num_tape_tokens=2, tape_mlp_dim=8), 2: make(num_tape_tokens=1)}
    stack = [layers.ElasticEncoderLayer(DIM, 2, 32, tape_ffn_dim) for _ in range(3)]
    return layers.ElasticEncoder(stack, DIM, readers)


def ragged(step, dtype=BF16, examples=40):
    """Return a batch of examples of many lengths, and a bank."""
    generator = torch.Generator().manual_seed(step)
    lens = torch.randint(20, 40, (examples,), generator=generator)
    rows = torch.randn(int(lens.sum()), DIM, generator=generator).to(dtype).requires_grad_()
    bank = torch.randn(examples, 9, DIM, generator=generator).to(dtype)
    return ElasticBatch.from_packed(rows, torch.nn.functional.pad(lens.cumsum(0), (1, 0))), bank


def with_ragged_tapes(step, dtype=BF16, examples=40):
    """Return a batch of examples of one length, whose tapes have many lengths."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(examples, 40, DIM, generator=generator).to(dtype).requires_grad_()
    batch = ElasticBatch.from_padded(rows)
    lens = torch.randint(0, 9, (examples,), generator=generator)
    offsets = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    tape = torch.randn(int(lens.sum()), DIM, generator=generator).to(dtype)
    batch = batch.append_tape(tape, offsets, max_tapes=8)
    return batch, torch.randn(examples, 9, DIM, generator=generator).to(dtype)


def backward(y):
    (y.pool("mean").float() ** 2).sum().backward()


def rows_of_products(step_of, steps=20):
    """Return the numbers of rows that products have had in so many steps of training."""
    with ProductRows() as products:
        for step in range(steps):
            step_of(step)
    return products.found


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 500, 1000, 1024, 2047, 2049, 4417, 65537])
def test_few_more_rows(rows):
    rounded = rounded_rows(rows)
    assert rows <= rounded <= max(rows + 15, rows * (1 + 1 / 64))
    assert rounded_rows(rounded) == rounded


def test_there_are_few_numbers_of_rows():
    numbers = {rounded_rows(rows) for rows in range(4097, 8193)}
    assert len(numbers) <= 64


def all_rounded(found):
    return bool(found) and found == {*map(rounded_rows, found)}


@pytest.mark.parametrize("batch_of", [ragged, with_ragged_tapes])
@pytest.mark.parametrize("tape_ffn_dim", [0, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_products_of_an_encoder_have_few_numbers_of_rows(batch_of, tape_ffn_dim, autocast):
    dtype = torch.float32 if autocast else BF16
    model, totals = encoder(tape_ffn_dim).to(dtype), set()

    def step_of(step):
        batch, bank = batch_of(step, dtype)
        totals.add(len(batch.data))
        with torch.autocast("cpu", BF16, enabled=autocast):
            y, _ = model(batch, bank)
        assert y.exact and len(y.data) == int(y.lens.sum())
        backward(y)

    found = rows_of_products(step_of)
    assert len(totals) > 15
    assert all_rounded(found) and len(found) <= 24


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", ["uvit", "avit"])
def test_products_of_models_whose_rows_leave_have_few_numbers_of_rows(kind, checkpoints):
    options = {"image_size": 32, "patch_size": 4, "num_classes": 5, "dim": DIM, "depth": 4}
    options |= {"num_heads": 2, "ffn_dim": 32}
    torch.manual_seed(0)
    if kind == "uvit":
        model = models.UViT(models.UViTConfig(**options))
        torch.nn.init.normal_(model.encoder.unit.projection.weight)
    else:
        model = models.AViT(models.AViTConfig(**options, gate_scale=2.0, gate_center=0.0))
    model.set_grad_checkpointing(checkpoints)
    computed = set()

    def step_of(step):
        images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", BF16):
            output = model(images)
        computed.update(output.halted.rows_per_step)
        output.logits.float().square().sum().backward()

    found = rows_of_products(step_of, steps=6)
    assert len(computed) > 4 and not all_rounded(computed)
    assert all_rounded(found)


def test_images_of_many_sizes_have_few_numbers_of_patches():
    torch.manual_seed(0)
    options = {"image_size": 16, "dim": DIM, "depth": 2, "num_heads": 2, "ffn_dim": 32}
    options |= {"patch_size": 4, "bank_patch_size": 2, "tape_mlp_dim": 8, "topk": 2}
    model, numbers = models.AdaTapeViT(models.AdaTapeViTConfig(num_classes=5, **options)), set()

    def step_of(step):
        generator = torch.Generator().manual_seed(step)
        sides = torch.randint(2, 6, (24, 2), generator=generator) * 4
        numbers.add(int((sides // 4).prod(1).sum()))
        images = [torch.randn(3, *side, generator=generator) for side in sides.tolist()]
        with torch.autocast("cpu", BF16):
            output = model(images)
        output.logits.float().square().sum().backward()

    found = rows_of_products(step_of, steps=10)
    assert len(numbers) > 7
    # A strip of patches is as wide as they are together.
    assert all(any(rounded_rows(rows // n) * n == rows for n in (1, 2, 4)) for rows in found)


def choose(monkeypatch, spare):
    """Have batches of any dtype computed with spare rows, or none."""
    for module in (encoder_module, feed_forward, spare_rows):
        monkeypatch.setattr(module, "keeps_code_by_rows", lambda x: spare)


def results(model, batch, bank):
    """Return the encoded rows, and the gradients of the rows given and of all parameters."""
    model.zero_grad()
    batch = batch.with_data(batch.data.detach().requires_grad_())
    y, _ = model(batch, bank)
    backward(y)
    return [y.data.detach(), batch.data.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("batch_of", [ragged, with_ragged_tapes])
@pytest.mark.parametrize("tape_ffn_dim", [0, 8])
def test_results_are_those_without_spare_rows(batch_of, tape_ffn_dim, monkeypatch):
    model, given = encoder(tape_ffn_dim).to(BF16), batch_of(3, examples=7)
    found = {}
    for dtype in (torch.float64, BF16):
        in_dtype = copy.deepcopy(model).to(dtype)
        batch, bank = (each.to(dtype) for each in given)
        for spare in (False, True):
            choose(monkeypatch, spare)
            found[dtype, spare] = results(in_dtype, batch, bank)
    expected = found[torch.float64, False]
    for actual, exact in zip(found[torch.float64, True], expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
    for actual, plain, exact in zip(found[BF16, True], found[BF16, False], expected, strict=True):
        allowed = 2 * (plain - exact).norm() + 1e-3 * exact.norm() + 1e-6
        assert (actual - exact).norm() <= allowed


@pytest.mark.parametrize("batch_of", [ragged, with_ragged_tapes])
def test_what_stands_in_spare_rows_never_shows(batch_of, monkeypatch):
    model = encoder().to(BF16)
    batch, bank = batch_of(1)
    expected, added = results(model, batch, bank), []

    def with_numbers(x, rows):
        added.append(rows - len(x))
        return torch.cat([x, 100 * torch.randn(rows - len(x), x.shape[1]).to(x.dtype)])

    for module in (feed_forward, spare_rows):
        monkeypatch.setattr(module, "with_zero_rows", with_numbers)
    found = results(model, batch, bank)
    assert sum(added) > 0
    for actual, same in zip(found, expected, strict=True):
        assert torch.equal(actual, same)  # bit for bit


def test_poison_stays_in_its_example():
    model = encoder().to(BF16)
    batch, bank = ragged(1)
    first = int(batch.cu_inputs[1])
    poisoned = batch.with_data(batch.data.detach().index_fill(0, torch.arange(first), torch.nan))
    y, _ = model(poisoned, bank)
    others = y.example_of_rows() > 0
    assert y.data[others].isfinite().all() and y.data[~others].isnan().all()


@pytest.mark.parametrize("part", ["", "layers.0", "layers.1.self_attn", "layers.2.norm2"])
def test_hooks_see_the_rows_of_examples_alone(part):
    model = encoder().to(BF16)
    batch, bank = ragged(1)
    seen = []

    def hook(module, args, result):
        data = result[0] if isinstance(result, tuple) else result
        seen.append(len(data.data if isinstance(data, ElasticBatch) else data))

    model.get_submodule(part).register_forward_hook(hook)
    with ProductRows() as products:
        y, _ = model(batch, bank)
    assert {*seen} <= {len(batch.data), len(batch.data) + 80, len(y.data)}
    assert all_rounded(products.found) == (part == "")


def test_no_other_dtype_has_spare_rows(monkeypatch):
    def refuse(x, rows):
        raise AssertionError("spare rows")

    monkeypatch.setattr(spare_rows, "with_zero_rows", refuse)
    monkeypatch.setattr(feed_forward, "with_zero_rows", refuse)
    model = encoder()
    model(*ragged(1, torch.float32))
    with torch.autocast("cpu", torch.float16):
        model(*ragged(1, torch.float32))
    with pytest.raises(AssertionError, match="spare rows"):
        model.to(BF16)(*ragged(1))


@pytest.mark.parametrize("lens", [[], [0], [0, 3, 0], [0, 0, 17]])
def test_examples_without_rows(lens):
    model = encoder().to(BF16)
    bounds = torch.tensor([0, *lens]).cumsum(0)
    rows = torch.randn(sum(lens), DIM).to(BF16).requires_grad_()
    y, _ = model(ElasticBatch.from_packed(rows, bounds), torch.randn(len(lens), 9, DIM).to(BF16))
    backward(y)
    assert y.lens.tolist() == [length + 3 for length in lens]
    assert y.data.isfinite().all() and rows.grad.isfinite().all()

"""Models whose rows leave beside those that mask: adatape-kernels bench halting --quick

When what halts is imposed, the same for all providers: a unit that is to run h layers has the
halting probability 1 / h in each. The model's own halting unit is computed as well, and passes its
gradients. A training step is forward, loss and every gradient; no optimiser.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adatape_kernels.benchmarks.harness.cases import (
    ANY_BACKEND,
    OURS,
    BenchmarkCase,
    Prepared,
    Provider,
)
from adatape_kernels.benchmarks.harness.suites import (
    Selection,
    Size,
    Suite,
    for_products,
    shape_text,
)
from adatape_kernels.benchmarks.ops import halting_peers
from adatape_kernels.benchmarks.ops.bench_model import CLASSES, PIXELS, Variant, agree_on_most
from adatape_kernels.halting import HaltingState
from adatape_kernels.models import AViT, UViT, create_model
from adatape_kernels.recipes import measure

SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}
UNIFORM = "uniform"


class SparedLayers(str):
    """The percent of a model's layers that are left out; "uniform" spreads from 1 layer to all."""

    meaning = f"{UNIFORM}, or a number of percent from 0 to 90"

    def __new__(cls, value: object) -> "SparedLayers":
        text = super().__new__(cls, value)
        if text != UNIFORM and not (text.isdecimal() and int(text) <= 90):
            raise ValueError(value)
        return text

    def layers(self, units: int, depth: int) -> Tensor:
        """Return how many layers each unit runs, evenly spread, in a random order."""
        mean = (depth + 1) / 2 if self == UNIFORM else max(1, depth * (1 - int(self) / 100))
        half = min(mean - 1, depth - mean)
        spread = torch.linspace(mean - half, mean + half, units).round()
        return spread[torch.randperm(units)]


class HaltingModel(str):
    meaning = "avit or uvit"

    def __new__(cls, value: object) -> "HaltingModel":
        text = super().__new__(cls, value)
        if text not in ("avit", "uvit"):
            raise ValueError(value)
        return text


class HaltingShape(NamedTuple):
    model: HaltingModel = HaltingModel("avit")
    V: Variant = Variant("S/16")
    B: Size = Size(8)
    halted: SparedLayers = SparedLayers("50")


class ImposedHalting(nn.Module):
    """A halting unit whose probabilities are imposed, and whose gradients are those of another."""

    def __init__(self, own: nn.Module, layers: Tensor):
        super().__init__()
        self.own = own
        # The last entry is for what belongs to no unit.
        self.imposed = torch.nn.functional.pad(1 / layers, (0, 1))

    def forward(self, state: HaltingState, *data: Tensor) -> Tensor:
        own = self.own(state, *data)
        return state.of_units(self.imposed) + (own - own.detach())

    def of_peer(self, model: AViT | UViT) -> halting_peers.HaltingUnit:
        """Return the same for a peer, which has no state."""

        def probabilities(rows: Tensor, units: Tensor) -> Tensor:
            if isinstance(model, AViT):
                scale, center = model.config.gate_scale, model.config.gate_center
                own = torch.sigmoid(scale * rows[:, 0].float() - center)
            else:
                projection = model.encoder.unit.own.projection  # type: ignore[union-attr]
                own = torch.sigmoid(projection(rows.float())).mean(1).squeeze(1)
            return self.imposed[units] + (own - own.detach())

        return probabilities


class HaltingInputs(NamedTuple):
    model: AViT | UViT
    imposed: ImposedHalting
    images: Tensor
    labels: Tensor
    training: bool


def build(shape: HaltingShape, dtype: torch.dtype, device_type: str) -> HaltingInputs:
    """Make a model on which halting is imposed; a class token of A-ViT runs through all layers."""
    size, _, patch = shape.V.partition("/")
    name = f"{shape.model}_{SIZES[size]}_patch16_{PIXELS}"
    model: Any = create_model(name, num_classes=CLASSES, patch_size=int(patch))
    depth = model.config.depth
    nn.init.normal_(model.head.weight, std=model.config.dim**-0.5)
    rows = model.config.num_patches + 1
    if shape.model == "avit":
        layers = shape.halted.layers(shape.B * rows, depth).view(shape.B, rows)
        layers[:, 0] = depth
    else:
        layers = shape.halted.layers(shape.B, depth)
    model = model.to(device_type, dtype).eval()
    attribute = "gate" if shape.model == "avit" else "unit"
    own = getattr(model.encoder, attribute).float()
    imposed = ImposedHalting(own, layers.flatten().to(device_type))
    setattr(model.encoder, attribute, imposed)
    return HaltingInputs(model, imposed, torch.empty(0), torch.empty(0), False)


def inputs(given: HaltingInputs, shape: HaltingShape, training: bool) -> HaltingInputs:
    like = given.model.head.weight
    images = torch.randn(shape.B, 3, PIXELS, PIXELS, device=like.device).to(like.dtype)
    labels = torch.randint(CLASSES, (shape.B,), device=like.device)
    return given._replace(images=images, labels=labels, training=training)


def runner(
    given: HaltingInputs, forward: Callable[[Tensor], Any], loss: Callable[..., Tensor]
) -> Prepared:
    """Return a provider's forward or training step: logits, and all gradients as one vector."""
    parameters = list(given.model.parameters())

    def run() -> tuple[Tensor, ...]:
        if not given.training:
            with torch.no_grad():
                return (forward(given.images).logits,)
        out = forward(given.images)
        grads = torch.autograd.grad(loss(out, given.labels), parameters)
        return (out.logits, *grads)

    def results(found: Sequence[Tensor]) -> list[Tensor]:
        logits, *grads = found
        return [logits, torch.cat([g.flatten().float() for g in grads])] if grads else [logits]

    return Prepared(run, results)


def computed_share(given: HaltingInputs) -> float:
    """Return how many of the rows that the masked model computes ours computes."""
    layers = 1 / given.imposed.imposed[:-1]
    return (layers.mean() / layers.max()).item()


def elastic(given: HaltingInputs) -> Prepared:
    prepared = runner(given, given.model, given.model.loss)
    return prepared._replace(note=f"{100 * computed_share(given):.1f} % of the rows")


def masked(given: HaltingInputs) -> Prepared:
    return runner(given, given.model.padded(), given.model.loss)


def peer(make: Callable[..., halting_peers.Forward], **options: Any) -> Any:
    """Prepare a peer, compiled with these options if there are any."""

    def prepare(given: HaltingInputs) -> Prepared:
        forward = make(given.model, given.imposed.of_peer(given.model))
        if options:
            forward = torch.compile(forward, **options)
        return runner(given, forward, halting_peers.loss)

    return prepare


def reference(given: HaltingInputs) -> list[Tensor]:
    """Return the results of the masked model in float32."""
    dtype = given.images.dtype
    exact = given._replace(images=given.images.float(), model=given.model.float())
    each = masked(exact)
    found = list(each.results(each.run()))
    given.model.to(dtype)
    given.imposed.own.float()
    return found


HALTING_OPS = ("elastic_attention_qkvpacked", "dual_ffn", "accumulate_rows")
PEERS = ("masked", "masked, compiled", "x[mask]")


def case(
    shape: HaltingShape, direction: str, dtype: torch.dtype, device_type: str
) -> BenchmarkCase:
    training = direction == "training step"
    torch.manual_seed(0)
    model = build(shape, dtype, device_type)
    given = inputs(model, shape, training)
    parameters = sum(p.numel() for p in given.model.parameters()) * dtype.itemsize
    plain, compiled, boolean = PEERS
    called = [*HALTING_OPS, *(f"{op}_bwd" for op in HALTING_OPS if training)]
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: inputs(model, shape, training),
        reference=reference,
        providers=[
            Provider(OURS, elastic, ANY_BACKEND, graph=False),
            Provider(plain, masked, graph=False),
            Provider(
                compiled,
                peer(halting_peers.masked, fullgraph=True, dynamic=False),
                compiled=True,
                graph=False,
            ),
            Provider(boolean, peer(halting_peers.indexed), graph=False),
        ],
        flops=measure.flops(elastic(given._replace(training=False)).run) * (3 if training else 1),
        bytes=given.images.numel() * dtype.itemsize + parameters * (2 if training else 1),
        agree=agree_on_most,
        measured_ops=called,
        sets=1,
    )


def shapes(device_type: str) -> Selection:
    batch, large = (64, 256) if device_type == "cuda" else (8, 32)
    avit = [f"model=avit V=S/16 B={batch} halted={h}" for h in (50, 0, 25, 75)]
    uvit = [f"model=uvit V=B/16 B={batch} halted={h}" for h in (UNIFORM, 0)]
    others = [
        *(f"model=avit V=S/16 B={large} halted={h}" for h in (25, 50, 75)),
        f"model=uvit V=B/16 B={large} halted={UNIFORM}",
    ]
    sweep = [
        f"model={model} V={size}/16 B={b} halted={h}"
        for model in ("avit", "uvit")
        for size in SIZES
        for b in (1, 8, 32, 128, 256)
        for h in (0, 25, 50, 75, UNIFORM)
    ]
    # To compile these models takes a minute each.
    return Selection(avit[:1], [avit[0], uvit[0]], sweep, [*avit[1:], *uvit[1:], *others])


SUITE = Suite(
    op="halting",
    shape=HaltingShape,
    directions=("forward", "training step"),
    providers=[OURS, *PEERS],
    shapes=shapes,
    dtypes=for_products,
    case=case,
)

"""Random models and layers: valid ones beside the padded model, wrong ones to be refused."""

import itertools

import torch

from adatape_kernels import ElasticBatch
from adatape_kernels.layers import ElasticAttention, ElasticEncoderLayer, TapeReader
from adatape_kernels.layers.feed_forward import DualFFN
from adatape_kernels.models import AdaTapeParity, AdaTapeParityConfig, AdaTapeViT, AdaTapeViTConfig
from adatape_kernels.offsets import cumulative
from fuzz.verdict import Fault, check_refusal, first_line

_INTEGERS = (-1, 2.5, 2.0, "4", None, True, float("nan"), 1 << 63, 10**30, "@complex")
_POSITIVE = (0, *_INTEGERS)
_RATES = (-0.1, 1.0, 2, float("nan"), float("inf"), "0.5", None, "@complex")
NUMBERS = (float("nan"), "2", None, "@complex", [1.0], 10**400)
_WORDS = ("other", "", 3)
WRONG = {
    **dict.fromkeys(("num_classes", "dim", "depth", "num_heads", "ffn_dim", "topk"), _POSITIVE),
    **dict.fromkeys(("image_size", "patch_size", "bank_patch_size", "key_split"), _POSITIVE),
    **dict.fromkeys(("seq_len", "element_dim", "in_channels"), _POSITIVE),
    **dict.fromkeys(("tape_ffn_dim", "tape_mlp_dim", "num_tape_tokens"), _INTEGERS),
    **dict.fromkeys(("dropout", "attention_dropout", "stochastic_depth", "bank_dropout"), _RATES),
    "num_registers": _INTEGERS,
    "halt_threshold": NUMBERS,
    "query_noise": (-1.0, float("inf"), *NUMBERS),
    "ponder_weight": (-1.0, float("inf"), *NUMBERS),
    "norm_eps": (-5.0, *NUMBERS),
    **dict.fromkeys(("average_query", "norm_after_pooling", "pre_norm"), (None, 1, "yes", 0.0)),
    **dict.fromkeys(("bank", "pooling", "query", "loss_type", "activation"), _WORDS),
    "read_layers": ([99], [-1], [0, 0], "0", 3, [0.5], [True]),
}
"""By argument, values that are wrong whatever the others are."""

_MODELS = {
    "vit": (AdaTapeViTConfig, AdaTapeViT),
    "parity": (AdaTapeParityConfig, AdaTapeParity),
}
_LAYERS = {
    "encoder layer": ElasticEncoderLayer,
    "attention": ElasticAttention,
    "feed-forward": DualFFN,
    "reader": TapeReader,
}


def random_case(rng):
    """Return a model or a layer, valid by itself; one of two has a wrong argument."""
    kind = rng.choice((*_MODELS, *_MODELS, *_LAYERS))
    fields = _model_fields(rng, kind) if kind in _MODELS else _layer_fields(rng, kind)
    wrong = []
    if rng.random() < 0.5:
        name = rng.choice([name for name in fields if name in WRONG])
        # A layer drops everything at a rate of 1, as torch's does; a model is refused it.
        layers = kind not in _MODELS
        values = [v for v in WRONG[name] if not (layers and type(v) is float and v == 1.0)]
        wrong = [[name, rng.choice(values)]]
    return {
        "area": "models",
        "kind": kind,
        "seed": rng.randrange(1 << 31),
        "double": rng.random() < 0.5,
        "batch": rng.randint(0, 4),
        "fields": fields,
        "wrong": wrong,
    }


def _model_fields(rng, kind):
    heads = rng.choice((1, 2, 3))
    depth = rng.randint(1, 3)
    pooling = rng.choice(("token", "mean", "max", "sum"))
    fields = {
        "num_classes": rng.randint(1, 5),
        "dim": heads * rng.randint(1, 6),
        "depth": depth,
        "num_heads": heads,
        "ffn_dim": rng.randint(1, 12),
        "tape_ffn_dim": rng.choice((0, 3)),
        "bank": rng.choice(("input", "learn")),
        "bank_size": rng.randint(4, 20),
        "num_tape_tokens": rng.randint(0, 4),
        "topk": rng.randint(1, 4),
        "halt_threshold": rng.choice((0.3, 1.0, 1.2, 2.0, 99.0)),
        "average_query": rng.random() < 0.5,
        "loss_type": rng.choice(("entropy", "max")),
        "query": "gap" if pooling != "token" else rng.choice(("token", "gap")),
        "read_layers": sorted(rng.sample(range(depth), rng.randint(0, depth))),
        "tape_mlp_dim": rng.choice((0, 4)),
        "pooling": pooling,
        "norm_eps": rng.choice((1e-6, 1e-3, 0.1)),
        "norm_after_pooling": rng.random() < 0.3,
        "num_registers": rng.choice((0, 0, 1, 3)),
        **{name: 0.0 for name in ("dropout", "bank_dropout", "query_noise", "ponder_weight")},
    }
    fields["key_split"] = rng.randint(1, fields["dim"])
    if kind == "vit":
        patch, tiles = rng.randint(1, 3), 2 * rng.randint(1, 2)
        sizes = {"image_size": patch * tiles, "patch_size": patch, "bank_patch_size": patch}
        sizes["pre_norm"] = rng.random() < 0.3
        return fields | sizes | {"in_channels": rng.randint(1, 3)}
    return fields | {"seq_len": rng.randint(4, 12), "element_dim": rng.randint(1, 3)}


def _layer_fields(rng, kind):
    heads = rng.choice((1, 2))
    dim = heads * rng.randint(1, 6)
    rates = {"dropout": 0.0}
    feed_forward = {"ffn_dim": rng.randint(1, 9), "tape_ffn_dim": rng.choice((0, 4)), **rates}
    feed_forward["activation"] = rng.choice(("gelu_tanh", "gelu", "relu"))
    match kind:
        case "attention":
            return {"dim": dim, "num_heads": heads, **rates}
        case "feed-forward":
            return {"dim": dim, **feed_forward}
        case "encoder layer":
            more = {"attention_dropout": 0.0, "stochastic_depth": 0.0, "norm_eps": 1e-6}
            more["norm_first"] = rng.random() < 0.5
            return {"dim": dim, "num_heads": heads, **feed_forward, **more}
    return {
        "dim": dim,
        "num_tape_tokens": rng.randint(0, 3),
        "topk": rng.randint(1, 3),
        "halt_threshold": rng.choice((0.5, 1.2, 99.0)),
        "bank_size": rng.randint(4, 9),
        "key_split": rng.randint(1, dim),
        "query": rng.choice(("token", "gap")),
        "average_query": rng.random() < 0.5,
        "loss_type": rng.choice(("entropy", "max")),
        "tape_mlp_dim": rng.choice((0, 4)),
        "query_noise": 0.0,
        "bank_dropout": 0.0,
    }


def run_case(case):
    """Build what the case says and compare; return whether it was valid. Raises Fault."""
    torch.manual_seed(case["seed"])
    wrong = {name: value_of(value) for name, value in case["wrong"]}
    fields = case["fields"] | wrong
    build = _MODELS.get(case["kind"])
    try:
        if build:
            config = build[0](**fields | {"read_layers": _tuple(fields["read_layers"])})
            module = build[1](config)
        else:
            module = _LAYERS[case["kind"]](**fields)
    except Exception as error:
        if not wrong:
            raise Fault("refused a valid model", first_line(error)) from error
        check_refusal(error)
        return {"valid": False}
    if wrong:
        raise Fault("accepted a wrong value", f"{case['kind']}: {wrong}")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    module = module.double() if case["double"] else module
    (_check_model if build else _check_layer)(case, module.eval())
    return {"valid": True}


def value_of(value):
    return 1j if value == "@complex" else value


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def dtype_of(case):
    return torch.float64 if case["double"] else torch.float32


def _check_model(case, model):
    """Compare the elastic model with the padded one: outputs, and gradients of the parameters."""
    c = model.config
    shape = (
        (c.in_channels, c.image_size, c.image_size)
        if case["kind"] == "vit"
        else (c.seq_len, c.element_dim)
    )
    inputs = torch.randn(case["batch"], *shape, dtype=dtype_of(case))
    padded = model.padded()
    capacity = case["batch"] * c.num_tape_tokens
    results = [model(inputs), padded(inputs), model(inputs, capacity=capacity)]
    ours, theirs, roomy = results
    if not case["double"] and any(
        not torch.equal(a.counts, b.counts) or not torch.equal(a.indices, b.indices)
        for a, b in zip(ours.reads, theirs.reads, strict=True)
    ):
        return  # scores so near to each other that rounding chose
    tolerance = 1e-9 if case["double"] else 3e-4
    for name, other in (("padded", theirs), ("capacity", roomy)):
        close(f"tape_lens, {name}", ours.tape_lens.double(), other.tape_lens.double(), 0)
        close(f"logits, {name}", ours.logits, other.logits, tolerance)
        close(f"ponder, {name}", ours.ponder, other.ponder, tolerance)
    grads = []
    for output in results:
        model.zero_grad()
        (output.logits.square().sum() + output.ponder.sum()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, other in (("padded", grads[1]), ("capacity", grads[2])):
        size = max((g.abs().max().item() for g in other.values() if g is not None), default=0.0)
        for parameter, grad in grads[0].items():
            zero = torch.zeros(1, dtype=inputs.dtype)
            a, b = (zero if g is None else g for g in (grad, other[parameter]))
            close(f"gradient of {parameter}, {name}", a, b + zero, 10 * tolerance, size)


def _check_layer(case, layer):
    """Compare a layer's results for each example with those that it has alone."""
    generator = torch.Generator().manual_seed(case["seed"])
    lens = torch.randint(1, 5, (2, case["batch"]), generator=generator)
    inputs, tapes = lens[0], lens[1] - 1
    dim = case["fields"]["dim"]
    data = torch.randn(int(inputs.sum() + tapes.sum()), dim, generator=generator).to(dtype_of(case))
    offsets = cumulative(inputs), cumulative(tapes, int(inputs.sum()))
    batch = ElasticBatch.from_offsets(data, *offsets)
    together = _results(layer, batch)
    for i in range(case["batch"]):
        own = torch.cat([torch.arange(int(o[i]), int(o[i + 1])) for o in offsets])
        alone = [cumulative(inputs[i : i + 1]), cumulative(tapes[i : i + 1], int(inputs[i]))]
        one = _results(layer, ElasticBatch.from_offsets(data[own], *alone))[0]
        tolerance = 1e-9 if case["double"] else 1e-4
        close(f"example {i}", together[i], one, tolerance)


def _results(layer, batch):
    y = layer(batch)
    y = y[0] if isinstance(y, tuple) else y
    packed, bounds = y.to_packed()
    return [packed[a:b].detach() for a, b in itertools.pairwise(bounds.tolist())]


def close(name, a, b, tolerance, size=0.0):
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        raise Fault("another shape", f"{name}: {tuple(a.shape)}, {tuple(b.shape)}")
    if not a.numel():
        return
    error = (a - b).abs().max().item()
    scale = max(size, b.abs().max().item(), 1.0)
    if not error <= tolerance * scale:
        raise Fault("models differ", f"{name}: {error:.3g} at a size of {scale:.3g}")

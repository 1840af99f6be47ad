"""Random models that halt, or that neither halt nor read, and random rules of `ak.halting`.

Where rows leave, results and gradients are those of the model, or of the rule, that masks them.
"""

import torch

from adatape_kernels import ElasticBatch, models
from adatape_kernels.halting import Halting
from adatape_kernels.offsets import cumulative
from fuzz.model_cases import NUMBERS, WRONG, close, dtype_of, value_of
from fuzz.verdict import Fault, check_refusal, first_line

_INFINITE = (float("inf"), *NUMBERS)
_SHARES = (0.0, 1.0, -0.1, *_INFINITE)
_LEVELS, _FLAGS = ("rows", "", None, 3), (None, 1, "yes", 0.0)
WRONG_HERE = {
    **{name: WRONG[name] for name in ("num_classes", "dim", "depth", "num_heads", "ffn_dim")},
    **{name: WRONG[name] for name in ("image_size", "patch_size", "seq_len", "element_dim")},
    **{name: WRONG[name] for name in ("num_registers", "norm_eps", "pooling", "activation")},
    **{name: WRONG[name] for name in ("pre_norm", "ponder_weight")},
    **dict.fromkeys(("gate_scale", "gate_center", "halting_bias_init"), _INFINITE),
    "distribution_weight": WRONG["ponder_weight"],
    "distribution_center": (0.0, 1.5, *_INFINITE),
    "distinct_layers": (99, *WRONG["num_registers"]),
    **dict.fromkeys(("act_level", "leave", "level", "update", "act_type"), _LEVELS),
    **dict.fromkeys(("force_halt", "keep_class_token", "masked", "static"), _FLAGS),
    **dict.fromkeys(("act_epsilon", "threshold"), _SHARES),
}
"""By argument, values that are wrong whatever the others are."""

_IMAGES = {
    "plain ViT": (models.ViTConfig, models.ViT),
    "UViT": (models.UViTConfig, models.UViT),
    "A-ViT": (models.AViTConfig, models.AViT),
}
_SEQUENCES = {
    "Transformer": (models.TransformerConfig, models.Transformer),
    "universal": (models.UniversalTransformerConfig, models.UniversalTransformer),
}
_MODELS = {**_IMAGES, **_SEQUENCES}


def random_case(rng):
    """Return a model or a rule, valid by itself; three of ten have a wrong argument."""
    kind = rng.choice((*_MODELS, "UViT", "universal", "rule", "rule"))
    fields = _rule_fields(rng) if kind == "rule" else _model_fields(rng, kind)
    wrong = []
    if rng.random() < 0.3:
        name = rng.choice([name for name in fields if name in WRONG_HERE])
        wrong = [[name, rng.choice(WRONG_HERE[name])]]
    return {
        "area": "halting",
        "kind": kind,
        "seed": rng.randrange(1 << 31),
        "double": rng.random() < 0.6,
        "lens": [rng.randint(kind != "rule", 6) for _ in range(rng.randint(0, 4))],
        "tapes": rng.random() < 0.5,
        "unused": rng.choice((0, 0, 2)),
        "steps": rng.randint(1, 5),
        "fields": fields,
        "wrong": wrong,
    }


def _rule_fields(rng):
    level = rng.choice(("example", "row"))
    return {
        "threshold": rng.choice((0.99, 0.5, 0.75, 1e-3)),
        "level": level,
        "update": rng.choice(("basic", "accumulated")),
        "leave": "example" if level == "example" else rng.choice(("example", "row")),
        "force_halt": rng.random() < 0.5,
        "weighs_at_threshold": rng.random() < 0.7,
        "masked": False,
        "static": rng.random() < 0.5,
    }


def _model_fields(rng, kind):
    heads, depth = rng.choice((1, 2, 3)), rng.randint(1, 4)
    fields = {
        "num_classes": rng.randint(1, 5),
        "dim": heads * rng.randint(1, 6),
        "depth": depth,
        "num_heads": heads,
        "ffn_dim": rng.randint(1, 12),
        "pooling": rng.choice(("token", "mean", "max", "sum")),
        "activation": rng.choice(("gelu_tanh", "gelu", "relu")),
        "norm_eps": rng.choice((1e-6, 1e-3, 0.1)),
        "norm_after_pooling": rng.random() < 0.3,
        "num_registers": rng.choice((0, 0, 1, 3)),
    }
    if kind in _SEQUENCES:
        fields |= {"seq_len": rng.randint(6, 12), "element_dim": rng.randint(1, 3)}
    else:
        patch = rng.randint(1, 3)
        fields |= {"image_size": patch * rng.randint(1, 3), "patch_size": patch}
        fields |= {"in_channels": rng.randint(1, 3), "pre_norm": rng.random() < 0.3}
    if kind in ("UViT", "universal"):
        level = rng.choice(("example", "row"))
        fields |= {
            "distinct_layers": rng.randint(0, depth),
            "act_epsilon": rng.choice((0.01, 0.3, 0.9)),
            "act_type": rng.choice(("basic", "accumulated", "none")),
            "act_level": level,
            "leave": "example" if level == "example" else rng.choice(("example", "row")),
            "force_halt": rng.random() < 0.5,
            "halting_bias_init": rng.choice((-1.0, 0.0)),
            "ponder_weight": 0.1,
        }
    if kind == "A-ViT":
        fields |= {
            "act_epsilon": rng.choice((0.01, 0.3, 0.9)),
            "gate_scale": rng.choice((1.0, 3.0, 0.0)),
            "gate_center": rng.choice((0.0, 1.0, -50.0, 50.0)),
            "keep_class_token": fields["pooling"] == "token" and rng.random() < 0.3,
            "ponder_weight": 0.1,
            "distribution_weight": rng.choice((0.0, 0.1)),
            "distribution_center": 1.0,
        }
    return fields


def run_case(case):
    """Build what the case says and compare; return whether it was valid. Raises Fault."""
    torch.manual_seed(case["seed"])
    wrong = {name: value_of(value) for name, value in case["wrong"]}
    fields = case["fields"] | wrong
    try:
        if case["kind"] == "rule":
            built = Halting(**fields)
        else:
            config, model = _MODELS[case["kind"]]
            built = model(config(**fields))
    except Exception as error:
        if not wrong:
            raise Fault("refused a valid model", first_line(error)) from error
        check_refusal(error)
        return {"valid": False}
    if wrong:
        raise Fault("accepted a wrong value", f"{case['kind']}: {wrong}")
    (_check_rule if case["kind"] == "rule" else _check_model)(case, built)
    return {"valid": True}


def _check_model(case, model):
    """Compare a model with the padded one: outputs, and gradients of loss and parameters."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model = (model.double() if case["double"] else model).eval()
    inputs = _inputs(case, model.config)
    results = [model(inputs), model.padded()(inputs)]
    ours, theirs = results
    halted = [r.halted for r in results]
    if halted[0] is not None and not torch.equal(halted[0].steps, halted[1].steps):
        if case["double"]:
            steps = [h.steps.tolist() for h in halted]
            raise Fault("models differ", f"steps: {steps[0]}, padded {steps[1]}")
        return  # scores so near to the threshold that rounding chose
    tolerance = 1e-9 if case["double"] else 3e-4
    pairs = [("logits", ours.logits, theirs.logits), ("ponder", ours.ponder, theirs.ponder)]
    if halted[0] is not None:
        pairs.append(("remainders", *(h.remainders for h in halted)))
        if halted[0].means is not None:
            pairs.append(("means", *(h.means for h in halted)))
    for name, a, b in pairs:
        close(name, a, b, tolerance)
    if not len(ours.logits):
        return
    labels = torch.arange(len(ours.logits)) % model.config.num_classes
    grads = []
    for output in results:
        model.zero_grad()
        (model.loss(output, labels) + output.logits.square().sum()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    size = max((g.abs().max().item() for g in grads[1].values() if g is not None), default=0.0)
    zero = torch.zeros(1, dtype=dtype_of(case))
    for parameter in grads[0]:
        a, b = (zero if g[parameter] is None else g[parameter] for g in grads)
        close(f"gradient of {parameter}", a + 0 * b, b + 0 * a, 10 * tolerance, size)


def _inputs(case, config):
    """Return images, or sequences: of one length, or a list of several lengths."""
    lens, dtype = case["lens"], dtype_of(case)
    if case["kind"] in _IMAGES:
        shape = config.in_channels, config.image_size, config.image_size
        return torch.randn(len(lens), *shape, dtype=dtype)
    sequences = [torch.randn(n, config.element_dim, dtype=dtype) for n in lens]
    if case["tapes"] and lens:  # sequences have no tapes: it says here that all have one length
        return torch.randn(len(lens), lens[0], config.element_dim, dtype=dtype)
    return sequences


def _check_rule(case, rule):
    """Compare a loop in which rows leave, or stay unused, with the one that masks."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype, inputs = torch.float64 if case["double"] else torch.float32, torch.tensor(case["lens"])
    inputs = inputs.long()
    tapes = torch.randint(0, 3, inputs.shape, generator=generator) * case["tapes"]
    offsets = cumulative(inputs), cumulative(tapes, int(inputs.sum()))
    rows = int(inputs.sum() + tapes.sum()) + case["unused"]
    data = torch.randn(rows, 3, generator=generator).to(dtype)
    units = len(inputs) if rule.level == "example" else rows
    # Whole, halved and quartered probabilities meet a threshold exactly, as do scores of 0 and 1.
    choices = torch.tensor([0.0, 0.25, 0.5, 1.0])
    draws = torch.randint(4, (case["steps"], units), generator=generator)
    p = torch.where(
        torch.rand(draws.shape, generator=generator) < 0.5,
        choices[draws],
        torch.rand(draws.shape, generator=generator),
    ).to(dtype)
    masking = Halting(**(case["fields"] | {"masked": True, "static": False}))
    ours, theirs = (_loop(each, data, offsets, p, case) for each in (rule, masking))
    tolerance = 1e-12 if case["double"] else 1e-5
    for name, a in ours.items():
        close(name, a, theirs[name], tolerance)


def _loop(rule, data, offsets, p, case):
    """Return what a loop of steps makes of a batch, and the gradients of what it was given."""
    data, p = data.clone().requires_grad_(), p.clone().requires_grad_()
    state = rule.start(ElasticBatch.from_offsets(data, *offsets, exact=not case["unused"]))
    for step in range(len(p)):
        if state.done:
            break
        # The last probability stands for unused rows, which are numbered -1.
        own = torch.cat([p[step], p.new_full((1,), 0.5)])
        units = state.origin.long() if rule.level == "row" else state.examples
        after = torch.tanh(state.batch.data * (1 + step) - 0.1)
        state = rule.step(state, own[units], after, last=step == len(p) - 1)
    output = state.output.data
    value = (output * torch.arange(1, output.numel() + 1).view_as(output)).sum()
    value = value + state.remainders.square().sum()
    grads = [None, None]
    if value.requires_grad:  # not of a batch of which nothing ever ran
        grads = torch.autograd.grad(value, [data, p], allow_unused=True)
    zeros = torch.zeros_like(data), torch.zeros_like(p)
    grads = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
    return {
        "output": output,
        "score": state.score,
        "remainders": state.remainders,
        "updates": state.updates,
        "gradient of data": grads[0],
        "gradient of probabilities": grads[1],
    }

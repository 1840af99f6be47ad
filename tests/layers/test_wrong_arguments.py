"""Every plain argument of a public function or a layer is refused in one line that names it."""

import numpy as np
import pytest
import torch
from checks import refused

import adatape_kernels as ak
from adatape_kernels import offsets, ops

NAN, INF = float("nan"), float("inf")
NOT_AN_INT = [None, 2.0, True, 1j, "2", [2]]
NOT_A_NUMBER = [None, True, 1j, "2", [2.0]]
NOT_A_FLAG = [None, 1, 0.0, "yes"]
NOT_A_TENSOR = [None, 3, [1.0], "x"]


def sizes(lowest=1, *wrong):
    """What a size may not be: less than the lowest, more than torch can count, or no int."""
    bad = [(w, ValueError) for w in (lowest - 1, -5, 1 << 63, np.uint64(1 << 63), 10**30, *wrong)]
    return bad + [(w, TypeError) for w in NOT_AN_INT]


def numbers(*wrong, optional=False):
    bad = [(w, ValueError) for w in (NAN, 10**400, -(10**400), *wrong)]
    return bad + [(w, TypeError) for w in NOT_A_NUMBER if not (optional and w is None)]


RATE = numbers(-0.1, 1.1, INF)
FLAG = [(w, TypeError) for w in NOT_A_FLAG]
TENSOR = [(w, TypeError) for w in NOT_A_TENSOR]
OPTIONAL_TENSOR = TENSOR[1:]
OPTIONAL_SIZE = [case for case in sizes(0) if case[0] is not None]
SELECT = dict(
    query=torch.ones(2, 4),
    keys=torch.ones(9, 4),
    num_tape_tokens=3,
    topk=2,
    halt_threshold=1.0,
    average_query=True,
    loss_type="max",
)
SELECT_WRONG = dict(
    query=TENSOR,
    num_tape_tokens=sizes(0),
    topk=sizes(1, 33),
    halt_threshold=numbers(),
    average_query=FLAG,
    loss_type=[(None, ValueError), ("", ValueError), (3, ValueError)],
    read_mask=OPTIONAL_TENSOR,
    bank_lens=OPTIONAL_TENSOR,
)
READ = {("bank" if name == "keys" else name): value for name, value in SELECT.items()}
FFN = ops.FFN(torch.ones(6, 4), torch.ones(6), torch.ones(4, 6), torch.ones(4))
GLU = ops.FFN(torch.ones(6, 4), torch.ones(6), torch.ones(4, 3), torch.ones(4))
ROWS = [(w, ValueError) for w in (-1, 6, 1 << 63, 10**30)] + [(w, TypeError) for w in NOT_AN_INT]
ROWS += [(torch.tensor(w), ValueError) for w in (2.0, True, 1j, [2])]
TUPLES = [(FFN[:3], ValueError), ((*FFN, FFN[0]), ValueError), (5, TypeError)]
TUPLES += [((None, *FFN[1:]), TypeError), ((torch.tensor(1.0), *FFN[1:]), ValueError)]
Q = torch.ones(3, 1, 2)
BATCH = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 4))
CALLS = {
    "tape_select": (ops.tape_select, SELECT, dict(SELECT_WRONG, keys=TENSOR)),
    "tape_read": (
        ops.tape_read,
        READ,
        dict(SELECT_WRONG, bank=TENSOR, capacity=OPTIONAL_SIZE),
    ),
    "tape_gather": (
        ops.tape_gather,
        dict(
            bank=torch.ones(9, 4),
            indices=torch.zeros(2, 3, 2, dtype=torch.int32),
            weights=torch.ones(2, 3, 2),
            counts=torch.ones(2, dtype=torch.int32),
        ),
        dict(bank=TENSOR, indices=TENSOR, weights=TENSOR, counts=TENSOR, capacity=OPTIONAL_SIZE),
    ),
    "elastic_attention": (
        ops.elastic_attention,
        dict(
            q=Q,
            k=Q,
            v=Q,
            cu_inputs=torch.tensor([0, 3], dtype=torch.int32),
            cu_tapes=torch.tensor([3, 3], dtype=torch.int32),
        ),
        dict(
            q=TENSOR,
            k=TENSOR,
            v=TENSOR,
            cu_inputs=TENSOR,
            cu_tapes=TENSOR,
            max_rows=OPTIONAL_SIZE,
            softmax_scale=numbers(INF, -INF, optional=True),
        ),
    ),
    "add_layer_norm": (
        ops.add_layer_norm,
        dict(x=torch.ones(3, 4), branch=torch.ones(3, 4), weight=torch.ones(4), bias=torch.ones(4)),
        dict(x=TENSOR, branch=TENSOR, weight=TENSOR, bias=TENSOR, eps=numbers(-5, INF)),
    ),
    "dual_ffn": (
        ops.dual_ffn,
        dict(x=torch.ones(5, 4), num_input_rows=3, input_ffn=FFN, tape_ffn=GLU),
        dict(
            x=TENSOR,
            num_input_rows=ROWS,
            num_rows=[case for case in ROWS if case[0] is not None],
            input_ffn=[*TUPLES, (None, TypeError)],
            tape_ffn=TUPLES,
            activation=[(None, ValueError), ("glu", ValueError), (1, ValueError)],
        ),
    ),
    "DualFFN": (
        ak.layers.DualFFN,
        dict(dim=4, ffn_dim=8),
        dict(dim=sizes(), ffn_dim=sizes(), tape_ffn_dim=sizes(0), dropout=RATE),
    ),
    "ElasticAttention": (
        ak.layers.ElasticAttention,
        dict(dim=4, num_heads=2),
        dict(dim=sizes(), num_heads=sizes(1, 3), dropout=RATE),
    ),
    "ElasticEncoderLayer": (
        ak.layers.ElasticEncoderLayer,
        dict(dim=4, num_heads=2, ffn_dim=8),
        dict(
            dim=sizes(),
            num_heads=sizes(),
            ffn_dim=sizes(),
            tape_ffn_dim=sizes(0),
            dropout=RATE,
            attention_dropout=RATE,
            stochastic_depth=[*RATE, (1.0, ValueError)],
            norm_eps=numbers(-5, INF),
            activation=[(None, ValueError), ("glu", ValueError)],
            norm_first=FLAG,
        ),
    ),
    "ElasticEncoder": (
        ak.layers.ElasticEncoder,
        dict(layers=[ak.layers.ElasticEncoderLayer(4, 2, 8)], dim=4),
        dict(
            dim=sizes(),
            norm_eps=numbers(-5),
            readers=[(5, TypeError), ({1: None}, ValueError), ({True: None}, TypeError)],
        ),
    ),
    "TapeReader": (
        ak.layers.TapeReader,
        dict(dim=4, num_tape_tokens=3, topk=2, halt_threshold=1.0),
        dict(
            dim=sizes(),
            num_tape_tokens=sizes(0),
            topk=sizes(1, 33),
            halt_threshold=numbers(),
            bank_size=sizes(0, 1),
            key_split=sizes(1, 5),
            query=[(None, ValueError), ("mean", ValueError)],
            average_query=FLAG,
            loss_type=[(None, ValueError), ("", ValueError)],
            tape_mlp_dim=sizes(0),
            query_noise=numbers(-1, INF),
            bank_dropout=RATE,
        ),
    ),
    "append_tape": (
        BATCH.append_tape,
        dict(tape=torch.ones(3, 4), offsets=torch.tensor([0, 1, 3]), max_tapes=2),
        dict(
            tape=[*TENSOR, (torch.ones(3, 5), ValueError), (torch.ones(3), ValueError)],
            offsets=[
                *TENSOR,
                *(
                    (torch.tensor(wrong), ValueError)
                    for wrong in (
                        [0, 3],
                        [0, 1, 2, 3],
                        [0.0, 1.0, 3.0],
                        [0, 4, 3],
                        [0, -1, 3],
                        [1, 2, 3],
                        [0, 1, 2],
                        [0, 1, 4],
                        [0, 1, 1 << 40],
                    )
                ),
            ],
            max_tapes=sizes(0, 1),
            exact=FLAG,
        ),
    ),
    "cumulative": (
        offsets.cumulative,
        dict(lens=torch.tensor([3, 0])),
        dict(
            lens=[
                *TENSOR,
                (torch.tensor([3.0]), ValueError),
                (torch.tensor(3), ValueError),
                (torch.tensor([3, -1]), ValueError),
                (torch.tensor([1 << 30, 1 << 30]), ValueError),
            ]
        ),
    ),
    "packed_order": (
        offsets.packed_order,
        dict(cu_inputs=torch.tensor([0, 2]), cu_tapes=torch.tensor([2, 3]), total=3),
        dict(
            cu_inputs=[*TENSOR, (torch.tensor([0.0, 2.0]), ValueError)],
            cu_tapes=[*TENSOR, (torch.tensor([2, 1]), ValueError), (torch.tensor([2]), ValueError)],
            total=sizes(0, 2, 4),
        ),
    ),
}
CASES = [
    pytest.param(name, argument, value, error, id=f"{name}-{argument}-{value!r}"[:80])
    for name, (_, _, wrong) in CALLS.items()
    for argument, values in wrong.items()
    for value, error in values
]


@pytest.mark.parametrize(("name", "argument", "value", "error"), CASES)
def test_a_wrong_argument_is_named(name, argument, value, error):
    function, good, _ = CALLS[name]
    function(**good)
    within = (
        f"{argument}.w1" if argument.endswith("_ffn") and isinstance(value, tuple) else argument
    )
    if within != argument and len(value) != 4:
        within = argument
    with refused(within, error=error):
        function(**{**good, argument: value})


SIZES = [
    ("DualFFN", "dim"),
    ("DualFFN", "ffn_dim"),
    ("DualFFN", "tape_ffn_dim"),
    ("ElasticAttention", "dim"),
    ("ElasticAttention", "num_heads"),
    ("ElasticEncoderLayer", "dim"),
    ("ElasticEncoderLayer", "num_heads"),
    ("ElasticEncoderLayer", "ffn_dim"),
    ("ElasticEncoderLayer", "tape_ffn_dim"),
    ("ElasticEncoder", "dim"),
    ("ElasticEncoder", "row_multiple"),
    ("TapeReader", "dim"),
    ("TapeReader", "num_tape_tokens"),
    ("TapeReader", "bank_size"),
    ("TapeReader", "tape_mlp_dim"),
]


@pytest.mark.parametrize("size", [1 << 31, 1 << 62])
@pytest.mark.parametrize(("name", "argument"), SIZES)
def test_a_layer_of_sizes_whose_products_nobody_counts_is_refused(name, argument, size):
    function, good, _ = CALLS[name]
    with refused(argument, "2147483647", str(size)):
        function(**{**good, argument: size})


NARROW = [
    pytest.param(name, argument, field, id="-".join(filter(None, (name, argument, field))))
    for name, (function, good, _) in CALLS.items()
    if function in vars(ops).values()
    for argument, value in good.items()
    for field in (value._fields if isinstance(value, ops.FFN) else [""])
    if isinstance(value, ops.FFN) or (isinstance(value, torch.Tensor) and value.is_floating_point())
]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("name", "argument", "field"), NARROW)
def test_numbers_of_eight_bits_are_refused(name, argument, field, dtype):
    function, good, _ = CALLS[name]
    value = good[argument]
    named = argument
    if field:
        named, value = (
            f"{argument}.{field}",
            value._replace(**{field: getattr(value, field).to(dtype)}),
        )
    else:
        value = value.to(dtype)
    with refused(named, str(dtype)):
        function(**{**good, argument: value})


@pytest.mark.parametrize(
    "layer",
    [
        ak.layers.DualFFN(4, 8),
        ak.layers.ElasticAttention(4, 2),
        ak.layers.ElasticEncoderLayer(4, 2, 8),
        ak.layers.ElasticEncoder([], 4),
        ak.layers.TapeReader(4, num_tape_tokens=3, topk=2, halt_threshold=1.0, bank_size=9),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_take_an_elastic_batch_only(layer):
    with refused("x", "an ElasticBatch", "Tensor", error=TypeError):
        layer(torch.zeros(3, 4))


def test_lengths_that_are_shorter_than_the_tape_append_in_capacity_mode():
    short = torch.tensor([0, 1, 2])
    assert BATCH.append_tape(torch.ones(3, 4), short, max_tapes=2, exact=False).lens.tolist() == [
        4,
        4,
    ]


@pytest.mark.parametrize("kind", ["plain", "pair", "jagged", "batch"])
@pytest.mark.parametrize(
    "layer",
    [
        ak.layers.ElasticAttention(16, 2),
        ak.layers.DualFFN(16, 32),
        ak.layers.TapeReader(16, num_tape_tokens=2, topk=1, halt_threshold=1.0, bank_size=9),
        ak.layers.ElasticEncoderLayer(16, 2, 32),
        ak.layers.ElasticEncoder([], 16),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_rows_of_another_width_are_named(layer, kind):
    plain = torch.randn(3, 5, 8)
    x = {
        "plain": plain,
        "pair": (plain, torch.ones(3, 5, dtype=torch.bool)),
        "jagged": torch.nested.as_nested_tensor(list(plain), layout=torch.jagged),
        "batch": ak.ElasticBatch.from_padded(plain),
    }[kind]
    with refused("x", "(16,)", "(8,)"):
        layer(x)

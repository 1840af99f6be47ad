"""torch.export over the ops by which rows leave and come home, with free sizes."""

import torch
from row_cases import batch_of
from torch import nn
from torch.export import Dim

from adatape_kernels import ops


class Step(nn.Module):
    """Rows leave, something becomes of those that stay, and it comes home."""

    def forward(self, data, keep, cu_inputs, cu_tapes):
        packed, kept_inputs, kept_tapes, source = ops.compact_rows(
            data, keep, cu_inputs, cu_tapes, capacity=40
        )
        weights = packed.sum(1)
        return ops.accumulate_rows(data, 2 * packed, source, weights), kept_inputs, kept_tapes


def inputs(*lens):
    data, *rest = batch_of("cpu", input_lens=lens, tape_lens=lens)
    return data.nan_to_num(1.0), *rest


def test_a_program_takes_other_sizes():
    rows, bounds = {0: Dim("rows")}, {0: Dim("bounds")}
    dims = {"data": rows, "keep": rows, "cu_inputs": bounds, "cu_tapes": bounds}
    program = torch.export.export(Step(), inputs(3, 4, 2), dynamic_shapes=dims)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"adatape.compact_rows.default", "adatape.accumulate_rows.default"} <= targets
    for given in (inputs(3, 4, 2), inputs(5, 1), inputs(2, 0, 2, 2)):
        for actual, expected in zip(program.module()(*given), Step()(*given), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)

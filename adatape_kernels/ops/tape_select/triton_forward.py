"""`tape_select` in Triton: by one program an example, or by tiles of the bank."""

from torch import Tensor

from adatape_kernels.op_types import LossType
from adatape_kernels.ops.tape_select.outputs import SelectOutputs, empty_outputs
from adatape_kernels.ops.tape_select.triton_own_bank import MOST_ENTRIES, select_from_own_banks
from adatape_kernels.ops.tape_select.triton_tiled_bank import select_from_tiles
from adatape_kernels.ops.triton_runtime import kernel
from adatape_kernels.ops.triton_specialization import in_whole_accesses


@kernel()
def tape_select(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool,
    loss_type: LossType,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
) -> SelectOutputs:
    """Launch the kernels that fit the bank, which keep lengths outside the bank within it."""
    scale = query.shape[1] ** -0.5
    outputs = empty_outputs(query, num_tape_tokens, topk)
    own = keys.dim() == 3 and keys.shape[1] <= MOST_ENTRIES
    select = select_from_own_banks if own else select_from_tiles
    select(
        in_whole_accesses(query),
        in_whole_accesses(keys),
        None if read_mask is None else read_mask.contiguous(),
        None if bank_lens is None else bank_lens.contiguous(),
        outputs,
        halt_threshold,
        scale,
        average_query,
        loss_type == "entropy",
    )
    return outputs

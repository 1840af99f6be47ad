"""When examples or rows halt, what a state weighs, and who leaves the batch (SPEC 11 and 12)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adatape_kernels import ops
from adatape_kernels.arguments import check_flag, check_kind, check_number, check_tensor, shown
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.halting.state import HaltingState
from adatape_kernels.halting.step_recording import tell
from adatape_kernels.offsets import can_be_seen

Level = Literal["example", "row"]
"""What halts on its own: whole examples, or each row."""
Update = Literal["basic", "accumulated"]
"""How an output takes in a state of weight w: y ← w·s + (1 − w)·y, or y ← y + w·s."""


@dataclass(frozen=True)
class Halting:
    """A rule by which examples or rows halt, and by which halted rows leave the batch.

    `Halting.act` and `Halting.avit` make the two rules of the literature. A unit, which is an
    example or a row, begins with the score h = 0. A step gives it a halting probability p and a
    state s. If h + p exceeds the threshold, the unit halts, and s weighs the remainder 1 − h;
    otherwise s weighs p, and h grows by p. What has halted weighs nothing from then on.

    Attributes:
        threshold: a unit runs while its score is below it; above 0 and below 1.
        level: whether examples halt or single rows.
        update: how the output takes in a state.
        leave: whether rows leave one by one, "row", or when all rows of their example have halted,
            "example".
        force_halt: whether the last step gives the remainder to all that still run.
        weighs_at_threshold: whether a unit whose score becomes equal to the threshold, and which
            leaves without a remainder, still adds the state of that step.
        masked: True keeps all rows and masks what has halted; False lets rows leave.
        static: True keeps the size of the buffers, so that nothing is copied to the host and a
            CUDA graph can be captured; rows that left become unused rows.

    Raises:
        ValueError: the threshold is not between 0 and 1, or a choice is unknown.
        TypeError: an argument is of another type altogether.

    Source: SPEC 11 and 12; Graves, arXiv:1603.08983; Yin et al., arXiv:2112.07658.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> rule = ak.halting.Halting.act(level="example", threshold=0.9)
        >>> state = rule.start(ak.ElasticBatch.from_padded(torch.ones(2, 3, 4)))
        >>> while not state.done:
        ...     probabilities = torch.tensor([0.5, 1.0])[state.examples]
        ...     state = rule.step(state, probabilities, 2 * state.batch.data)
        >>> state.updates.tolist(), state.remainders.tolist()
        ([2, 1], [0.5, 1.0])
        >>> state.rows_per_step
        (6, 3)
    """

    threshold: float = 0.99
    level: Level = "example"
    update: Update = "basic"
    leave: Level = "example"
    force_halt: bool = False
    weighs_at_threshold: bool = True
    masked: bool = False
    static: bool = False

    def __post_init__(self) -> None:
        """Check every choice."""
        check_number("threshold", self.threshold, 0, 1)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected above 0 and below 1, got {self.threshold}")
        object.__setattr__(self, "threshold", float(self.threshold))
        for name, known in (
            ("level", ("example", "row")),
            ("update", ("basic", "accumulated")),
            ("leave", ("example", "row")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected {' or '.join(known)}, got {shown(getattr(self, name))}"
                )
        for name in ("force_halt", "weighs_at_threshold", "masked", "static"):
            check_flag(name, getattr(self, name))
        if self.level == "example" and self.leave == "row":
            raise ValueError("leave: expected 'example' where examples halt, got 'row'")
        if self.masked and self.static:
            raise ValueError("static: expected False where nothing leaves, got True")

    @classmethod
    def act(
        cls,
        *,
        threshold: float = 0.99,
        level: Level = "example",
        update: Update = "basic",
        leave: Level = "example",
        force_halt: bool = False,
        masked: bool = False,
        static: bool = False,
    ) -> "Halting":
        """Return the rule of adaptive computation time, as universal Transformers use it.

        Where rows halt, the public code keeps a halted row in sight of the others until its whole
        example has halted, which is `leave="example"`; with `leave="row"` it leaves at once, which
        is another model.

        Args:
            threshold, level, update, leave, force_halt, masked, static: the attributes.

        Source: SPEC 11; scenic's UTransformer.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.halting.Halting.act(threshold=0.8).update
            'basic'
        """
        return cls(
            threshold,
            level,
            update,
            leave,
            force_halt,
            masked=masked,
            static=static,
        )

    @classmethod
    def avit(
        cls, *, threshold: float = 0.99, masked: bool = False, static: bool = False
    ) -> "Halting":
        """Return the rule of A-ViT, by which single rows halt and leave.

        Args:
            threshold, masked, static: the attributes.

        Source: SPEC 12.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.halting.Halting.avit().leave
            'row'
        """
        return cls(threshold, "row", "accumulated", "row", True, False, masked, static)

    def start(self, batch: ElasticBatch) -> HaltingState:
        """Return the state before the first step, in which all examples run.

        Args:
            batch: what the first step computes on; (rows, dim) of any floating dtype.

        Raises:
            TypeError: it is no ElasticBatch.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(2, 3, 4))
            >>> ak.halting.Halting.act().start(batch).score.tolist()
            [0.0, 0.0]
        """
        check_kind("batch", batch, ElasticBatch)
        state = HaltingState.before(
            batch,
            of_rows=self.level == "row",
            leave=self.leave,
            masked=self.masked,
            static=self.static,
        )
        tell(state)
        return state

    def step(
        self,
        state: HaltingState,
        probabilities: Tensor,
        data: Tensor,
        *,
        last: bool = False,
    ) -> HaltingState:
        """Weigh the states of a step and let what halts leave.

        Args:
            state: what `start` or the last step returned.
            probabilities: p, (examples,) or (rows,) of `state.batch`, by the level; 0 to 1, of any
                floating dtype. Gradients pass through it, as SPEC 11 says.
            data: s, (rows, dim), the rows of `state.batch` after this step.
            last: whether no step follows, which matters with `force_halt`.

        Returns:
            The state whose `batch` holds the rows of `data` that run on.

        Raises:
            ValueError: a shape or device differs, everything has halted already or, where they lie
                on the host, probabilities are NaN or outside of 0 to 1.
            TypeError: an argument is of another type altogether.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> rule = ak.halting.Halting.act(level="row", leave="row")
            >>> state = rule.start(ak.ElasticBatch.from_padded(torch.ones(1, 3, 4)))
            >>> state = rule.step(state, torch.tensor([0.2, 1.0, 0.7]), state.batch.data + 1)
            >>> state.batch.lens.tolist(), state.output.data[:, 0].tolist()
            ([2], [0.4000000059604645, 2.0, 1.399999976158142])
        """
        check_kind("state", state, HaltingState)
        check_flag("last", last)
        self.check_step(state, probabilities, data)
        return self.advance(state, probabilities, data, last=last)

    def advance(
        self, state: HaltingState, probabilities: Tensor, data: Tensor, *, last: bool = False
    ) -> HaltingState:
        """Do what `step` does without its checks, for probabilities that come out of a sigmoid.

        What has a probability of NaN halts with an output of NaN, and all else is as without it.

        Args:
            state, probabilities, data, last: as for `step`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> rule = ak.halting.Halting.act()
            >>> state = rule.start(ak.ElasticBatch.from_padded(torch.ones(2, 3, 4)))
            >>> state = rule.advance(state, torch.tensor([torch.nan, 0.5]), state.batch.data)
            >>> state.running.tolist(), state.output.data[3:, 0].tolist()
            ([False, True], [0.5, 0.5, 0.5])
        """
        p = probabilities.to(state.total.dtype)
        score, runs = state.of_units(state.all_scores), state.of_units(state.all_running)
        reached = score + p
        # The dtype may round a threshold to 1, which no score exceeds. What exceeds the threshold
        # exceeds the largest number below 1 as well, and the other way round.
        threshold = min(self.threshold, 1 - torch.finfo(reached.dtype).eps / 2)
        halts = reached > threshold
        if last and self.force_halt:
            halts = torch.ones_like(halts)
        weights = torch.where(halts, 1 - score, p)
        if not self.weighs_at_threshold:
            weights = weights.where(halts | (reached < threshold), 0)
        weights, halts = weights.where(runs, 0), halts & runs
        after = state.with_units(
            score=torch.where(halts, 1, reached.where(runs, score)),
            remainders=torch.where(halts, 1 - score, state.of_units(state.all_remainders)),
            updates=state.of_units(state.all_updates) + runs.to(torch.int32),
            running=runs & ~halts & (reached < threshold),
        )
        taken, weights = data, state.of_rows_of_batch(weights)
        if self.masked or self.static or self.leave != self.level:
            # What has halted and stays may come to hold anything, and 0 · inf would be NaN.
            taken = data.where(state.rows_that_run.unsqueeze(1), 0)
        total_weights = 1 - weights if self.update == "basic" else None
        if self.masked:
            total = _with_all_rows_added(state.total, taken, weights, total_weights)
        else:
            total = ops.accumulate_rows(
                state.total, taken, state.origin, weights, total_weights=total_weights
            )
        after = after.after(total, data)
        if not self.masked:
            after = after.without_halted(self.leave == "row")
        tell(after)
        return after

    def check_step(self, state: HaltingState, probabilities: Tensor, data: Tensor) -> None:
        """Raise what `step` raises.

        Args:
            state, probabilities, data: as for `step`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> rule = ak.halting.Halting.act()
            >>> state = rule.start(ak.ElasticBatch.from_padded(torch.ones(2, 3, 4)))
            >>> rule.check_step(state, torch.tensor([0.5, 1.0]), state.batch.data)
        """
        batch = state.batch
        check_tensor("probabilities", probabilities)
        check_tensor("data", data)
        if state.of_rows != (self.level == "row"):
            began = "rows" if state.of_rows else "examples"
            raise ValueError(
                f"state: expected one that a rule for {self.level}s began, got one for {began}"
            )
        ours, theirs = (
            f"leave={each.leave!r}, masked={each.masked}, static={each.static}"
            for each in (self, state)
        )
        if ours != theirs:
            raise ValueError(f"state: expected one of a rule with {ours}, got one with {theirs}")
        if state.done:
            raise ValueError("state: expected one in which something runs, got one that is done")
        units = batch.data.shape[0] if self.level == "row" else batch.batch
        if probabilities.shape != (units,) or not probabilities.is_floating_point():
            what = "rows" if self.level == "row" else "examples"
            raise ValueError(
                f"probabilities: expected floating-point ({units},), one for each of the {what} of "
                f"state.batch, got {shown(probabilities)}"
            )
        if data.shape != batch.data.shape or data.dtype != batch.data.dtype:
            raise ValueError(
                f"data: expected {shown(batch.data)} like state.batch.data, got {shown(data)}"
            )
        for name, tensor in (("probabilities", probabilities), ("data", data)):
            if tensor.device != batch.device:
                raise ValueError(
                    f"{name}: expected a tensor on {batch.device}, got {tensor.device}"
                )
        if can_be_seen(probabilities):
            # What has halted, and rows that belong to nobody, may have any.
            runs = state.of_units(state.all_running)
            wrong = runs & ~((probabilities >= 0) & (probabilities <= 1))
            if bool(wrong.any()):
                value = float(probabilities[wrong][0])
                raise ValueError(f"probabilities: expected 0 to 1, got {value}")


def _with_all_rows_added(
    total: Tensor, rows: Tensor, weights: Tensor, total_weights: Tensor | None
) -> Tensor:
    """Do in plain torch what `ops.accumulate_rows` does where each row stays in its place."""
    before = total if total_weights is None else total_weights.unsqueeze(1) * total
    return before + weights.unsqueeze(1) * rows.to(total.dtype)

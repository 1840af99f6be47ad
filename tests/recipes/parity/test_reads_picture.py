"""What the picture of a read shows: the queries of the definition, and how pairs tell parity."""

import dataclasses

import pytest
import torch

from adatape_kernels.data.parity_sequences import ParitySequences, uniform_sequences
from adatape_kernels.models import AdaTapeParity
from adatape_kernels.recipes.parity.parity_models import new_model
from adatape_kernels.recipes.parity.reads_picture import (
    UNREAD,
    Reading,
    drawn_reads,
    pairs_tell_parity,
    reading_of,
)


@pytest.mark.parametrize("average_query", [True, False])
def test_each_step_reads_what_its_query_finds(average_query):
    """The entries with the highest scores by the query that is reported, among those unread."""
    torch.manual_seed(0)
    config = dataclasses.replace(new_model("adatape", 9).config, average_query=average_query)
    model = AdaTapeParity(config)
    sequences = uniform_sequences(6, 9, torch.Generator().manual_seed(1))
    reading = reading_of(model, sequences)
    inputs = sequences.one_hot()
    embedded, read = model.embed_elastic(inputs), model(inputs).reads[0]
    reader = model.encoder.readers["0"]
    values, pooled, _ = reader.normalised(embedded.bank, embedded.tokens.pool("token"))
    keys, query = values[..., : reader.key_dim], pooled[:, : reader.key_dim]
    torch.testing.assert_close(reading.queries[:, 0], query)
    assert torch.equal(reading.counts, read.counts)
    for i in range(6):
        left = set(range(9))
        for step in range(int(reading.counts[i])):
            scores = (keys[i] @ reading.queries[i, step]).tolist()
            chosen = read.indices[i, step].tolist()
            assert reading.symbols[i, step].tolist() == sequences.symbols[i, chosen].tolist()
            left -= set(chosen)
            assert (
                min(scores[m] for m in chosen) > max([scores[m] for m in left], default=-99) - 1e-3
            )
        assert (reading.symbols[i, int(reading.counts[i]) :] == UNREAD).all()


def test_split_pairs_are_counted():
    symbols = torch.tensor(
        [
            [[1, 1], [1, -1], [0, 0]],  # three ones, one of them beside another symbol
            [[1, 1], [0, -1], [0, 0]],  # two ones
            [[1, -1], [1, 0], [0, 0]],  # two ones apart: two steps split, which is no label
            [[1, 1], [UNREAD, UNREAD], [UNREAD, UNREAD]],
        ]
    )
    reading = Reading(symbols, torch.zeros(4, 4, 2), torch.tensor([3, 3, 3, 1]))
    assert pairs_tell_parity(reading, torch.tensor([1, 0, 0, 0])) == 0.75


@pytest.mark.parametrize("length, count", [(1, 1), (2, 3), (9, 40)])
def test_pictures_of_short_and_few_sequences(length, count):
    sequences = uniform_sequences(count, length, torch.Generator().manual_seed(0))
    assert drawn_reads(new_model("adatape", length), sequences).startswith(b"\x89PNG")
    same = ParitySequences(torch.zeros(2, length, dtype=torch.long), torch.zeros(2).long())
    assert drawn_reads(new_model("adatape", length), same).startswith(b"\x89PNG")

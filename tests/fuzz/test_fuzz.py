"""The tester itself: it sees planted faults, makes cases small, and repeats itself by a seed."""

import json
import random
from pathlib import Path

import forked_python
import pytest

from fuzz.__main__ import main
from fuzz.byte_mutations import mutated, random_mutations
from fuzz.lanes import SHARES, available, make_case
from fuzz.minimiser import minimised
from fuzz.one_case import outcome
from fuzz.planted_faults import PLANTED

TESTS = Path(__file__).parents[1]


def run_module(*arguments):
    return forked_python.run(
        ["-m", *arguments], cwd=TESTS, capture_output=True, text=True, timeout=300
    )


def test_planted_faults_are_found_and_made_small():
    ran = run_module("fuzz.planted_faults")
    assert ran.returncode == 0, ran.stderr
    found = {(op, kind): case for _, op, kind, case in json.loads(ran.stdout)}
    assert {(op, kind) for op, (_, kind) in PLANTED.items()} <= set(found)
    gather = found["tape_gather", "wrong result tape"]
    assert gather["sizes"]["topk"] == 2 and gather["breakages"] == []
    assert gather["values"] == gather["layouts"] == {}
    # A row that is read, or one that is unused.
    assert sum(gather["sizes"]["counts"]) + gather["options"]["spare"] == 1
    norm = found["add_layer_norm", "signal SIGSEGV"]
    assert norm["sizes"] == {"rows": 2, "dim": 0} and norm["breakages"] == []
    # Without the planted fault, what was accepted is refused.
    accepted = found["elastic_attention", "accepted an invalid call"]
    ran = run_module("fuzz", "--case", json.dumps(accepted))
    assert ran.returncode == 0 and "'valid': False" in ran.stdout, ran.stdout + ran.stderr


def test_a_case_runs_again_by_its_text():
    case = make_case("eager", seed=3, number=5) | {"breakages": [], "level": "public"}
    ran = run_module("fuzz", "--case", json.dumps(case))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("no fault: "), ran.stdout


@pytest.mark.parametrize("backend", [b for b in ("eager", "cpp") if b in available()])
@pytest.mark.parametrize("seed", [724222892, 5, 6])
def test_what_cancels_to_the_last_bit_is_no_fault(backend, seed):
    """A gate of 0, which rounding makes of huge numbers, opens a way that a gate of 1e5 closes."""
    sizes = {"inputs": 0, "tapes": 44, "unused": 0, "dim": 3, "hidden": 1, "tape_hidden": 11}
    options = {"tape_ffn": True, "counts_on_device": False, "activation": "relu", "cancel": True}
    case = {
        **{"area": "ops", "op": "dual_ffn", "level": "public", "dtype": "float32"},
        **{"backend": backend, "seed": seed, "sizes": sizes, "options": options},
        **{"gradients": True, "values": {"x": "huge"}, "layouts": {}, "breakages": []},
        **{"subset": False, "strides": False},
    }
    assert outcome(case)["valid"]


def test_an_unknown_lane_is_refused(capsys):
    assert main(["--backends", "eager,tpu"]) == 2
    assert capsys.readouterr().out.startswith("backends: expected some of ")


@pytest.mark.parametrize("lane", list(SHARES))
def test_a_seed_decides_every_case(lane):
    if lane in available():
        first, second = ([make_case(lane, 7, n) for n in range(50)] for _ in range(2))
        assert json.dumps(first) == json.dumps(second)
        assert json.dumps(first) != json.dumps([make_case(lane, 8, n) for n in range(50)])
        assert json.loads(json.dumps(first[0])) == first[0]


def test_a_case_is_made_as_small_as_its_fault_allows():
    case = {"dtype": "float16", "sizes": {"a": 40, "rows": [5, 9, 2]}, "options": {}, "flag": True}

    def run(smaller):
        sizes = smaller["sizes"]
        return "fault" if sizes["a"] >= 3 and sum(sizes["rows"]) >= 4 else None

    smallest, runs = minimised(case, "fault", run, seconds=10)
    assert smallest["dtype"] == "float32" and smallest["flag"] is False
    assert smallest["sizes"]["a"] == 3 and smallest["sizes"]["rows"] == [4]
    assert runs < 200


def test_every_mutation_changes_bytes_without_fail():
    rng, content = random.Random(0), bytes(range(256))
    for _ in range(500):
        for mutation in json.loads(json.dumps(random_mutations(rng))):
            assert isinstance(mutated(content, mutation), bytes)
            assert isinstance(mutated(b"", mutation), bytes)

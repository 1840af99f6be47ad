"""What torch has compiled is found again only where it computes with the same instructions."""

import uuid

import torch
from torch._dynamo.utils import counters

from adatape_kernels.recipes.compiled_code import kept_by_instructions


def test_code_for_other_instructions_is_not_taken(monkeypatch):
    """The C++ that is compiled here is the same; what is looked at is whether it was found."""
    own = torch.compiler.config.patch(cache_key_tag=str(uuid.uuid4()))  # nobody has compiled it
    x = torch.arange(12.0).reshape(3, 4)

    def found_by(instructions, threads):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        torch.compiler.reset()
        counters.clear()
        with own, kept_by_instructions():
            result = torch.compile(lambda x: x.sum(1) + 1)(x)
        assert torch.equal(result, x.sum(1) + 1)
        cache = counters["inductor"], counters["aot_autograd"]
        return any(each["fxgraph_cache_hit"] or each["autograd_cache_hit"] for each in cache)

    assert [found_by("AVX2", 1), found_by("AVX2", 1)] == [False, True]
    assert not found_by("AVX512", 1) and not found_by("AVX2", 2)


def test_the_tag_of_a_user_stays(monkeypatch):
    config = torch.compiler.config
    with config.patch(cache_key_tag="mine"):
        with kept_by_instructions():
            capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
            assert config.cache_key_tag == f"mine {capability}, {threads} threads"
        assert config.cache_key_tag == "mine"

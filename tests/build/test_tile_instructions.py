"""Which functions of the compiled part have AMX's instructions."""

import importlib.util
import platform
import re
import shutil
import subprocess

import pytest

from adatape_kernels._build import build_facts

FACTS = build_facts()
TILE_INSTRUCTIONS = re.compile(r"\t(tdp\w+|tile\w+|ldtilecfg|sttilecfg)\b")

pytestmark = [
    pytest.mark.skipif(FACTS["compiled"] == "no", reason=f"no compiled part: {FACTS.get('why')}"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="objdump was not found"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86-64 has AMX"),
]


def tile_instructions(path):
    """The functions of a compiled file that have such instructions, and which."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", path]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, function = {}, None
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = start[1]
        elif instruction := TILE_INSTRUCTIONS.search(line):
            found.setdefault(function, set()).add(instruction[1])
    assert function is not None
    return found


def test_tiles_are_used_by_the_kernels_for_amx_alone():
    found = tile_instructions(importlib.util.find_spec("adatape_kernels._C").origin)
    elsewhere = [name for name in found if not re.match(r"(void )?adatape::amx::", name)]
    assert not elsewhere
    name, version = FACTS["compiler"].split()
    if name == "GNU" and int(version.split(".")[0]) < 11:
        pytest.skip(f"{FACTS['compiler']} does not know AMX")
    assert set.union(*found.values()) == {
        "ldtilecfg",
        "tdpbf16ps",
        "tileloadd",
        "tilerelease",
        "tilestored",
        "tilezero",
    }
    # Who configures tiles gives them back.
    for op in ("attention_fwd", "attention_bwd"):
        own = {name: has for name, has in found.items() if f"amx::{op}(" in name}
        assert {"ldtilecfg", "tilerelease"} <= set.union(*own.values())

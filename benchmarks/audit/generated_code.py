"""What a kernel's code holds: how wide it reads and writes, what its tensor cores multiply.

Of PTX, which Triton writes, and of the machine code (SASS) that nvcc makes. Numbers of instructions
are numbers of places in the code, not of what runs.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_PTX_ACCESS = re.compile(
    r"\b(?:ld|st|red|atom)\.(?:\w+\.)*?global\b[\w.:]*?(?:\.v(?P<count>\d))?\.[a-z]+(?P<bits>\d+)\s"
    r"|\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\],\s*(?P<bytes>0x[0-9a-f]+|\d+)"
)
_SASS_ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS|RED|REDG|ATOMG?)\.(?P<form>[\w.]+)")
_SASS_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_PTX_NAMES = {"bf16": "bf16", "f16": "fp16", "tf32": "tf32"}


@dataclass(frozen=True)
class CodeFacts:
    """What the bounds are about."""

    in_flight: int
    """Groups of asynchronous copies that may still be on their way where the kernel waits."""
    wide: int
    """Percent of the bytes of global memory that are accessed by 16 at once; 0 without any."""
    bf16: int
    """Instructions that multiply on tensor cores, by the dtype of the factors."""
    fp16: int
    tf32: int


def facts_of_ptx(ptx: str, ttgir: str) -> CodeFacts:
    """Look at a kernel of Triton, in PTX and in Triton's own representation before it."""
    waits = map(int, re.findall(r"async_wait\b.*?\bnum = (\d+)", ttgir))
    products = Counter(
        _PTX_NAMES[name]
        for pattern in (
            r"\bmma\.sync\S*?\.(bf16|f16|tf32)\.(?:bf16|f16|tf32)\.f\d+\s",
            r"\bwgmma\.mma_async\S*?\.f\d+\.(bf16|f16|tf32)\.",
        )
        for name in re.findall(pattern, ptx)
    )
    # The instruction of 10.0 says "f16" for both dtypes of 16 bits: the factors' stands in TTGIR.
    products["tf32"] += len(re.findall(r"\btcgen05\.mma\S*kind::tf32", ptx))
    halves = len(re.findall(r"\btcgen05\.mma\S*kind::f16", ptx))
    factors = set(re.findall(r"tc_gen5_mma\b[^\n]*?:\s*!ttg\.memdesc<[\dx]*x(bf16|f16)\b", ttgir))
    products["bf16" if factors == {"bf16"} else "fp16"] += halves
    return _facts(waits, _ptx_accesses(ptx), products)


def facts_of_sass(sass: str) -> CodeFacts:
    """Look at a kernel's machine code, as cuobjdump prints it."""
    waits = (int(number, 16) for number in re.findall(r"\bDEPBAR\.LE SB\d, (0x[0-9a-f]+)", sass))
    products = Counter(
        "bf16" if "BF16" in form else "tf32" if "TF32" in form else "fp16"
        for form in re.findall(r"\bHG?MMA\.(\S+)", sass)
    )
    return _facts(waits, _sass_accesses(sass), products)


def _facts(waits: Iterator[int], accesses: Iterator[int], products: Counter[str]) -> CodeFacts:
    sizes = list(accesses)
    wide = sum(size for size in sizes if size >= 16)
    share = 100 * wide // sum(sizes) if sizes else 0
    return CodeFacts(max(waits, default=0), share, *(products[n] for n in ("bf16", "fp16", "tf32")))


def _ptx_accesses(ptx: str) -> Iterator[int]:
    """Yield the bytes of each access of a thread to global memory."""
    for found in _PTX_ACCESS.finditer(ptx):
        if found["bytes"]:
            yield int(found["bytes"], 0)
        else:
            yield int(found["count"] or 1) * int(found["bits"]) // 8


def _sass_accesses(sass: str) -> Iterator[int]:
    for found in _SASS_ACCESS.finditer(sass):
        words = found["form"].split(".")
        yield next((_SASS_BYTES[word] for word in words if word in _SASS_BYTES), 4)

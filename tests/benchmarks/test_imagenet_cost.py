"""The page on ImageNet: tables that are what the command prints, and its arithmetic by hand."""

import json
from pathlib import Path

import pytest

from adatape_kernels.benchmarks import imagenet_loading
from adatape_kernels.benchmarks.audit.cards import CARDS
from adatape_kernels.benchmarks.reports import imagenet_cost as page
from adatape_kernels.benchmarks.reports.gpu_performance import COUNTED, counted_ops

pytestmark = pytest.mark.no_backend

PAGE = Path(__file__).parents[2] / "docs/guides/imagenet.md"
LOADING = json.loads(imagenet_loading.RESULT.read_text(encoding="utf-8"))
OPS = counted_ops(COUNTED)
H100 = next(card for card in CARDS if card.name == "H100")


def test_the_page_holds_what_the_command_prints(capsys):
    text = PAGE.read_text(encoding="utf-8")
    assert page.main([]) == 0
    printed = capsys.readouterr().out
    assert page.fill(text, printed.rstrip("\n")) == text and printed in text
    numbers = [f"{LOADING[name]:.0f}" for name in LOADING if name.startswith(("prep", "dec"))]
    assert all(number in text for number in (*numbers, f"{LOADING['file_bytes'] / 1e3:.0f} kB"))


@pytest.mark.parametrize(
    ("variant", "dim", "heads_rows", "parameters"),
    [("S/16", 384, 206, 24.3e6), ("B/32", 768, 59, 96.6e6)],
)
def test_a_forward_pass_has_the_products_of_its_layers(variant, dim, heads_rows, parameters):
    stages = page.stages(variant, OPS)
    flops = sum(stage.times * stage.needed.flops for stage in stages)
    rows = 256 * heads_rows
    layers = 12 * (24 * rows * dim**2 + 4 * rows * heads_rows * dim)
    patch = int(variant.split("/")[1])
    patches = 2 * 256 * 3 * 224**2 * dim
    tape = 2 * 2560 * dim * 3 * 4 * dim
    bank = 2 * 256 * 784 * (192 + dim) * dim
    scores = OPS["tape_select", "B=256, input-driven, M=784, K=64, k=5, T=10"].needed.flops
    head = 2 * 256 * dim * 1000
    assert flops == pytest.approx(layers + patches + tape + bank + scores + head, rel=0.01)
    assert page.parameters(variant) == pytest.approx(parameters, rel=0.005)
    assert 3 * patch**2 * dim < page.parameters(variant)


def test_a_step_is_three_passes_of_a_gpu_s_share_and_adamw():
    past = page.Recorded(shortfall=2.0, bytes_by_feature=10.0)
    found = page.cost("S/16", H100, OPS, past)
    assert found.steps == 300 * 313 and found.batch == 4096
    forward = sum(s.times * H100.predicted(s.ours) for s in page.stages("S/16", OPS))
    adamw = 28 * found.parameters / (0.87 * 3.35e12)
    assert found.step == pytest.approx(3 * 2 * forward + adamw)
    assert found.slower == pytest.approx(2 * 3 * 2 * forward + adamw)
    assert found.activations == 10 * 512 * 206 * 384 * 12
    assert found.state == 16 * found.parameters


def test_photos_are_as_large_as_imagenet_s(tmp_path):
    pytest.importorskip("PIL", reason="JPEG files need Pillow")
    (file,) = imagenet_loading.write_photos(tmp_path, 1)
    assert 0.9e5 < file.stat().st_size < 1.3e5

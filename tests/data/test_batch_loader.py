import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from checks import refused
from image_files import write_folder

from adatape_kernels.data import Normaliser, load
from adatape_kernels.data.augment import crop
from adatape_kernels.data.loading import (
    BatchLoader,
    BatchMaker,
    BatchPlace,
    LoadingTimes,
    UnreadableImages,
)
from adatape_kernels.data.loading.batch_draws import generator_of, image_generator, order_of_epoch
from adatape_kernels.data.mixup import Mixture

IMAGES = torch.randint(256, (23, 3, 8, 8), generator=generator_of(1), dtype=torch.uint8)
LABELS = torch.arange(23) % 4
NORMALISE = Normaliser((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


def cropping():
    return crop_by_two


def crop_by_two(images, generator):
    return crop(images, 2, generator)


def maker(images=IMAGES, labels=LABELS, **changes):
    values = {"num_classes": 4, "batch": 5, "batches": -(-len(labels) // 5), "seed": 7}
    values |= {"normalise": NORMALISE, "make_augment": cropping, **changes}
    return BatchMaker(images, labels, **values)


def batches(made, workers=0, epochs=(0, 1), **options):
    with BatchLoader(made, workers, **options) as loader:
        return [(batch.inputs, batch.targets) for epoch in epochs for batch in loader.epoch(epoch)]


def same(some, others):
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def children():
    return {process.pid for process in multiprocessing.active_children()}


def test_a_batch_is_what_its_seed_and_epoch_and_the_numbers_of_its_images_say():
    got = batches(maker(mixup=0.4), epochs=(3,))
    assert [len(targets) for _, targets in got] == [5, 5, 5, 5, 3]
    order = torch.randperm(23, generator=generator_of(7, 3))
    for number, chosen in enumerate(order.split(5)):
        generators = [generator_of(7, 3, int(image) + 1) for image in chosen]
        pairs = zip(chosen.split(1), generators, strict=True)
        moved = [crop(IMAGES[image].float() / 255, 2, each) for image, each in pairs]
        images, shares = NORMALISE(torch.cat(moved)), [float(_share(each)) for each in generators]
        for at, share in enumerate(shares):
            other = at ^ 1 if at ^ 1 < len(chosen) else at
            mixed = share * images[at] + (1 - share) * images[other]
            torch.testing.assert_close(got[number][0][at], mixed)
            expected = torch.zeros(4).index_add_(
                0, LABELS[chosen[[at, other]]], torch.tensor([share, 1 - share])
            )
            torch.testing.assert_close(got[number][1][at], expected)


def _share(generator):
    return Mixture.draw(1, 0.4, generator).shares


def test_the_order_and_the_first_image_draw_from_other_generators():
    order, first, second = (
        torch.rand(3, generator=generator)
        for generator in (generator_of(7, 3), image_generator(7, 3, 0), image_generator(7, 3, 1))
    )
    assert not torch.equal(order, first) and not torch.equal(first, second)


def test_an_image_is_the_same_in_a_batch_of_any_size():
    numbers = order_of_epoch(23, 7, 2)
    found = {}
    for size in (1, 4, 23):
        parts = [maker(batch=size)[BatchPlace(2, batch)] for batch in range(-(-23 // size))]
        found[size] = torch.cat([part.inputs for part in parts])[numbers.argsort()]
    assert torch.equal(found[1], found[4]) and torch.equal(found[1], found[23])


@pytest.mark.parametrize(("workers", "start"), [(1, "fork"), (2, "fork"), (5, None), (1, "spawn")])
def test_any_number_of_workers_gives_the_same_batches(workers, start):
    before, state = children(), torch.get_rng_state()
    assert same(batches(maker(), workers, start=start), batches(maker()))
    assert children() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_alone_is_that_of_a_whole_run():
    assert same(batches(maker(), epochs=(0, 1))[5:], batches(maker(), epochs=(1,)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_of_each_batch_is_that_part_of_it(workers):
    parts = [
        torch.tensor(part, dtype=torch.long) for part in ([0, 1], [2, 3, 4], [], [4], [0, 1, 2])
    ]
    with BatchLoader(maker(mixup=0.4), workers) as loader:
        whole = list(loader.epoch(2))
        got = list(loader.epoch(2, parts.__getitem__))
    for batch, part, positions in zip(whole, got, parts, strict=True):
        assert torch.equal(part.positions, positions)
        assert torch.equal(part.targets, batch.targets[positions].reshape(part.targets.shape))
        assert torch.equal(part.inputs, batch.inputs[positions].reshape(part.inputs.shape))


def test_numbers_out_of_range_are_refused():
    with refused("workers", "0 to 1024", "1025"):
        BatchLoader(maker(), 1025)
    with refused("start", "spawn", "'thread'"):
        BatchLoader(maker(), start="thread")
    with refused("batch", "1 or more", "0"):
        maker(batch=0)


@pytest.fixture
def damaged(tmp_path):
    """Files of two classes, of which one of each cannot be read; returns the set and the files."""
    pytest.importorskip("PIL", reason="image folders need Pillow")
    write_folder(tmp_path / "train", count=6)
    write_folder(tmp_path / "val", count=2)
    bad = [tmp_path / "train" / name for name in ("cat/2.png", "dog/1.jpg")]
    for file in bad:
        file.write_bytes(file.read_bytes()[:40])
    return load("imagefolder", tmp_path, image_size=8), bad


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_one_line_that_names_it(damaged, workers):
    data, bad = damaged
    before = children()
    with pytest.raises(ValueError) as caught:
        batches(maker(data.train_images, data.train_labels), workers)
    message = str(caught.value)
    assert any(str(file) in message for file in bad) and "\n" not in message
    assert children() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_skipped_and_counted_once(damaged, workers):
    data, bad = damaged
    found = UnreadableImages(2)
    made = maker(data.train_images, data.train_labels, skip=True)
    got = batches(made, workers, unreadable=found)
    assert sum(len(targets) for _, targets in got) == 2 * 10
    assert sorted(found.reasons) == [2, 7]
    line = found.line("training images")
    assert line.startswith("skipped 2 training images") and str(bad[0].parents[1]) in line
    with refused("unreadable-limit", "at most 1 ", "got 2", str(bad[0].parents[1])):
        batches(made, workers, unreadable=UnreadableImages(1))


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_a_pair_of_which_one_cannot_be_read_is_not_mixed(damaged, mixup):
    data, _ = damaged
    made = maker(data.train_images, data.train_labels, num_classes=2, skip=True, mixup=mixup)
    plain = maker(data.train_images, data.train_labels, num_classes=2, skip=True)
    alone = 0
    for number in range(made.batches):
        batch, unmixed = made[BatchPlace(0, number)], plain[BatchPlace(0, number)]
        assert torch.equal(batch.positions, unmixed.positions)
        for row, position in enumerate(batch.positions.tolist()):
            single = position ^ 1 not in batch.positions.tolist()
            alone += single
            if single or not mixup:
                torch.testing.assert_close(batch.inputs[row], unmixed.inputs[row])
            else:
                assert not torch.allclose(batch.inputs[row], unmixed.inputs[row])
    assert alone >= 1
    inputs, targets = made.blank()
    assert inputs.shape == (1, *batch.inputs.shape[1:]) and not inputs.any()
    assert targets.shape == (1, *batch.targets.shape[1:]) and targets.dtype == batch.targets.dtype


def shared_memory():
    return {file.name for file in Path("/dev/shm").iterdir() if str(os.getpid()) in file.name}


def interrupted(workers):
    with BatchLoader(maker(), workers) as loader:
        for number, _ in enumerate(loader.epoch(0)):
            if number == 1:
                raise KeyboardInterrupt


def test_an_interrupted_epoch_leaves_nothing_behind():
    batches(maker(), 1)  # multiprocessing keeps files of its own from its first use on
    before = children(), len(os.listdir("/proc/self/fd")), shared_memory()
    try:
        interrupted(2)
    except KeyboardInterrupt:
        pass
    assert (children(), len(os.listdir("/proc/self/fd")), shared_memory()) == before


def test_a_worker_that_was_killed_is_one_line():
    with pytest.raises(RuntimeError) as caught, BatchLoader(maker(batches=10_000), 1) as loader:
        for _ in loader.epoch(0):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
    assert "worker" in str(caught.value) and "\n" not in str(caught.value).strip()


def test_a_worker_that_is_killed_in_a_step_is_the_same_line():
    """torch raises it wherever training is by then, and not where it waits for a batch."""
    with pytest.raises(RuntimeError) as caught, BatchLoader(maker(batches=10_000), 1) as loader:
        next(loader.epoch(0))
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(10)  # a step, which the end of the process cuts short
        pytest.fail("nothing was said of a worker that was killed")
    line = str(caught.value)
    assert line.startswith("workers: expected processes that prepare every batch, got DataLoader")
    assert line == line.strip() and "\n" not in line


def test_no_room_in_shared_memory_is_one_line():
    """It used to be a traceback of the worker, for whose batch training then waited for ever."""
    before, limits = children(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # which the memory counts for
    try:
        with refused("workers", "room for 3,840 bytes", "File too large", error=RuntimeError):
            batches(maker(), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert children() == before


def test_times_name_a_loader_that_is_too_slow():
    now = [0.0]
    times = LoadingTimes(2, clock=lambda: now[0])
    for _ in range(2):
        times.ask()
        now[0] += 1.0  # waiting
        times.receive(10, 1.5)
        now[0] += 3.0  # training
    assert times.images_per_second == pytest.approx(2 * 20 / 3)
    assert times.waiting_share == pytest.approx(0.25) and times.starving
    assert times.postfix() == {"waiting for data": "25%"}
    times.stop()
    now[0] += 100
    assert times.line() == (
        "the loader alone 13 images/s; training waited for data 25% of the time (--workers)"
    )
    quick = LoadingTimes(0, clock=lambda: now[0])
    quick.ask()
    now[0] += 1
    quick.receive(8, 0.5)
    now[0] += 9
    assert quick.postfix() == {} and quick.line() == "the loader alone 16 images/s"

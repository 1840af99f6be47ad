import torch

from adatape_kernels.data import augment, digits


def test_augmented_images_stay_themselves():
    x = digits().train_images[:32]
    generator = torch.Generator().manual_seed(0)
    y = augment.turn_and_move(x, generator)
    assert y.shape == x.shape
    assert not torch.equal(y, x)
    assert torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1] > 0.6


def test_a_crop_moves_each_image_by_whole_pixels():
    x = torch.zeros(60, 2, 9, 7)
    x[:, 0, 4, 3], x[:, 1, 5, 3] = 1, 2
    y = augment.crop(x, 2, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    places = y[:, 0].flatten(1).argmax(1)
    assert places.unique().numel() > 15
    rows, columns = places // 7, places % 7
    assert set(rows.tolist()) == {2, 3, 4, 5, 6} and set(columns.tolist()) == {1, 2, 3, 4, 5}
    # Channels move together.
    assert torch.equal(y[:, 1].flatten(1).argmax(1), places + 7)
    assert y.is_contiguous()


def test_a_crop_is_a_piece_of_the_padded_image():
    x = torch.rand(20, 3, 5, 8)
    y = augment.crop(x, 2, torch.Generator().manual_seed(1))
    places = torch.randint(5, (2, 20, 1), generator=torch.Generator().manual_seed(1))
    for before, after, top, left in zip(x, y, *places.squeeze(2).tolist(), strict=True):
        padded = torch.zeros(3, 9, 12)
        padded[:, 2:-2, 2:-2] = before
        assert torch.equal(after, padded[:, top : top + 5, left : left + 8])
    assert augment.crop(x[:0], 2, torch.Generator()).shape == (0, 3, 5, 8)


def test_a_flip_mirrors_about_half():
    x = torch.rand(200, 1, 3, 4)
    y = augment.flip(x, torch.Generator().manual_seed(0))
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert 70 < mirrored.sum() < 130
    assert torch.equal(y[~mirrored], x[~mirrored])

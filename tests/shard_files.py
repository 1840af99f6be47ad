"""Shards of tiny images, in WebDataset's layout."""

import io
import json
import tarfile


def image_bytes(number, kind="PNG"):
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (9, 7), (20 * number % 256, 90, number)).save(content, kind)
    return content.getvalue()


def write_shard(path, members):
    """Write a tar file of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def example(number, label, **others):
    """The members of one example, with a label in .cls or, of odd numbers, in .json."""
    key = f"part/{number:06d}"
    entry = json.dumps({"label": label, "other": "text"}) if number % 2 else str(label)
    return [
        (f"{key}.png", image_bytes(number)),
        (f"{key}.{'json' if number % 2 else 'cls'}", entry.encode()),
        *((f"{key}.{ending}", content) for ending, content in others.items()),
    ]


def write_set(folder, train=(4, 3), val=(2,)):
    """Write shards with so many examples each, whose labels take turns among three classes."""
    number = 0
    for half, sizes in (("train", train), ("val", val)):
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                members += example(number, number % 3, txt=b"a caption")
                number += 1
            write_shard(folder / half / f"{shard:06d}.tar", members)

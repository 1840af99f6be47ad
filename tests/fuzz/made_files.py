"""Files that are wrong on purpose in ways that changed bytes would not find."""

import gzip
import io
import json
import struct

import numpy as np


def random_made(rng, name):
    """Return what makes such a file of a format, a list [name, ...]; None where there is no way."""
    if name.startswith("npz"):
        if rng.random() < 0.4:
            value = rng.choice((0, -1, 2.5, 1e-320, "x", None, 10**30, [], True, 65_537))
            return ["config", rng.randrange(100), value]
        change = rng.choice(("empty", "one", "float64", "noise", "nan", "missing", "int32"))
        return ["array", rng.randrange(1000), change]
    if name == "cifar python":
        kind = rng.choice(("nest", "nested_key", "memo", "frame", "long", "bytes8", "grow"))
        return ["pickle", kind, rng.choice((10, 10**5, 4 * 10**5, 2**27, 2**30, 2**31 - 1))]
    if name == "idx.gz":
        return ["bomb", rng.choice((1 << 20, 1 << 28, 1 << 30))]
    if name == "checkpoint":
        key = rng.choice(
            ("epochs", "variant", "limit", "dim", "depth", "lr", "batch", "seed", "data")
        )
        return [
            "saved",
            key,
            rng.choice((2.5, 5, 48.5, 8.0, 10**30, -1, "x", True, float("nan"), [])),
        ]
    return None


def made(whole, parts):
    """Return a format's files after a change of what they mean, and whether it has to be seen."""
    return _MAKERS[parts[0]](dict(whole), *parts[1:])


def _array(files, number, change):
    name, arrays = next(iter(files)), _arrays(files)
    names = [n for n in arrays if n != "config"]
    chosen = names[number % len(names)]
    array = arrays[chosen]
    rng = np.random.default_rng(number)
    match change:
        case "empty":
            arrays[chosen] = np.full((0, *array.shape), 7, array.dtype)
        case "one":
            arrays[chosen] = np.full((1,) * array.ndim, 3, array.dtype)
        case "noise":
            noise = rng.uniform(0.5, 1.5, array.shape) * rng.choice((-1, 1), array.shape)
            arrays[chosen] = (array + 3 * noise).astype(array.dtype)
        case "nan":
            arrays[chosen] = np.full_like(array, np.nan if array.dtype.kind == "f" else 99)
        case "missing":
            del arrays[chosen]
        case _:
            arrays[chosen] = array.astype(change)
    # What a softmax does not see, and masks of inputs, which nobody compares, may be anything; and
    # so may what no result depends on, as tape rows behind the last layer.
    unseen = chosen.endswith("key/bias") or chosen == "mask"
    unseen = unseen or not np.any(arrays.get(f"grad_{chosen}", True))
    # Reads of one entry cost nothing, whatever their cost is then multiplied by.
    unseen = unseen or (chosen == "cotangent_loss" and not np.any(arrays["atr_loss"]))
    same = chosen in arrays and np.array_equal(arrays[chosen], array)
    return {name: _npz(arrays)}, not (unseen or same or change in ("float64", "int32"))


def _config(files, number, value):
    name, arrays = next(iter(files)), _arrays(files)
    config = json.loads(str(arrays["config"]))
    key = sorted(config)[number % len(config)]
    config[key] = value
    arrays["config"] = np.array(json.dumps(config))
    return {name: _npz(arrays)}, False


def _arrays(files):
    with np.load(io.BytesIO(next(iter(files.values())))) as file:
        return {name: file[name] for name in file.files}


def _npz(arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _pickle(files, kind, number):
    count = min(number, 4 * 10**5)
    content = {
        "nest": b"\x80\x02" + b"(" * count + b"t" * count + b".",
        "nested_key": b"\x80\x02}" + b")" + b"\x85" * count + b"K\x01s.",
        "memo": b"\x80\x02}r" + struct.pack("<I", number) + b".",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", number) + b"}.",
        "long": b"\x80\x02\x8b" + struct.pack("<i", min(number, 2**31 - 1)) + b"}.",
        "bytes8": b"\x80\x04\x8e" + struct.pack("<Q", number << 10) + b".",
        "grow": b"\x80\x02]" + b"2a" * count + b".",
    }[kind]
    return {next(iter(files)): content}, True


def _bomb(files, size):
    header = struct.pack(">BBBBI", 0, 0, 8, 1, 3)
    return {next(iter(files)): gzip.compress(header + bytes(min(size, 1 << 28)), 9)}, True


def _saved(files, key, value):
    """Change an entry of checkpoint.json, and leave the rest of the file as it is."""
    index = json.loads(files["checkpoint.json"])
    if json.dumps(index["config"].get(key)) == json.dumps(value):
        return files, False
    index["config"][key] = value
    return files | {"checkpoint.json": json.dumps(index, indent=1).encode()}, True


_MAKERS = {"array": _array, "config": _config, "pickle": _pickle, "bomb": _bomb, "saved": _saved}

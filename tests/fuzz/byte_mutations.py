"""Changes of a file's bytes, each a list [name, position, ...], which JSON can hold."""

NAMES = ("flip", "cut", "insert", "overwrite", "delete", "repeat", "number", "swap")
_NUMBERS = (0, 1, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_PIECES = (
    "00",
    "ff",
    "0a",
    "20",
    "22",
    "7b",
    "5b",
    "2d31",
    "4e614e",
    "504b0304",
    "89504e47",
    "fffe",
)


def random_mutations(rng):
    """Return one change, or a few."""
    return [_random(rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]


def _random(rng):
    name = rng.choice(NAMES)
    position = rng.choice((rng.randrange(64), rng.randrange(4096), rng.randrange(1 << 30)))
    match name:
        case "flip":
            return [name, position, rng.randrange(8)]
        case "insert" | "overwrite":
            return [name, position, rng.choice(_PIECES) * rng.choice((1, 1, 4, 300))]
        case "delete" | "swap":
            return [name, position, rng.choice((1, 2, 16, 1000))]
        case "repeat":
            return [name, position, rng.choice((1, 16, 200)), rng.choice((2, 50, 3000))]
        case "number":
            order = rng.choice(("big", "little"))
            return [name, position, rng.choice((1, 2, 4, 8)), rng.choice(_NUMBERS), order]
    return [name, position]


def mutated(content, mutation):
    """Return bytes after one change; positions wrap around the file's end."""
    name, position, *rest = mutation
    at = position % max(1, len(content))
    before, after = content[:at], content[at:]
    match name:
        case "flip":
            return before + bytes([after[0] ^ 1 << rest[0]]) + after[1:] if after else content
        case "cut":
            return before
        case "insert":
            return before + bytes.fromhex(rest[0]) + after
        case "overwrite":
            piece = bytes.fromhex(rest[0])
            return before + piece + after[len(piece) :]
        case "delete":
            return before + after[rest[0] :]
        case "repeat":
            return before + after[: rest[0]] * rest[1] + after
        case "number":
            width, number, order = rest
            piece = (number % (1 << 8 * width)).to_bytes(width, order)
            return before + piece + after[width:]
        case "swap":
            size = rest[0]
            return before + after[size : 2 * size] + after[:size] + after[2 * size :]
    raise KeyError(name)

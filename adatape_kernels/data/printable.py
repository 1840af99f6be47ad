"""Names that users chose, made fit for a line of text: file names, class names, messages."""

from collections.abc import Iterator


def printable(text: object, most: int | None = None) -> str:
    """Return a text in which every character can be printed, in one line.

    Line breaks, control and formatting characters, among them those that turn the direction of
    writing, and bytes of file names that are not UTF-8 become escapes such as `\\n`, `\\u202e` and
    `\\xff`.

    Args:
        text: a text or a path.
        most: the number of characters that a longer text is cut to, in its middle; None for all.
    """
    shown = "".join(_characters(str(text)))
    if most is None or len(shown) <= most:
        return shown
    kept = most - 1
    return f"{shown[: kept - kept // 2]}…{shown[len(shown) - kept // 2 :]}"


def _characters(text: str) -> Iterator[str]:
    for character in text:
        if character.isprintable():
            yield character
        elif "\udc80" <= character <= "\udcff":
            # Python keeps a byte of a file name that is not UTF-8 as such a surrogate.
            yield f"\\x{ord(character) - 0xDC00:02x}"
        else:
            yield character.encode("unicode_escape", "surrogatepass").decode("ascii")

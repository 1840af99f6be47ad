"""What a case may end with, beside nothing to complain about."""

ERRORS = (ValueError, TypeError)
"""What a call may raise over its arguments; NotServed, a RuntimeError, comes to it for ops."""


class Fault(Exception):
    """A case showed a fault. `kind` is a word or two, which a smaller case must share."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind
        self.text = text


def first_line(error):
    return (str(error).splitlines() or [""])[0][:300]


def check_refusal(error, allowed=ERRORS):
    """Raise Fault unless an error is of an allowed class and says something in one line."""
    name = type(error).__name__
    if not isinstance(error, allowed):
        text = f"expected one of {_names(allowed)}, got {name}: {first_line(error)}"
        raise Fault(f"raised {name}", text)
    if not str(error) or "\n" in str(error):
        raise Fault("not one line", f"{name}: {str(error)[:300]!r}")


def _names(classes):
    return ", ".join(each.__name__ for each in classes)

"""Options that change nothing beside the others, and are therefore refused where they are given.

Who gives such an option expects something of it. Saved runs are not asked; they go on as they were.
"""

from collections.abc import Mapping
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.recipes.training.curve_fields import CurveFields
from adatape_kernels.recipes.training.loading_options import SETS_OF_FILES
from adatape_kernels.recipes.training.option_checks import option_name

OF_A_READ = (
    "halt_threshold_range",
    "halt_threshold",
    "topk",
    "bank",
    "bank_size",
    "bank_patch",
    "ponder_weight",
)
"""Options that change nothing of a model that reads nothing."""


def check_used(options: CurveFields, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError where an option is given, in the place of its default, that changes nothing.

    Args:
        options: all options of a run.
        given: those that are given; a whole configuration may be, which holds the defaults.
        defaults: what each is where it is not given.
    """
    for name, why in _unused(options, defaults).items():
        value = getattr(options, name)
        if name in given and value != defaults[name]:
            raise ValueError(f"{option_name(name)}: expected none {why}, got {shown(value)}")


def check_loading_used(asked: Mapping[str, Any], data: str) -> None:
    """Raise ValueError where images in memory are not to be looked at, as all of them are read.

    Args:
        asked: what is asked for of how images are read, by field of Loading.
        data: name of the image set.
    """
    look = asked.get("look")
    if look not in (None, "all") and data not in SETS_OF_FILES:
        raise ValueError(f"look: expected all for {data}, whose files are read whole, got {look}")


def _unused(options: CurveFields, defaults: Mapping[str, Any]) -> dict[str, str]:
    """Return why options change nothing, by their names."""
    found: dict[str, str] = {}
    if options.reads and not options.num_tape_tokens:
        found |= dict.fromkeys(OF_A_READ, "with --num-tape-tokens 0, which reads nothing")
    elif options.reads and options.bank == "input":
        found["bank_size"] = "with --bank input, whose tokens are the image's patches"
    elif options.reads:
        found["bank_patch"] = "with --bank learn, whose tokens are no patches"
    # A side of bank patches has to divide that of the images, whether there are any or not.
    if options.image_size % defaults["bank_patch"]:
        found.pop("bank_patch", None)
    if not options.randaugment:
        found["randaugment_magnitude"] = "without --randaugment"
    if options.unreadable == "stop":
        found["unreadable_limit"] = "with --unreadable stop, which skips no image"
    return found

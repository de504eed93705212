"""Tower of a family that ships as data, of a configuration whose numbers fit each other and the text's.

Takes what reads a configuration by the names of its family's formulas; gives the Tower, or says what does not fit.
"""

from __future__ import annotations

from typing import Protocol

from galvatron.core.errors import ConfigError
from galvatron.core.known import KnownFamily
from galvatron.core.model import Tower
from galvatron.core.model.tower import windows_of
from galvatron.core.words import shown

PART, TEXT_WIDTH = "vision_config", "text_config.hidden_size"
HEADS, MERGE, PATCH = (f"{PART}.{name}" for name in ("num_attention_heads", "spatial_merge_size", "patch_size"))
CHANNELS, UNREAD_CHANNELS = f"{PART}.in_channels", f"{PART}.in_chans"
OUTPUTS = (f"{PART}.out_hidden_size", f"{PART}.hidden_size")
"""Names for the width of what the text is given: the first of these that a family's shapes have."""
WINDOW, WHOLE, DEPTH = (f"{PART}.{name}" for name in ("window_size", "fullatt_block_indexes", "num_hidden_layers"))


class Reader(Protocol):
    """A configuration read by the names of its family's formulas."""

    def size(self, formula: str) -> int:
        """The value of a formula; ConfigError where a size is missing or none."""

    def given(self, name: str) -> object:
        """What a file has of any kind, or the default."""

    def key(self, name: str) -> str:
        """What the file calls it."""


def tower_of(reader: Reader, known: KnownFamily) -> Tower:
    """What sees images of any size.

    Raises:
        ConfigError: a number of it is none, or does not fit the others or the text's.
    """
    layer = [shape for shape in known.embedding if shape.each]
    width = next(shape.shape[0] for shape in layer if len(shape.shape) == 2 and shape.shape[0] == shape.shape[1])
    used = {size for shape in known.embedding for size in shape.shape}
    _check_widths(reader, known, width, next(name for name in OUTPUTS if name in used))
    path = layer[0].names[0].partition(".*")[0]
    return Tower(layers=path, num_heads=reader.size(HEADS), merge=reader.size(MERGE), **_windows(reader, known))


def _check_widths(reader: Reader, known: KnownFamily, width: str, output: str) -> None:
    """Raise ConfigError where heads do not divide ``width``, or ``output`` or channels are not what they have to be."""
    if reader.size(width) % reader.size(HEADS):
        raise _refused(reader, known, HEADS, f"a divisor of {reader.key(width)}={reader.size(width)}")
    if reader.size(output) != reader.size(TEXT_WIDTH):
        raise _refused(reader, known, output, f"the {reader.size(TEXT_WIDTH)} of the text's hidden_size")
    channels = reader.size(CHANNELS)
    if reader.given(UNREAD_CHANNELS) not in (None, channels):  # another name in files, which the model does not read
        raise _refused(reader, known, UNREAD_CHANNELS, f"in_channels={channels}, by which the model is built")


def _windows(reader: Reader, known: KnownFamily) -> dict[str, int]:
    """What ``windows_of`` says of windows that are some; nothing for a family without."""
    if WINDOW not in known.defaults:
        return {}
    tile, depth, whole = reader.size(PATCH) * reader.size(MERGE), reader.size(DEPTH), reader.given(WHOLE)
    if reader.size(WINDOW) % tile:
        sides = f"{reader.key(PATCH)}={reader.size(PATCH)} times {reader.key(MERGE)}={reader.size(MERGE)}"
        raise _refused(reader, known, WINDOW, f"a multiple of {tile} ({sides})")
    if not isinstance(whole, (list, tuple)) or not _are_layers(whole, depth):
        raise _refused(reader, known, WHOLE, f"a list of different layers from 0 to {depth - 1}")
    return windows_of({name.removeprefix(f"{PART}."): reader.given(name) for name in (WINDOW, PATCH, WHOLE)})


def _are_layers(indexes: list[object] | tuple[object, ...], depth: int) -> bool:
    """Whether they are different numbers of ``depth`` layers."""
    are_numbers = all(type(index) is int and 0 <= index < depth for index in indexes)
    return are_numbers and len(set(indexes)) == len(indexes)


def _refused(reader: Reader, known: KnownFamily, name: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"{reader.key(name)} of a {known.family.model_type} config must be {wanted}, got {shown(reader.given(name))}; "
        "give a Hugging Face config.json"
    )

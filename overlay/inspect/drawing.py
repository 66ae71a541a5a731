"""The picture of a disk on paper (PNG) and in a terminal."""

from __future__ import annotations

from pathlib import Path

from PIL import Image as Canvas
from PIL import ImageDraw, ImageFont
from rich.console import Console
from rich.style import Style
from rich.text import Text

from nbdserve.common.errors import ImageError
from nbdserve.common.sizes import format_size
from overlay.formats.image import Image
from overlay.inspect.picture import Colour, Kind, Survey, colour_of, leading_kind, survey

_BLOCKS = 128 * 72
"""Blocks of a PNG, at most."""
_COLUMNS = (32, 64, 128)
"""Blocks in a row. So each row, as each block, is a power of two of bytes."""
_WIDTH, _GAP = 128 * 9, 1
"""Pixels of a row, and between two blocks."""
_MARGIN, _TITLE, _LEGEND, _RULER = 32, 92, 84, 104
"""Pixels around everything, above the blocks, below them, and left of them."""
_PAPER, _INK, _FAINT = (0xFF, 0xFF, 0xFF), (0x22, 0x26, 0x2E), (0x7A, 0x80, 0x8C)
_TERMINAL_ROWS = 16


def save_png(image: Image, path: Path, title: str) -> None:
    """Draw a disk into a file; ImageError when that cannot be written."""
    seen = survey(image, _BLOCKS)
    picture = _draw(seen, title)
    try:
        picture.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or error}") from error


def show(image: Image, console: Console, title: str) -> None:
    """Draw a disk in the terminal, two blocks above each other in a character."""
    columns = max((number for number in _COLUMNS if number <= console.width - 12), default=_COLUMNS[0])
    seen = survey(image, columns * _TERMINAL_ROWS * 2)
    console.print(Text(f"{title}: {_summary(seen)}"), soft_wrap=True)
    mixes = console.color_system in ("256", "truecolor")
    for row in range(0, len(seen.shares), 2 * columns):
        line = Text(f"{format_size(row * seen.block):>10}  ")
        lower = seen.shares[row + columns : row + 2 * columns]
        for number, share in enumerate(seen.shares[row : row + columns]):
            below = _shown(lower[number], mixes) if number < len(lower) else None
            line.append("▀", Style(color=_shown(share, mixes), bgcolor=below))
        console.print(line, no_wrap=True)
    for kind in seen.labels:
        colour = _hex(kind.colour) if mixes else kind.name_of_colour
        console.print(Text(" " * 12).append("██", Style(color=colour)).append(f" {_share(seen, kind)}"))


def _shown(share: tuple[int, int, int, int], mixes: bool) -> str:
    return _hex(colour_of(share)) if mixes else leading_kind(share).name_of_colour


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _draw(seen: Survey, title: str) -> Canvas.Image:
    blocks = len(seen.shares)
    # A small disk gets large blocks, in about the same shape.
    columns = next((number for number in _COLUMNS if blocks <= number * number // 2), _COLUMNS[-1])
    rows, cell = -(-blocks // columns), _WIDTH // columns
    width = _RULER + _WIDTH + 2 * _MARGIN
    picture = Canvas.new("RGB", (width, _TITLE + rows * cell + _LEGEND + 2 * _MARGIN), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN), _fitting(title, width - 2 * _MARGIN), fill=_INK, font=_font(24))
    pen.text((_MARGIN, _MARGIN + 36), _summary(seen), fill=_FAINT, font=_font(16))
    left, top = _MARGIN + _RULER, _MARGIN + _TITLE
    for number, share in enumerate(seen.shares):
        x, y = left + number % columns * cell, top + number // columns * cell
        edge = cell - _GAP - 1
        pen.rectangle((x, y, x + edge, y + edge), fill=colour_of(share))
    _draw_ruler(pen, columns * seen.block, rows, cell)
    _draw_legend(pen, seen, top + rows * cell + 24, width)
    return picture


def _summary(seen: Survey) -> str:
    absent = seen.totals[Kind.ABSENT]
    # Only what is complete is 100 %.
    local = min(99.9, 100 - 100 * absent / seen.size) if absent else 100
    return f"{format_size(seen.size)}, {local:.1f}% is here; a block is {format_size(seen.block)}"


def _draw_ruler(pen: ImageDraw.ImageDraw, row_bytes: int, rows: int, cell: int) -> None:
    """Where a row begins, beside some of them."""
    font = _font(13)
    for row in range(0, rows, max(1, 72 // cell)):
        y = _MARGIN + _TITLE + row * cell + cell // 2
        text = format_size(row * row_bytes)
        pen.text((_MARGIN + _RULER - 12, y), text, fill=_FAINT, font=font, anchor="rm")


def _draw_legend(pen: ImageDraw.ImageDraw, seen: Survey, y: int, width: int) -> None:
    """Each kind's colour, name, size and share, next to each other; below a bar of their shares."""
    font, x = _font(15), _MARGIN
    for kind in seen.labels:
        text = _share(seen, kind)
        pen.rectangle((x, y, x + 15, y + 15), fill=kind.colour)
        pen.text((x + 22, y - 1), text, fill=_INK, font=font)
        x += 22 + int(pen.textlength(text, font=font)) + 26
    x, whole = _MARGIN, width - 2 * _MARGIN
    shown = [kind for kind in seen.labels if seen.totals[kind]]
    for kind in shown:
        end = width - _MARGIN if kind is shown[-1] else x + max(2, whole * seen.totals[kind] // seen.size)
        pen.rectangle((x, y + 34, end - 1, y + 48), fill=kind.colour)
        x = end


def _share(seen: Survey, kind: Kind) -> str:
    length = seen.totals[kind]
    percent = 100 * length / seen.size
    shown = f"{percent:.1f}%" if not length or percent >= 0.1 else "<0.1%"
    return f"{seen.labels[kind]} {format_size(length)} ({shown})"


def _fitting(title: str, width: int) -> str:
    """The end of a title that is too long: a path's end says more than its beginning."""
    font = _font(24)
    if font.getlength(title) <= width:
        return title
    while title and font.getlength("..." + title) > width:
        title = title[1:]
    return "..." + title


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow comes with FreeType"
    return font

"""Small PNG files: one picture of a page takes tens of kilobytes, since a repository keeps every version of it."""

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

DPI, COLORS = 72, 48


def shrink(image: Image.Image) -> Image.Image:
    """Reduces an image to a palette, with white as it was."""
    few = image.convert("RGB").quantize(COLORS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette = few.getpalette() or []
    few.putpalette([255 if value >= 252 else value for value in palette])
    return few


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    shrink(Image.open(drawn)).save(path, optimize=True)

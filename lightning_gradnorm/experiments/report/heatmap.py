"""Draws the cosines between task gradients as a heatmap with names and numbers, for `GradientNormMonitor`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

AGAINST, NEITHER, TOGETHER, UNKNOWN = (213, 94, 0), (255, 255, 255), (0, 114, 178), (190, 190, 190)
"""Vermilion over white to blue: distinct for color-blind readers, and each cell also shows its number."""


def cosine_heatmap(names: Sequence[str], cosines: Tensor) -> Tensor:
    """Return the matrix as an image for ``add_image``: names on both sides, each cell colored and numbered.

    Args:
        names: names of the rows and columns.
        cosines: values between -1 and 1, shape (T, T). Values that are not finite are gray.

    Shape: RGB, uint8 ``(3, height, width)``.

    Example:
        >>> from lightning_gradnorm import GradientNormMonitor
        >>> monitor = GradientNormMonitor(cosine_image=cosine_heatmap)
        >>> monitor.cosine_image(["seg", "depth"], torch.eye(2)).dtype
        torch.uint8
    """
    cell, size = (72, 18) if len(names) <= 12 else (44, 13)
    font = ImageFont.load_default(size)
    gap = size // 2
    texts = [_text(name if len(name) <= 40 else f"{name[:39]}~", font) for name in names]
    margin = max(text.width for text in texts) + 2 * gap
    side = margin + cell * len(names) + gap
    picture = Image.new("RGB", (side, side), NEITHER)
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        start = margin + i * cell
        picture.paste(text, (margin - gap - text.width, start + (cell - text.height) // 2))
        upright = text.rotate(90, expand=True)
        picture.paste(upright, (start + (cell - upright.width) // 2, margin - gap - upright.height))
    for i, row in enumerate(cosines.tolist()):
        for j, cosine in enumerate(row):
            known = cosine == cosine
            color = _color(cosine) if known else UNKNOWN
            x, y = margin + j * cell, margin + i * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=color, outline=UNKNOWN)
            ink = NEITHER if sum(color) < 420 else (0, 0, 0)
            number = f"{cosine:.2f}" if known else "?"
            draw.text((x + cell / 2, y + cell / 2), number, fill=ink, font=font, anchor="mm")
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(side, side, 3).permute(2, 0, 1).contiguous()


def _color(cosine: float) -> tuple[int, int, int]:
    end = TOGETHER if cosine > 0 else AGAINST
    strength = min(abs(cosine), 1.0)
    red, green, blue = (round(white + strength * (own - white)) for white, own in zip(NEITHER, end, strict=True))
    return red, green, blue


def _text(words: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    left, top, right, bottom = (round(edge) for edge in font.getbbox(words))
    picture = Image.new("RGB", (max(right - left, 1) + 2, max(bottom - top, 1) + 2), NEITHER)
    ImageDraw.Draw(picture).text((1 - left, 1 - top), words, fill=(0, 0, 0), font=font)
    return picture

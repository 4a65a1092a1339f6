"""Draws a solution next to the exact one and the error: maps for two coordinates, curves for one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_gradnorm.experiments.problems.pde.equation import Equation

_COLORS = ((0, 60, 120), (60, 140, 200), (245, 245, 245), (230, 150, 70), (150, 50, 0))
"""Blue over white to vermilion, distinct for color-blind readers."""
_ONE_SIGN_COLORS = ((245, 245, 245), (160, 200, 225), (60, 140, 200), (0, 60, 120))
"""White is zero here, too, for a reference without negative values."""
_ERROR_COLORS = ((250, 250, 250), (250, 190, 110), (200, 70, 30), (70, 10, 40))
_INK, _PAPER, _FRAME = (30, 30, 30), (255, 255, 255), (150, 150, 150)
WIDTH, HEIGHT, MARGIN, BAR = 240, 220, 46, 12
"""Size of a panel, its margin for text, and width of the color bar, in pixels."""


def solution_picture(equation: Equation, solution: Tensor) -> Tensor:
    """Return an image with three panels: the solution, the reference, and their absolute difference.

    The solution is drawn on the scale of the reference; its own range stands above it. White is zero.

    Args:
        equation: The equation, with one or two coordinates.
        solution: Values at the points of `Equation.grid`, shape ``(n, 1)``.

    Shape: RGB, uint8 ``(3, height, width)``.

    Example:
        >>> from lightning_gradnorm.experiments.problems.pde import Poisson
        >>> solution_picture(Poisson(), torch.zeros(201, 1)).dtype
        torch.uint8
    """
    found = solution.detach().double().cpu().reshape(equation.grid_shape)
    exact = equation.reference(equation.grid()).reshape(equation.grid_shape)
    error = (found - exact).abs()
    relative = float(error.norm() / exact.norm())
    high = float(exact.abs().max())
    has_two_signs = float(exact.min()) < -1e-6 * high
    low, colors = (-high, _COLORS) if has_two_signs else (0.0, _ONE_SIGN_COLORS)
    span = f"solution, {float(found.min()):.2g} to {float(found.max()):.2g}"
    panels = [
        _panel(span, equation, found, low, high, colors),
        _panel("reference", equation, exact, low, high, colors),
        _panel(f"|error|, relative L2 {relative:.2g}", equation, error, 0.0, float(error.max()), _ERROR_COLORS),
    ]
    picture = Image.new("RGB", (sum(one.width for one in panels), panels[0].height), _PAPER)
    for number, panel in enumerate(panels):
        picture.paste(panel, (number * panel.width, 0))
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _panel(
    title: str, equation: Equation, values: Tensor, low: float, high: float, colors: Sequence[tuple[int, int, int]]
) -> Image.Image:
    is_map = values.dim() == 2
    panel = Image.new("RGB", (WIDTH + 2 * MARGIN + BAR + 26, HEIGHT + 2 * MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    left, top, right, bottom = MARGIN, MARGIN, MARGIN + WIDTH, MARGIN + HEIGHT
    share = ((values - low) / (high - low if high > low else 1.0)).nan_to_num(0.5).clamp(0, 1)
    if is_map:
        # The first coordinate points right, the second up.
        panel.paste(_colored(share.T.flip(0), colors).resize((WIDTH, HEIGHT)), (left, top))
        bar = _colored(torch.linspace(1, 0, HEIGHT).double().unsqueeze(1), colors).resize((BAR, HEIGHT))
        panel.paste(bar, (right + 10, top))
    else:
        places = torch.linspace(left, right, len(share)).tolist()
        line = [(x, bottom - y * HEIGHT) for x, y in zip(places, share.tolist(), strict=True)]
        draw.line(line, fill=colors[-2], width=2)
    draw.rectangle((left, top, right, bottom), outline=_FRAME)
    numbers = right + (10 + BAR if is_map else 0) + 4
    draw.text((left, top - 8), title, fill=_INK, font=font, anchor="ls")
    draw.text((numbers, top), f"{high:.2g}", fill=_INK, font=font, anchor="lt")
    draw.text((numbers, bottom), f"{low:.2g}", fill=_INK, font=font, anchor="ls")
    for k, (name, (x, y)) in enumerate(zip(equation.coordinates, [(0.5, 1.0), (0.0, 0.5)], strict=False)):
        middle = (left + x * WIDTH, bottom + 6) if k == 0 else (left - 8, top + y * HEIGHT)
        draw.text(middle, name, fill=_INK, font=font, anchor="mt" if k == 0 else "rm")
        first, last = f"{equation.lower[k]:g}", f"{equation.upper[k]:g}"
        ends = [((left, bottom + 6), "lt"), ((right, bottom + 6), "rt")]
        ends = ends if k == 0 else [((left - 8, bottom), "rs"), ((left - 8, top), "rt")]
        for text, (place, anchor) in zip((first, last), ends, strict=True):
            draw.text(place, text, fill=_INK, font=font, anchor=anchor)
    return panel


def _colored(share: Tensor, colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Return an image of numbers between 0 and 1, shape (height, width)."""
    table = torch.tensor(colors, dtype=torch.float64)
    place = share * (len(colors) - 1)
    below = place.floor().long().clamp(max=len(colors) - 2)
    part = (place - below).unsqueeze(-1)
    pixels = (table[below] * (1 - part) + table[below + 1] * part).round().to(torch.uint8).contiguous()
    height, width = share.shape
    return Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))

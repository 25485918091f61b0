"""Codes that are fp8 numbers (e4m3): which are none, and how the eight of a lane and block lie in its two words.

Words x and y are such that decoding to bf16 is short. A register of bf16 holds two codes, those of k and k + 1: in each
half the sign in bit 15, exponent and mantissa in bits 10 .. 4. Seven instructions (dequant_e4m3.cuh) make a lane's
four registers a, b, c, d, all masked to those bits:

    a = x    b = y    c = p ^ (x << 4)    d = p ^ rotate_right(y, 4)    p = bytes 1 of x, 0 of y, 3 of x, 2 of y

a and b are bits of the words as they are. Each bit of c and d is one of the others exclusive-or one that is known by
then, so that words for any codes exist, and only one for each.
"""

from __future__ import annotations

import torch

SCALE_LIMIT = 146  # 448, the largest number, times it is one that f16 holds


def is_nan(codes: torch.Tensor) -> torch.Tensor:
    """Which codes (uint8) of e4m3 are no number."""
    return codes & 0x7F == 0x7F


def check(codes: torch.Tensor, scales: torch.Tensor, name: str) -> None:
    """A ValueError for codes that are no number, and for scales by which a weight might not be finite."""
    if bool(is_nan(codes).any()):
        raise ValueError(f"codes have NaN (0x7f, 0xff), which {name} does not hold; check the checkpoint")
    if not bool((scales.abs() <= SCALE_LIMIT).all()):
        worst = scales.abs().max().item()
        raise ValueError(f"the largest scale is {worst}; {name} holds those up to {SCALE_LIMIT}")


def to_words(words: torch.Tensor) -> torch.Tensor:
    """Two words of bytes, int32 [.., 2], which are codes in the order a, b, c, d, as the words that kernels read."""
    a, b, c, d = _registers(words)
    y = b | ((c ^ a << 4) >> 8 & 0x00070007)  # bits 2 .. 0, from 10 .. 8 of c
    x = a | ((d << 8 ^ b << 4) & 0x70007000)  # bits 14 .. 12, from 6 .. 4 of d
    y |= (d << 4 ^ y << 12) & 0x70007000  # bits 14 .. 12, from 10 .. 8 of d
    x |= (c >> 4 ^ x >> 12) & 0x000F000F  # bits 2 .. 0 and 3, from 6 .. 4 and 7 of c
    x |= (c >> 4 ^ b << 4) & 0x08000800  # bit 11, from 15 of c
    y |= (d << 4 ^ a >> 4) & 0x08000800  # bit 11, from 7 of d
    y |= _rotated((d ^ b << 8) & _signed(0x80008000), 28)  # bit 3 of the other half, from 15 of d
    return torch.stack([x, y], -1)


def from_words(words: torch.Tensor) -> torch.Tensor:
    """The inverse of ``to_words``."""
    x, y = words.unbind(-1)
    p = (x >> 8 & 0x00FF00FF) | (y << 8 & _signed(0xFF00FF00))
    c, d = p ^ x << 4, p ^ _rotated(y, 4)
    return torch.stack([_bytes(x) | _bytes(y) << 16, _bytes(c) | _bytes(d) << 16], -1)


def _registers(words: torch.Tensor) -> list[torch.Tensor]:
    """Of bytes 0 and 1 of each word, then 2 and 3, one register each."""
    return [_halves(each) for word in words.unbind(-1) for each in (word, word >> 16)]


def _halves(words: torch.Tensor) -> torch.Tensor:
    """Bytes 0 and 1 in the places of bf16."""
    low = (words << 8 & 0x8000) | (words << 4 & 0x07F0)
    return low | (words << 16 & _signed(0x80000000)) | (words << 12 & 0x07F00000)


def _bytes(halves: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_halves``: bytes 0 and 1, the others 0."""
    low = (halves >> 8 & 0x80) | (halves >> 4 & 0x7F)
    return low | (halves >> 16 & 0x8000) | (halves >> 12 & 0x7F00)


def _rotated(words: torch.Tensor, right: int) -> torch.Tensor:
    return (words >> right & (1 << 32 - right) - 1) | words << 32 - right


def _signed(mask: int) -> int:
    """Of 32 bits, as torch takes it for an int32."""
    return mask - (1 << 32) if mask >> 31 else mask

"""xz, for what is much alike: gzip does not look far enough back to find it. The import waits for the first use."""

from __future__ import annotations

from typing import Any


def module() -> Any:
    """lzma; a ValueError where Python was built without it."""
    try:
        import lzma
    except ImportError as error:
        raise ValueError(f"this Python was built without lzma ({error}), by which kernels are packed") from None
    return lzma


def pack(content: bytes) -> bytes:
    """Equal contents give equal bytes. A window of 8 MiB, in which the kernels of one kind lie whole."""
    lzma = module()
    return bytes(lzma.compress(content, preset=6 | lzma.PRESET_EXTREME))


def unpack(packed: bytes, limit: int) -> bytes:
    """The inverse of ``pack``; a ValueError for what is damaged, or unpacks to more than ``limit`` bytes."""
    lzma = module()
    machine = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=limit)
    try:
        content: bytes = machine.decompress(packed, limit + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"it cannot be unpacked ({error})") from None
    if len(content) > limit or not machine.eof or machine.unused_data:
        raise ValueError(f"it is cut short, or unpacks to more than {limit} bytes")
    return content

"""Cuts a JPEG file down to the rows of pixels that are asked for, so that the others are not decoded.

That needs a restart marker after each row of blocks, as conversion writes them where it encodes: the rows between two
markers are decoded from nothing else. Any other file is left whole.
"""

from typing import NamedTuple

import numpy as np

from kilobatch.data.numba_jit import Bytes, Integer, exact
from kilobatch.data.views.byte_vectors import BYTES, copy_bytes, find_byte

START, END, RESTART, SCAN, INTERVAL, TABLE = 0xD8, 0xD9, 0xD0, 0xDA, 0xDD, 0xC4
FRAME, EXTENDED_FRAME, LAST_FRAME = 0xC0, 0xC1, 0xCF  # those between are progressive, lossless or arithmetic
APPLICATION, JFIF, ADOBE, LAST_APPLICATION, COMMENT = 0xE0, 0xE0, 0xEE, 0xEF, 0xFE
FIRST_OF_SEGMENTS = 0xC0  # markers below it have no length
BLOCK = 8  # pixels


class Header(NamedTuple):
    """What stands before a file's encoded data. size: bytes of the copy, 0 if the file cannot be cut."""

    size: Integer
    data: Integer  # place of the encoded data
    frame: Integer  # place of the frame's segment in the copy
    block_rows: Integer  # rows of pixels between two restart markers


class Cut(NamedTuple):
    """A part of a file. size: its bytes, 0 if there is none; first: its first row of pixels; rows: how many it has."""

    size: Integer
    first: Integer
    rows: Integer


@exact
def number_at(data: Bytes, at: Integer) -> Integer:
    """Two bytes; 0 past the end."""
    return np.int64(data[at]) << 8 | np.int64(data[at + 1]) if at + 2 <= len(data) else np.int64(0)


@exact
def next_marker(data: Bytes, at: Integer) -> Integer:
    """Place of the first marker from there on in encoded data; the data's length if there is none."""
    start, end = np.int64(data.ctypes.data), len(data) - 1
    while at < end:
        skip = find_byte(start + at, np.uint8(0xFF)) if at + BYTES <= end else BYTES
        if skip < BYTES:
            at += skip
        elif at + BYTES <= end:
            at += BYTES
            continue
        elif data[at] != 0xFF:
            at += 1
            continue
        if data[at + 1] != 0:  # else it is a byte of data
            return at
        at += 2
    return len(data)


@exact
def copy_header(data: Bytes, height: Integer, width: Integer, to: Bytes) -> Header:
    """Copies to `to` what an image of this size needs of its header, all but comments and the like."""
    nothing = Header(np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    if len(data) < 4 or data[0] != 0xFF or data[1] != START or len(to) < len(data):
        return nothing
    to[0], to[1] = 0xFF, START
    at, size, frame, interval, block_rows, row_blocks, marker = 2, 2, 0, 0, 0, 0, START
    while marker != SCAN:
        if at + 4 > len(data) or data[at] != 0xFF:
            return nothing
        marker, length = np.int64(data[at + 1]), number_at(data, at + 2) + 2
        if marker < FIRST_OF_SEGMENTS or RESTART <= marker <= END or length < 6 or at + length > len(data):
            return nothing
        if FRAME <= marker <= EXTENDED_FRAME:
            components = np.int64(data[at + 9]) if length > 9 else np.int64(0)
            fits = length == 10 + 3 * components and data[at + 4] == 8  # bits
            if not fits or frame > 0 or number_at(data, at + 5) != height or number_at(data, at + 7) != width:
                return nothing
            across = down = 1
            for component in range(components):
                sampling = np.int64(data[at + 11 + 3 * component])
                across, down = max(across, sampling >> 4), max(down, sampling & 15)
            if components == 1 and across * down > 1:  # then rows of blocks are not as high as this says
                return nothing
            frame, block_rows, row_blocks = size, BLOCK * down, -(-width // (BLOCK * across))
        elif EXTENDED_FRAME < marker <= LAST_FRAME and marker != TABLE:
            return nothing
        elif marker == INTERVAL:
            interval = number_at(data, at + 4)
        elif marker == SCAN and (frame == 0 or interval != row_blocks or data[at + 4] != to[frame + 9]):
            return nothing  # no restart markers, others, or several scans
        if not (APPLICATION <= marker <= LAST_APPLICATION or marker == COMMENT) or marker in (JFIF, ADOBE):
            copy_bytes(np.int64(to.ctypes.data) + size, np.int64(data.ctypes.data) + at, length)
            size += length
        at += length
    return Header(size, at, frame, block_rows)


@exact
def cut_rows(data: Bytes, height: Integer, width: Integer, top: Integer, end: Integer, to: Bytes) -> Cut:
    """Writes to `to`, at least as long as the file, the part of it that has the rows of pixels [top, end).

    These rows are decoded to the same bits. Of the others that come with them, those at the cut may differ: where there
    are fewer rows of chroma than of pixels, a row is mixed from those above and below.
    """
    header = copy_header(data, height, width, to)
    whole = Cut(np.int64(0), np.int64(0), np.int64(height))
    if header.size == 0:
        return whole
    final = (height - 1) // header.block_rows
    first, last = max(0, top - 1) // header.block_rows, min(height - 1, end) // header.block_rows
    if first == 0 and last == final:
        return whole
    size, at = header.size, header.data
    for row in range(last + 1):
        marker = next_marker(data, at)
        if marker + 2 > len(data) or data[marker + 1] != (END if row == final else RESTART + row % 8):
            return whole
        if row >= first:
            copy_bytes(np.int64(to.ctypes.data) + size, np.int64(data.ctypes.data) + at, marker - at)
            size += marker - at + 2
            to[size - 2], to[size - 1] = 0xFF, END if row == last else RESTART + (row - first) % 8
        at = marker + 2
    rows = min(height, (last + 1) * header.block_rows) - first * header.block_rows
    to[header.frame + 5], to[header.frame + 6] = rows >> 8, rows & 0xFF
    return Cut(size, first * header.block_rows, rows)

"""Joined transport streams: ``cat a.ts b.ts``.

FFmpeg marks a packet as corrupt wherever the counter of a stream's packets jumps. It jumps where packets are lost, and
also where another transport stream begins. Layout of the packets: ISO/IEC 13818-1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_SIZE, _SYNC = 188, 0x47  # bytes of a packet, and the first one
_SPACINGS = (188, 192)  # bytes from packet to packet; camcorders write four bytes before each


def breaks_only_at_joins(content: np.ndarray, stream: int, keyframes: Mapping[int, bool]) -> bool:
    """Whether the packets of a stream are complete, except that other transport streams may follow the first.

    Where another one begins, the stream goes on with a keyframe, and either its time falls back or the counter of the
    program table's packets jumps as well.

    Args:
        content: the file, uint8.
        stream: identifier of the stream's packets.
        keyframes: whether time falls back at a keyframe, by the position of its first packet in the file.
    """
    fitting = [n for n in _SPACINGS if len(content) % n == 0 and (content[n - _SIZE :: n] == _SYNC).all()]
    if not fitting:
        return False
    spacing = fitting[0]
    packets = content.reshape(-1, spacing)[:, spacing - _SIZE :]
    identifiers = (packets[:, 1].astype(int) & 0x1F) << 8 | packets[:, 2]
    own = identifiers == stream
    if (packets[own, 1] & 0x80).any():  # the packet was received with errors
        return False
    tables = [row for _, row in _jumps(packets, identifiers == 0)]
    for before, row in _jumps(packets, own):
        falls = keyframes.get(row * spacing)
        if falls is None or not packets[row, 1] & 0x40:  # 0x40: a frame begins here
            return False
        if not falls and not any(before < table < row for table in tables):
            return False
    return True


def _jumps(packets: np.ndarray, own: np.ndarray) -> list[tuple[int, int]]:
    """The places where the counter of some packets jumps: the rows before and after."""
    rows = np.flatnonzero(own & (packets[:, 3] & 0x10 != 0))  # 0x10: with a payload; others are not counted
    steps = np.diff(packets[rows, 3].astype(int) & 0x0F) % 16
    places = np.flatnonzero(steps > 1)  # 0: a packet that is sent twice
    return [(int(rows[place]), int(rows[place + 1])) for place in places]

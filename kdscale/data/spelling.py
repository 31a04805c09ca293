"""What bytes tokens stand for, in a vocabulary and in a text.

Byte-level BPE (GPT-2) writes each byte as a printable character; SentencePiece (Kudo & Richardson 2018, arXiv
1808.06226) writes a space as ``▁``, and bytes that no piece has as ``<0xNN>``.
"""

import re
from collections.abc import Sequence

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from kdscale.paired import Matches

Spelling = list[bytes | None]
"""By id; none for a token that stands for no text of its own (an end of the document, a role), and for an id without a token."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


def _printable_bytes() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others in order for the characters from 256 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
    assert table.keys() == set(ByteLevel.alphabet())
    return table


_PRINTABLE = _printable_bytes()


def spell_byte_level(token: str) -> bytes:
    """The bytes of a token of byte-level BPE; a character that is none of its own stands for itself."""
    return b"".join(bytes([_PRINTABLE[one]]) if one in _PRINTABLE else one.encode() for one in token)


def spell_piece(piece: str) -> bytes:
    """The bytes of a SentencePiece piece."""
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace(_SPACE, " ").encode()


def is_fallback(piece: str) -> bool:
    """Whether a piece is a byte that SentencePiece falls back to."""
    return _BYTE.fullmatch(piece) is not None


def match(student: Spelling, teacher: Spelling) -> Matches:
    """The tokens that spell the same bytes. Where several of one vocabulary do, the last counts: SentencePiece puts the bytes it
    falls back to before its pieces, and those are what it uses."""
    of_student, of_teacher = (
        {spelled: index for index, spelled in enumerate(spelling) if spelled} for spelling in (student, teacher)
    )
    both = [spelled for spelled in of_student if spelled in of_teacher]
    return Matches(
        np.array([of_student[spelled] for spelled in both], np.int64),
        np.array([of_teacher[spelled] for spelled in both], np.int64),
    )


def token_ends(ids: Sequence[int], characters: Sequence[tuple[int, int]], spelling: Spelling, text: str) -> np.ndarray:
    """Where each token ends in the UTF-8 bytes of ``text``, int64; see ``spans``.

    To the byte where the tokens spell the text, but for a space put before it. A tokenizer that changes the text says by
    ``characters`` from where to where each token goes, and one that ends inside a character counts as ending before it.
    """
    raw = text.encode()
    spelled = [spelling[one] or b"" for one in ids]
    whole = b"".join(spelled)
    added = int(whole == b" " + raw)
    if whole[added:] == raw:
        return np.maximum(np.cumsum([len(one) for one in spelled], dtype=np.int64) - added, 0)
    at = np.cumsum([0, *(len(one.encode()) for one in text)], dtype=np.int64)
    found = np.zeros(len(ids), np.int64)
    for place, (begin, end) in enumerate(characters):
        shared = place + 1 < len(characters) and characters[place + 1][0] < end
        found[place] = at[begin if shared else end]
    return np.maximum.accumulate(found)

"""A forced text as tokens: what the grammar leaves no choice about needs no sampling.

The text is cut as the model's tokenizer cuts it, less the end that depends on what follows: after `"name": "` the model
may want `"` or `"J` as its next token, so tokens are kept only as far as no continuation changes them. The rest of the
forced text is sampled under the mask, which allows nothing else. Tokens that were produced are never cut anew: a client
may have seen them, and the model chose them.
"""

from __future__ import annotations

from collections import OrderedDict

from mainsail_engine.structured.vocabulary import Vocabulary

CONTINUATIONS = ("a", "A", "1", " ", "\n", '"', "'", ",", ":", ".", "}", "]", "{", "[", "<", ">", "-", "_", "/", "é")
"""What may follow: one of each kind that tokenizers treat differently."""
MAX_CHARS = 2000
REMEMBERED = 4096


class JumpForward:
    """Remembers the texts it has cut: a schema forces the same few, in every request."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._known: OrderedDict[str, tuple[list[int], int]] = OrderedDict()

    def tokens(self, text: str) -> tuple[list[int], int]:
        """(the text's tokens, how many of them stay the same whatever follows). Nothing where it cannot be cut."""
        text = text[:MAX_CHARS]
        known = self._known.get(text)
        if known is None:
            known = self._known[text] = self._cut(text)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(text)
        return known

    def _cut(self, text: str) -> tuple[list[int], int]:
        encode, spelled = self._vocabulary.encode, self._vocabulary.tokens
        if encode is None or not text:
            return [], 0
        whole = encode(text)
        if b"".join(spelled[token] for token in whole if token < len(spelled)) != text.encode():
            return [], 0
        return whole, min(_common(whole, encode(text + more)) for more in CONTINUATIONS)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count

"""Guesses from a request's own text (prompt lookup): what followed when its last tokens stood there before.

    tokens      … f ( x , y ) : …………… f ( x ,            last n-gram: ( x ,      stood before, at the first line
                        ▲ ▲ ▲                            guesses:     y ) :      read on from there

Every n-gram's latest end is kept in a table, one look-up a token. And every token that comes is compared with what
would have been guessed, whether or not it was: so how often guesses are right is known without computing any for it,
and a text that does not repeat itself costs a few microseconds of the host a token and nothing of the device. While
guesses are right the place to read on from is known without the table, which then waits until a guess is wrong or the
device is busy (`settle`).

The idea is prompt lookup decoding (Saxena, 2023), as in vLLM's method "ngram".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mainsail_engine.request import Request
from mainsail_engine.speculative.policy import HitRates

MAX_INDEXED = 16_384
"""Of a long prompt, the last tokens: the table takes a few milliseconds to fill when the answer begins."""
PRIOR = (0.25, 0.6, 0.9)
"""Chances of a guess after few, some and many right ones, before any was compared."""
OVERALL_WEIGHT, OVERALL_FADE = 20.0, 0.998
"""The rates of all requests, which a new one begins with, move slowly."""
_BITS = 21
"""Of a token id in an n-gram's key: vocabularies up to two million."""


class NgramIndex:
    """One text: where its n-grams ended last, and the place that its newest tokens are being compared with."""

    def __init__(self, tokens: list[int], min_n: int, max_n: int) -> None:
        """The longest n-gram of min_n .. max_n tokens that stood before decides."""
        self._masks = [(1 << _BITS * n) - 1 for n in range(max_n, min_n - 1, -1)]
        self._ends: list[dict[int, int]] = [{} for _ in self._masks]
        self._tokens: list[int] = []
        self._num_indexed = 0
        """Of the tokens, those whose n-grams are in the table."""
        self._window = 0
        self._at = -1
        """Where the guess for the next token stands; -1: there is none."""
        self.run = 0
        """How many guesses in a row were right."""
        self._begin(tokens[:-1])
        for token in tokens[-1:]:
            self.extend(token)

    def _begin(self, tokens: list[int]) -> None:
        """The same as extending by each, in few steps over all of them."""
        self._tokens = list(tokens)
        every = np.array(tokens, object if self._masks[0] >> 63 else np.int64)
        for mask, ends in zip(self._masks, self._ends, strict=True):
            n = mask.bit_length() // _BITS
            if len(tokens) >= n:
                keys = every[: len(tokens) - n + 1]
                for place in range(1, n):
                    keys = keys << _BITS | every[place : len(tokens) - n + 1 + place]
                ends.update(zip(keys.tolist(), range(n, len(tokens) + 1), strict=True))
        for token in tokens[-(self._masks[0].bit_length() // _BITS) :]:
            self._window = (self._window << _BITS | token) & self._masks[0]
        self._num_indexed = len(tokens)

    def extend(self, token: int) -> bool | None:
        """The next token. Returns whether the guess was right; None: there was none."""
        tokens, at = self._tokens, self._at
        if at >= 0 and tokens[at] == token:
            self.run += 1
            self._at = at + 1
            tokens.append(token)
            return True
        self.run = 0
        tokens.append(token)
        self._at = self.catch_up()
        return None if at < 0 else False

    def catch_up(self) -> int:
        """Bring the table up to the newest token. Returns where the last n-gram stood before, -1: nowhere."""
        place = -1
        for length, token in enumerate(self._tokens[self._num_indexed :], self._num_indexed + 1):
            window = self._window = (self._window << _BITS | token) & self._masks[0]
            place = -1
            for mask, ends in zip(self._masks, self._ends, strict=True):
                key = window & mask
                if place < 0:
                    place = ends.get(key, -1)
                if length >= mask.bit_length() // _BITS:
                    ends[key] = length
        self._num_indexed = len(self._tokens)
        return place

    @property
    def has_guess(self) -> bool:
        return self._at >= 0

    def guesses(self, count: int) -> list[int]:
        """The next tokens, read on from where they stood before; where that is the end, from the guesses themselves."""
        if self._at < 0:
            return []
        tokens, at = self._tokens, self._at
        guesses, length = tokens[at : at + count], len(tokens)
        if len(guesses) == count:
            return guesses
        guesses.clear()
        for position in range(at, at + count):
            guesses.append(tokens[position] if position < length else guesses[position - length])
        return guesses


class NgramSource:
    """See speculator.Source."""

    level_s = last_s = 0.0

    def __init__(self, min_n: int, max_n: int) -> None:
        self._min_n, self._max_n = min_n, max_n
        self._texts: dict[str, tuple[NgramIndex, HitRates]] = {}
        self._overall = HitRates(PRIOR, weight=OVERALL_WEIGHT, fade=OVERALL_FADE)
        self._unsettled: list[tuple[NgramIndex, HitRates, list[tuple[int, bool]]]] = []
        """What was seen since `settle`: runs of right guesses, and whether the one after them was right."""

    def saw(self, request: Request, tokens: Sequence[int]) -> None:
        known = self._texts.get(request.request_id)
        if known is None:
            if request.num_tokens + 1 >= request.max_num_tokens:
                return
            text = request.token_ids(max(0, request.num_tokens - MAX_INDEXED), request.num_tokens)
            index = NgramIndex(text, self._min_n, self._max_n)
            self._texts[request.request_id] = index, HitRates(self._overall.means())
            return
        index, rates = known
        compared = list[tuple[int, bool]]()
        for token in tokens:
            run = index.run
            hit = index.extend(token)
            if hit is not None:
                compared.append((run, hit))
        if compared:
            self._unsettled.append((index, rates, compared))

    def settle(self) -> None:
        for index, rates, compared in self._unsettled:
            index.catch_up()
            for run, hit in compared:
                rates.note(run, hit)
                self._overall.note(run, hit)
        self._unsettled.clear()

    def has_guesses(self, request: Request, count: int) -> bool:
        known = self._texts.get(request.request_id)
        return known is not None and known[0].has_guess

    def chances(self, request: Request, most: int) -> list[float]:
        known = self._texts.get(request.request_id)
        if known is None or not known[0].has_guess:
            return []
        index, rates = known
        return rates.chances(index.run, most)

    def guess(self, wanted: list[tuple[Request, int]]) -> list[list[int]]:
        return [self._texts[request.request_id][0].guesses(count) for request, count in wanted]

    def verified(self, request: Request, num_guesses: int, num_right: int) -> None:
        """Nothing new: `saw` compares every token."""

    def forget(self, request: Request) -> None:
        self._texts.pop(request.request_id, None)

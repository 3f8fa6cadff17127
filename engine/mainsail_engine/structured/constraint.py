"""One request's place in its grammar. Exactly the request's output tokens have been accepted, at any time.

A preempted request keeps its place; n answers to one prompt have one each. It ends by accepting a stop token, which
the grammar allows once the text is complete (and only that, once nothing can follow).

A matcher that raises has lost its place: from then on it accepts nothing, which ends its request and no other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from mainsail_engine.structured import bindings
from mainsail_engine.structured.jump_forward import JumpForward
from mainsail_engine.structured.vocabulary import Vocabulary

log = logging.getLogger(__name__)


class Constraint:
    def __init__(
        self, compiled: bindings.CompiledGrammar, vocabulary: Vocabulary, jump_forward: JumpForward | None
    ) -> None:
        """jump_forward None: every token is sampled, also where there is only one."""
        self.matcher = bindings.matcher(compiled)
        self.stop_token_ids = vocabulary.stop_token_ids
        self._vocab_size = len(vocabulary.tokens)
        self._jump_forward = jump_forward
        self.ended = False
        """A stop token was accepted."""
        self.slow_fills = 0
        """How often this grammar's mask took too long (masks.py)."""
        self._lost = False

    def accept(self, token: int) -> bool:
        """Move on by this token. False: the grammar does not allow it, and the request cannot go on."""
        if self.ended or self._lost:
            return False
        try:
            if not self.matcher.accept_token(token, False):
                return False
            self.ended = token in self.stop_token_ids and bool(self.matcher.is_terminated())
        except Exception:
            self._lose()
            return False
        return True

    def _lose(self) -> None:
        log.exception("a grammar's matcher failed: its request cannot go on")
        self._lost = True

    def conforming(self, tokens: Sequence[int]) -> list[int]:
        """Those at the beginning that the grammar allows in turn, short of a stop token. None of them is accepted."""
        if self.ended or self._lost:
            return []
        try:
            taken = self._take(list(takewhile(lambda token: token not in self.stop_token_ids, tokens)))
            if taken:
                self.matcher.rollback(len(taken))
        except Exception:
            self._lose()
            return []
        return taken

    def forced(self, most: int, *, least: int = 1, may_end: bool = True) -> list[int]:
        """The tokens that must come next; they are accepted. Empty where the model has a choice.

        Not more than `most`; fewer than `least` are none, unless the last one ends the text. may_end: the stop token
        may be among them, where nothing else can follow.
        """
        if self._jump_forward is None or self.ended or self._lost or most < 1:
            return []
        try:
            return self._forced(self._jump_forward, most, least, may_end=may_end)
        except Exception:
            self._lose()
            return []

    def _forced(self, jump_forward: JumpForward, most: int, least: int, *, may_end: bool) -> list[int]:
        whole, stable = jump_forward.tokens(self._forced_text())
        taken = self._take(whole[:most])
        if may_end and len(taken) == len(whole) and len(taken) < most and (stop := self._only_stop()) is not None:
            self.accept(stop)
            return [*taken, stop]
        kept = min(stable, len(taken))
        if kept < least:
            kept = 0
        if len(taken) > kept:
            self.matcher.rollback(len(taken) - kept)
        return taken[:kept]

    def _forced_text(self) -> str:
        try:
            return str(self.matcher.find_jump_forward_string())
        except UnicodeDecodeError:
            return ""  # in the middle of a character

    def _take(self, tokens: list[int]) -> list[int]:
        for count, token in enumerate(tokens):
            if not self.matcher.accept_token(token, False):
                return tokens[:count]
        return tokens

    def _only_stop(self) -> int | None:
        """The stop token, where the text is complete and nothing else may follow."""
        if not self.matcher.is_completed():
            return None
        mask = np.zeros((1, bindings.mask_words(self._vocab_size)), np.int32)
        self.matcher.fill_next_token_bitmask(mask, 0, False)
        if np.count_nonzero(mask[0, :-1]) > len(self.stop_token_ids):
            return None
        allowed = bindings.allowed_tokens(mask[0], self._vocab_size).tolist()
        return allowed[0] if allowed and set(allowed) <= set(self.stop_token_ids) else None

"""What a request's parameters add to single logits: bias, allowed tokens, bad words, no end before min_tokens.

Each is a sparse list of places in a step's logits, row * vocab + token, each at most once where floats are added: one
small launch then adds them, without a sort. The lists are put together on the CPU and kept on the device for as long as
the same requests are in the batch, which is most steps. A bad word of several tokens forbids its last one where the
others were just written: every slot's last tokens are kept on the device for that, so that a token that the CPU does
not know yet counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mainsail_engine.request import Request, SamplingParams

MAX_BAD_WORD_TOKENS = 32
_HISTORY = MAX_BAD_WORD_TOKENS - 1
_ANY, _NOTHING = -1, -2
"""In a bad word's beginning: matches everything. In a slot's history: no token yet."""


@dataclass(slots=True)
class _StepEdits:
    """The edits of one composition of the batch, on the device."""

    added: torch.Tensor | None
    """Places, each once."""
    added_values: torch.Tensor | None
    allowed: torch.Tensor | None
    allowed_rows: torch.Tensor | None
    bad: torch.Tensor | None
    """The place of each bad word's last token."""
    bad_rows: list[int]
    bad_slots: torch.Tensor | None
    bad_beginnings: torch.Tensor | None
    """[num_words, _HISTORY] int64, aligned at the end, _ANY before the word."""
    history_rows: np.ndarray
    """Rows whose tokens must be remembered."""


def end_tokens(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end this answer: what min_tokens forbids. With ignore_eos the model's own do not."""
    own = frozenset[int]() if params.ignore_eos else eos_token_ids
    return own.union(params.stop_token_ids)


class LogitEdits:
    def __init__(self, num_slots: int, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._eos = eos_token_ids
        self._tenants: list[Request | None] = [None] * num_slots
        self._min_until = np.zeros(num_slots, np.int64)
        """The position from which on the slot's answer may end."""
        self._history: torch.Tensor | None = None
        self._tenancy = 0
        self._known: tuple[bytes, _StepEdits] | None = None

    def move_in(self, slot: int, request: Request | None) -> None:
        """None: the slot's request edits nothing."""
        if request is None and self._tenants[slot] is None:
            return
        self._tenants[slot] = request
        self._tenancy += 1
        min_tokens = 0 if request is None or request.constraint is not None else request.params.min_tokens
        # Under a grammar the masks see to it (structured/masks.py): a text that is complete must end.
        self._min_until[slot] = 0 if request is None else len(request.prompt_token_ids) + min_tokens
        if request is not None and any(len(word) > 1 for word in request.params.bad_words):
            self._remember(slot, request.output_token_ids[-_HISTORY:])

    def _remember(self, slot: int, tokens: list[int]) -> None:
        if self._history is None:
            self._history = torch.full((len(self._tenants), _HISTORY), _NOTHING, device=self._device)
        row = np.full(_HISTORY, _NOTHING, np.int64)
        if tokens:
            row[-len(tokens) :] = tokens
        self._history[slot] = self._up(row)

    def catch_up(self, slot: int, request: Request) -> None:
        """Tokens were generated without having been noted."""
        if self._history is not None and any(len(word) > 1 for word in request.params.bad_words):
            self._remember(slot, request.output_token_ids[-_HISTORY:])

    def apply(
        self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray, guessed: Mapping[int, Sequence[int]]
    ) -> None:
        """Edit logits [n, vocab] (float32, contiguous) in place; positions [n] are those of the tokens to be sampled.

        guessed: see Sampler.sample.
        """
        edits, flat = self._edits_of(slots, positions), logits.view(-1)
        if edits.allowed is not None and edits.allowed_rows is not None:
            kept = flat[edits.allowed]
            logits[edits.allowed_rows] = -math.inf
            flat[edits.allowed] = kept
        if edits.added is not None and edits.added_values is not None:
            flat.index_add_(0, edits.added, edits.added_values)
        if edits.bad is not None and self._history is not None and edits.bad_beginnings is not None:
            beginnings = edits.bad_beginnings
            history = self._history[edits.bad_slots]
            if guessed:
                history = self._with_guesses(history, edits.bad_rows, guessed)
            written = ((history == beginnings) | (beginnings == _ANY)).all(dim=1)
            forbidden = torch.where(written, -math.inf, 0.0)
            flat.index_add_(0, edits.bad, forbidden)  # 0 or -inf: in any order the same sum

    def _with_guesses(
        self, history: torch.Tensor, rows: list[int], guessed: Mapping[int, Sequence[int]]
    ) -> torch.Tensor:
        """history [n, _HISTORY], each moved on by the guesses that come before its row."""
        counts = self._up(np.array([len(guessed.get(row, ())) for row in rows], np.int64))
        longest = max(map(len, guessed.values()))
        following = np.full((len(rows), longest), _NOTHING, np.int64)
        for place, row in enumerate(rows):
            tokens = guessed.get(row, ())
            following[place, : len(tokens)] = tokens
        whole = torch.cat((history, self._up(following)), dim=1)
        columns = torch.arange(_HISTORY, device=self._device) + counts[:, None]
        return whole.gather(1, columns)

    def note(self, slots: np.ndarray, tokens: torch.Tensor) -> None:
        """These tokens [n] were drawn for the slots of the last `apply`."""
        if self._history is None or self._known is None or not len(self._known[1].history_rows):
            return
        rows = self._known[1].history_rows
        held, newest = self._up(slots[rows]), tokens[self._up(rows)]
        self._history[held] = torch.cat((self._history[held][:, 1:], newest[:, None]), dim=1)

    def _edits_of(self, slots: np.ndarray, positions: np.ndarray) -> _StepEdits:
        early = positions < self._min_until[slots]
        key = self._tenancy.to_bytes(8, "little") + slots.tobytes() + early.tobytes()
        if self._known is None or self._known[0] != key:
            self._known = key, self._build(slots, early)
        return self._known[1]

    def _build(self, slots: np.ndarray, early: np.ndarray) -> _StepEdits:
        added: defaultdict[tuple[int, int], float] = defaultdict(float)
        allowed: list[tuple[int, int]] = []
        bad: list[tuple[int, int, int, list[int]]] = []
        history: set[int] = set()
        for row, slot in enumerate(map(int, slots)):
            request = self._tenants[slot]
            if request is None:
                continue
            params = request.params
            for token, value in params.logit_bias:
                added[row, token] += value
            for token in sorted(end_tokens(params, self._eos)) if early[row] else ():
                added[row, token] = -math.inf
            allowed.extend((row, token) for token in params.allowed_token_ids)
            for word in params.bad_words:
                beginning, last = list(word[:-1]), word[-1]
                if beginning:
                    history.add(row)
                    bad.append((row, last, slot, beginning))
                else:
                    added[row, last] = -math.inf
        return self._on_device(added, allowed, bad, np.array(sorted(history), np.int64))

    def _on_device(
        self,
        added: Mapping[tuple[int, int], float],
        allowed: list[tuple[int, int]],
        bad: list[tuple[int, int, int, list[int]]],
        history_rows: np.ndarray,
    ) -> _StepEdits:
        beginnings = np.full((len(bad), _HISTORY), _ANY, np.int64)
        for index, (_, _, _, beginning) in enumerate(bad):
            beginnings[index, -len(beginning) :] = beginning
        allowed_rows = np.unique(np.array([row for row, _ in allowed], np.int64))
        return _StepEdits(
            added=self._places(list(added)),
            added_values=self._up(np.array(list(added.values()), np.float32)) if added else None,
            allowed=self._places(allowed),
            allowed_rows=self._up(allowed_rows) if allowed else None,
            bad=self._places([(row, last) for row, last, _, _ in bad]),
            bad_rows=[row for row, _, _, _ in bad],
            bad_slots=self._up(np.array([slot for _, _, slot, _ in bad], np.int64)) if bad else None,
            bad_beginnings=self._up(beginnings) if bad else None,
            history_rows=history_rows,
        )

    def _places(self, pairs: list[tuple[int, int]]) -> torch.Tensor | None:
        """Of (row, token) pairs."""
        return self._up(np.array([row * self._vocab_size + token for row, token in pairs], np.int64)) if pairs else None

    def _up(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)  # pyright: ignore[reportUnknownMemberType]

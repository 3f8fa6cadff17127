"""A request's sampling fields as the core's SamplingParams: what must be looked up or compared is checked here.

Bounds of single fields are the schema's business; here it is the vocabulary that decides: token ids must be in it, bad
words are spelled as tokens, and something must be left to pick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from mainsail_engine.errors import RequestError
from mainsail_engine.request import SamplingParams
from mainsail_engine.server.schemas import GenerationRequest

MAX_ID_DIGITS = 20
MAX_BAD_WORD_TOKENS = 32
"""As many as the sampler remembers (sampling/edits.py, which the API process must not import: it needs torch)."""


def sampling_params(
    body: GenerationRequest,
    max_tokens: int,
    *,
    vocab_size: int,
    eos_token_ids: Iterable[int],
    encode: Callable[[str], list[int]],
    logprobs: int | None,
) -> Callable[[int, int | None], SamplingParams]:
    """A function of (answer, prompt_logprobs): the n answers differ in their seed. Raises RequestError."""
    shared = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        allowed_token_ids=_known(sorted(set(body.allowed_token_ids or ())), vocab_size, "allowed_token_ids"),
        bad_words=_bad_words(body.bad_words or [], encode),
        logprobs=logprobs,
    )
    _known(shared.stop_token_ids, vocab_size, "stop_token_ids")
    _check_something_is_left(shared, set(eos_token_ids))

    def of_answer(answer: int, prompt_logprobs: int | None) -> SamplingParams:
        seed = None if body.seed is None else (body.seed + answer + 2**63) % 2**64 - 2**63
        return msgspec.structs.replace(shared, seed=seed, prompt_logprobs=prompt_logprobs)

    return of_answer


def _known(token_ids: Iterable[int], vocab_size: int, param: str) -> tuple[int, ...]:
    ids = tuple(token_ids)
    if ids and max(ids) >= vocab_size:
        raise RequestError(f"token id {max(ids)} is not in the vocabulary ({vocab_size} ids)", param=param)
    return ids


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    values: dict[int, float] = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) <= MAX_ID_DIGITS) or int(name) >= vocab_size:
            message = f"{name[:MAX_ID_DIGITS]!r} is not a token id of this model ({vocab_size} ids)"
            raise RequestError(message, param="logit_bias")
        values[int(name)] = value
    return tuple(sorted(values.items()))


def _bad_words(words: list[str], encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled at the start of a text, and after a space."""
    spelled: set[tuple[int, ...]] = set()
    for index, word in enumerate(words):
        for text in (word, " " + word.lstrip()):
            ids = tuple(encode(text))
            if len(ids) > MAX_BAD_WORD_TOKENS:
                message = f"{word!r} has {len(ids)} tokens; at most {MAX_BAD_WORD_TOKENS} are supported"
                raise RequestError(message, param=f"bad_words.{index}")
            if ids:
                spelled.add(ids)
    return tuple(sorted(spelled))


def _check_something_is_left(params: SamplingParams, eos: set[int]) -> None:
    """Allowed tokens that other fields all forbid can never be sampled from."""
    if not params.allowed_token_ids:
        return
    forbidden = {word[0] for word in params.bad_words if len(word) == 1}
    if params.min_tokens:
        forbidden |= eos | set(params.stop_token_ids)
    if forbidden.issuperset(params.allowed_token_ids):
        message = "bad_words or min_tokens forbid every one of the allowed tokens"
        raise RequestError(message, param="allowed_token_ids")

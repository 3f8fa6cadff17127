"""spec.admission: what the gateway does with more requests than the service can serve."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mainsail_operator.types.schema import Model, rule, rules

_SHORT = "'^([0-9]+m)?([0-9]+s)?([0-9]+ms)?$'"

QueueTime = Annotated[
    str,
    Field(
        max_length=16,
        json_schema_extra=rules(
            rule(f"self.matches({_SHORT}) && self != ''", "write it as 500ms, 30s or 2m"),
            rule(f"!self.matches({_SHORT}) || self == '' || duration(self) <= duration('1h')", "at most 1h"),
        ),
    ),
]
Priority = Annotated[int, Field(ge=-1000, le=1000)]


class AdmissionSpec(Model):
    """How many requests may run and wait, and who goes first. Each gateway keeps a queue of its own."""

    max_queued_requests: int = Field(
        default=512,
        ge=0,
        le=1_000_000,
        description="Requests that wait for their turn in each gateway at most. Over it 429 with a Retry-After. It "
        "bounds the gateway's memory; maxQueueTime usually refuses earlier.",
    )
    max_queue_time: QueueTime = Field(
        default="30s",
        description="Longest wait for a turn, as 500ms, 30s or 2m. A request that would wait longer, by the rate at "
        "which others finish, is refused at once with 429 and a Retry-After, instead of waiting in vain.",
    )
    max_concurrency: int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="Requests that run in one replica at most. The gateway lowers it by itself while latency says that "
        "the replica has too much. Default: engine.maxNumSeqs.",
    )
    priorities: dict[str, Priority] = Field(
        default_factory=lambda: {"high": 100, "normal": 0, "batch": -100},
        max_length=16,
        description="Classes that a request may name in the header X-Mainsail-Priority, or its API key sets; the "
        "highest goes first, the lowest waits and is refused first. Without a class: normal.",
        json_schema_extra=rules(
            rule("self.all(name, name.size() <= 32)", "the name of a priority has at most 32 characters")
        ),
    )

"""`/debug/routes`: what the gateway knows, and whom it would ask now, and why. On the health port only.

    /debug/routes                                       every name and service
    /debug/routes?model=m&session=s&prompt=…            one, and the pick for such a request

The pick is the real one, made on copies: asking changes nothing.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from mainsail_gateway import balance
from mainsail_gateway.errors import unknown_model
from mainsail_gateway.fleet import Pool
from mainsail_gateway.request import BYTES_PER_TOKEN
from mainsail_gateway.routes import Service
from mainsail_gateway.split import Sticky, eligible, placed, position
from mainsail_gateway.virtual import Virtual

if TYPE_CHECKING:
    from mainsail_gateway.app import Gateway


def routes(gateway: Gateway, query: str, now: float) -> dict[str, Any]:
    """The answer to a query string. Raises a 404."""
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    table = gateway.table
    if "model" not in asked:
        virtual = {name: route(found) for name, found in sorted(table.virtual.items())}
        services = {"/".join(key): service(gateway, found, now) for key, found in sorted(table.services.items())}
        conflicts = [{"name": name, "holder": holder, "left_out": other} for name, holder, other in table.conflicts]
        return {"models": sorted({*table.models, *table.virtual}), "conflicts": conflicts, "routes": virtual,
                "services": services}  # fmt: skip
    model = asked["model"]
    if model in table.virtual:
        return {"model": model, "route": route(table.virtual[model])}
    found = table.models.get(model)
    if found is None:
        raise unknown_model(model)
    session, prompt = asked.get("session"), asked.get("prompt", "").encode()
    return {"model": model, **service(gateway, found, now), "pick": pick(gateway, found, session, prompt, now)}


def route(found: Virtual) -> dict[str, Any]:
    return {
        "object": "/".join(found.key),
        "rules": [
            {
                "when": {field: str(value) for field in rule.when.__struct_fields__
                         if (value := getattr(rule.when, field)) is not None},
                "to": [{"target": target.name, "weight": target.weight} for target in rule.to],
                "fallback": [target.name for target in rule.fallback],
                "fallbackOn": rule.fallbackOn,
            }
            for rule in found.rules
        ],
    }  # fmt: skip


def service(gateway: Gateway, found: Service, now: float) -> dict[str, Any]:
    """One service: its door and its endpoints."""
    pool, door = gateway.fleet.pools[found.key], gateway.admission.doors[found.key]
    shedder = door.shedder
    return {
        "service": "/".join(found.key),
        "names": found.served_names,
        "weights": dict(found.weights),
        "admission": {
            "running": shedder.running,
            "waiting": shedder.waiting,
            "limit": round(shedder.limit, 1),
            "limit_per_replica": round(shedder.gradient.limit, 1),
            "room_by_the_engines": round(shedder.room_limit, 1),
            "served_per_second": shedder.drain.per_second(shedder.limit, now),
            "refused": dict(door.refusals),
        },
        "retry_budget": round(pool.budget.balance, 1),
        "sessions": {
            "held": len(pool.sessions.held),
            "parked": pool.sessions.num_parked,
            "kv_tokens": pool.sessions.kv_tokens(),
        },
        "endpoints": [_endpoint(pool, key, now) for key in sorted(pool.loads)],
    }


def _endpoint(pool: Pool, key: str, now: float) -> dict[str, Any]:
    endpoint, load = pool.endpoints[key], pool.loads[key]
    return {
        "pod": endpoint.pod,
        "revision": endpoint.revision,
        "address": f"{endpoint.host}:{endpoint.port}",
        "requests": load.requests,
        "prefill": load.prefill,
        "burden": balance.burden(load, now),
        "full": load.full,
        "kv_tokens": load.kv_tokens,
        "live_kv_tokens": pool.sessions.live(load, now),
        "known_blocks": pool.kv.num_blocks(key) if key in pool.kv.known else None,
        "share": round(balance.share(load, now), 2),
        "failures": load.failures,
        "ejected_for_s": round(max(0.0, load.ejected_until - now), 1),
    }


def pick(gateway: Gateway, found: Service, session: str | None, prompt: bytes, now: float) -> dict[str, Any]:
    """Whom a request of this session and prompt would go to, and what speaks for it."""
    pool = gateway.fleet.pools[found.key]
    probe = copy.copy(pool)
    probe.split = copy.deepcopy(pool.split)
    probe.loads = {key: copy.copy(load) for key, load in pool.loads.items()}
    prefixes = balance.prefix_keys(prompt, session)
    tokens = len(prompt) // BYTES_PER_TOKEN
    chosen = probe.pick(tokens, prefixes, set(), now, Sticky(session) if session else None)
    if chosen is None:
        return {"pod": None, "because": ["no endpoint is ready"]}
    endpoint, load, remaining = chosen
    because = [_revision(pool, endpoint.revision, session, now)] if pool.weights else []
    known = pool.kv.cached(prefixes)
    saved = {**pool.index.saved(prefixes), **known}
    if known.get(endpoint.key):
        because.append(f"its engine says that it has {known[endpoint.key]} tokens of this request cached")
    elif endpoint.key in saved:
        because.append(f"it served a beginning of this request: {saved[endpoint.key]} tokens are likely cached")
    elif saved:
        because.append("who served a beginning of it has more to do than that saves, or is of another revision")
    elif prefixes:
        because.append("its beginning is new: by its hash and the load")
    else:
        because.append("it has the least load for its share")
    if len(balance.usable(list(pool.loads.values()), now)) < len(pool.loads):
        because.append("others are ejected after failures")
    return {"pod": endpoint.pod, "revision": endpoint.revision, "burden": balance.burden(load, now),
            "remaining": remaining, "because": because}  # fmt: skip


def _revision(pool: Pool, name: str, session: str | None, now: float) -> str:
    serving: dict[str, bool] = {}
    for key, load in pool.loads.items():
        revision = pool.endpoints[key].revision
        serving[revision] = serving.get(revision, False) or load.ejected_until <= now
    weighted = eligible(pool.weights, serving)
    if not weighted:
        return "no revision with a weight serves: all endpoints are alike"
    if session and placed(weighted, position(session)) == name:
        return f"the session's place {position(session):.3f} belongs to revision {name}"
    return f"it is the turn of revision {name}, of weights {dict(weighted)}"

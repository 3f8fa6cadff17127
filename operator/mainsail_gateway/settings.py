"""The gateway's settings: the command line, read once into one frozen value. Times are in seconds, sizes in bytes."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, slots=True)
class Settings:
    host: str = "0.0.0.0"
    port: int = 8080
    workers: int = 1
    """Processes that serve `port` together (crew.py): as many as the pod has cores to itself."""
    health_port: int = 8081
    """Health and metrics have a listener and a thread of their own: load on `port` never fails a probe."""
    kubeconfig: str | None = None
    """Path of a kubeconfig; without it the Pod's service account, then $KUBECONFIG, then ~/.kube/config."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to serve; empty: all."""

    auth: Literal["anonymous", "keys"] = "anonymous"
    """anonymous: whoever reaches the gateway may use every model. keys: only who has an API key (auth.py)."""
    keys_namespace: str | None = None
    """Where the Secrets of the API keys are; without it the Pod's own namespace."""
    external_namespaces: tuple[str, ...] = ()
    """Namespaces whose ModelRoutes may name endpoints outside of the cluster (external.py)."""
    tls_cert: str | None = None
    tls_key: str | None = None
    """PEM files, as a Secret's volume has them; read again when they change. Without them: plain HTTP."""

    host_suffixes: tuple[str, ...] = ()
    """A request for the host `NAME.NAMESPACE.SUFFIX` sees only that InferenceService."""
    epp_port: int = 0
    """Port of the endpoint picker for gateways built on Envoy (epp.py); 0: none."""
    access_log: bool = False
    """A line of JSON on stderr for each request: names, times and status; never content."""
    otlp_endpoint: str | None = None
    """Where spans are sent (OTLP over HTTP), as http://collector:4318/v1/traces; without it, none are made."""
    trace_ratio: float = 0.05
    """The part of the traces beginning here that is kept. A client's own decision is followed."""

    max_body_bytes: int = 10 * 1024 * 1024
    """Over it: 413. The body is held in memory until an endpoint has answered, so that it can be sent again."""
    max_header_bytes: int = 64 * 1024
    head_timeout_s: float = 60.0
    """A connection that has not sent a whole request head within this time is closed (slow loris)."""
    body_timeout_s: float = 60.0
    """The whole body must arrive within this time: 408."""
    keep_alive_s: float = 75.0
    """How long an idle client connection is kept."""

    connect_timeout_s: float = 2.0
    """An endpoint that does not take the connection by then is skipped for another."""
    response_timeout_s: float = 600.0
    """Until the first byte of an endpoint's answer (a whole completion, when not streamed): 504."""
    idle_timeout_s: float = 120.0
    """Between two chunks of an answer; a stalled stream is ended with an error."""
    client_timeout_s: float = 120.0
    """A client that takes no bytes for this long is dropped."""
    upstream_idle_s: float = 4.0
    """How long an idle connection to an endpoint is kept: below the 5 s of a uvicorn that is not told otherwise."""
    retry_after_s: float = 5.0
    """Retry-After when no replica serves and nothing better is known."""

    scrape_s: float = 2.0
    """How often the engines' metrics are read for the balancer; 0: never."""
    kv_events: bool = True
    """Engines are listened to, which tell what KV blocks they store and remove (kv_events.py)."""
    relist_s: float = 300.0
    """Everything is listed again this often, whatever the watches say."""
    drain_delay_s: float = 5.0
    """After SIGTERM, how long requests are still accepted while load balancers learn of the failed readiness."""
    drain_timeout_s: float = 120.0
    """After it, how long running answers may take to finish."""
    log_level: str = "info"


_HELP = {
    "host": "address to listen on",
    "port": "port of the OpenAI API",
    "workers": "processes that serve it together",
    "health_port": "port of /health/live, /health/ready, /metrics and /debug/routes",
    "kubeconfig": "path of a kubeconfig; default: the Pod's service account, then $KUBECONFIG, then ~/.kube/config",
    "auth": "anonymous (everybody) or keys (who has an API key: a Secret labelled mainsail.dev/api-key)",
    "keys_namespace": "namespace of the API keys' Secrets; default: the Pod's own",
    "tls_cert": "PEM file of the certificate chain; with --tls-key, HTTPS is served on --port; default: HTTP",
    "tls_key": "PEM file of its private key; default: HTTP",
    "epp_port": "port of the endpoint picker for gateways built on Envoy (gRPC); 0: none",
    "access_log": "log a line for each request: names, times and status, never content",
    "otlp_endpoint": "where spans are sent (OTLP over HTTP), as http://collector:4318/v1/traces; default: nowhere",
    "trace_ratio": "share of the traces beginning here that is kept, 0 to 1",
    "max_body_bytes": "largest request body, bytes; over it 413",
    "max_header_bytes": "largest request head, bytes; over it 431",
    "head_timeout_s": "seconds in which a client must have sent a request's head; else its connection is closed",
    "body_timeout_s": "seconds in which a client must have sent a request's body; else 408",
    "keep_alive_s": "seconds that an idle connection of a client is kept",
    "connect_timeout_s": "seconds in which an engine must take a connection; else another one is asked",
    "response_timeout_s": "seconds to the first byte of an engine's answer (not streamed: to all of it); else 504",
    "idle_timeout_s": "seconds between two pieces of an answer; then the stream goes on at another engine, or ends",
    "client_timeout_s": "seconds that a client may take no bytes; then it is dropped",
    "upstream_idle_s": "seconds that an idle connection to an engine is kept; less than the engine keeps it",
    "retry_after_s": "seconds of Retry-After where no replica serves and nothing better is known",
    "scrape_s": "seconds between two readings of the engines' metrics, for the balancer; 0: never",
    "kv_events": "listen to what engines store and remove in their KV caches, and balance by it",
    "relist_s": "seconds after which everything is listed from the API server again, whatever the watches say",
    "drain_delay_s": "seconds after SIGTERM in which requests are still accepted, while load balancers learn of it",
    "drain_timeout_s": "seconds that running answers have to finish after that",
    "log_level": "debug, info, warning or error",
}


_LISTS = {
    "namespaces": ("--namespace", "namespace to serve; default: all"),
    "host_suffixes": (
        "--host-suffix",
        "requests for NAME.NAMESPACE.SUFFIX see that InferenceService alone; default: none",
    ),
    "external_namespaces": (
        "--external-namespace",
        "namespace whose ModelRoutes may name endpoints outside the cluster; default: none",
    ),
}
_TYPES: dict[type, Callable[[str], str | int | float]] = {type(None): str, str: str, int: int, float: float}


def build_parser() -> argparse.ArgumentParser:
    """One flag for each setting."""
    parser = argparse.ArgumentParser(
        prog="mainsail-gateway", description="OpenAI-compatible endpoint for the InferenceServices of a cluster."
    )
    defaults = Settings()
    for field in fields(Settings):
        if field.name in _LISTS:
            flag, text = _LISTS[field.name]
            parser.add_argument(flag, dest=field.name, action="append", default=[], help=f"{text}; repeat for more")
            continue
        flag, text = "--" + field.name.replace("_", "-"), _HELP[field.name]
        default: object = getattr(defaults, field.name)
        if isinstance(default, bool):
            action, state = (argparse.BooleanOptionalAction, "on") if default else ("store_true", "off")
            parser.add_argument(flag, action=action, default=default, help=f"{text} (default: {state})")
            continue
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(flag, type=_TYPES[type(default)], default=default, help=shown)
    return parser


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Settings from a command line. A bad value ends the process with a message, as argparse does."""
    parser = build_parser()
    values = vars(parser.parse_args(argv))
    for name in _LISTS:
        values[name] = tuple(dict.fromkeys(values[name]))
    for name, value in values.items():
        if isinstance(value, int | float) and value < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if values["trace_ratio"] > 1:
        parser.error(f"--trace-ratio is a share from 0 to 1, got {values['trace_ratio']}")
    if values["workers"] < 1:
        parser.error(f"--workers must be at least 1, got {values['workers']}")
    if values["log_level"] not in ("debug", "info", "warning", "error"):
        parser.error(f"--log-level must be debug, info, warning or error, got {values['log_level']}")
    if values["auth"] not in ("anonymous", "keys"):
        parser.error(f"--auth must be anonymous or keys, got {values['auth']}")
    if bool(values["tls_cert"]) != bool(values["tls_key"]):
        parser.error("--tls-cert and --tls-key go together: give both or neither")
    return Settings(**values)

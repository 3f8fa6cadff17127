"""`mainsail-engine serve | run-batch | compile-kernels | bench`: flags to configuration, and errors to exit codes.

The flags' names are the field's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from mainsail_engine.compile_kernels import CARDS, card_named, compile_ahead, leave_mark, mark_of
from mainsail_engine.config import (
    DTYPES,
    KV_DTYPES,
    LOAD_FORMATS,
    MASTER_PORT,
    QUANTIZATIONS,
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    CacheConfig,
    EngineConfig,
    KVEventsConfig,
    LoraConfig,
    ModelConfig,
    NodesConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculativeConfig,
)
from mainsail_engine.core_process import start_core
from mainsail_engine.errors import (
    InvalidConfigurationError,
    ModelNotFoundError,
    StartupError,
    UnsupportedModelError,
    report_startup_error,
)
from mainsail_engine.version import version

Config = TypeVar("Config", KVEventsConfig, SpeculativeConfig)


@dataclass(frozen=True, slots=True)
class Profile:
    """What --profile sets where the flag itself is not given."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    speculative: SpeculativeConfig | None = None


PROFILES = {
    "": Profile(),
    "latency": Profile(64, 2048, SpeculativeConfig(method="ngram")),
    "throughput": Profile(512, 16384),
}
"""latency: a step that few share is a short one, and of a text that repeats itself it makes several tokens; throughput:
as many as the KV pool feeds share each reading of the weights, and prompts go in large pieces."""

VARIABLES = (
    "Environment: $MAINSAIL_API_KEY (what --api-key says), $MAINSAIL_CPU_KERNELS (0: PyTorch's operations on the CPU, "
    "not compiled ones), $MAINSAIL_KERNELS (a folder of kernels that compile-kernels has filled), "
    "$MAINSAIL_TERMINATION_LOG (a file for the reason of a failed start; default: /dev/termination-log), and in a pod "
    "of a LeaderWorkerSet the three that the flags about nodes name."
)


class _Parser(argparse.ArgumentParser):
    """A wrong flag is an invalid configuration like any other, and reported the same way. A shortened one is wrong too:
    what it stands for would change with every flag that is added."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InvalidConfigurationError(f"{message} (see {self.prog} --help)")


def _profiles() -> str:
    """What each profile sets, for --help."""
    return "; ".join(
        f"{name}: --max-num-seqs {it.max_num_seqs} --max-num-batched-tokens {it.max_num_batched_tokens}"
        + (" and n-gram guesses" if it.speculative else "")
        for name, it in PROFILES.items()
        if name
    )


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mainsail-engine", description="Serve a language model behind an OpenAI-compatible API.")
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP: OpenAI's API, /metrics, /health/*.",
        epilog=VARIABLES,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_model_flags(serve)
    _add_engine_flags(serve)
    _add_server_flags(serve)
    batch = commands.add_parser(
        "run-batch",
        help="answer a file of OpenAI requests",
        description="Answer every line of an OpenAI batch file with the model, without HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    batch.add_argument("-i", "--input-file", required=True, type=Path, help="JSON lines: custom_id, url, body")
    batch.add_argument("-o", "--output-file", required=True, type=Path, help="JSON lines, in the input's order")
    _add_model_flags(batch)
    _add_engine_flags(batch)
    kernels = commands.add_parser(
        "compile-kernels",
        help="compile a model's kernels ahead, without a card",
        description="Fill Triton's cache ($TRITON_CACHE_DIR) with what `serve` with the same flags will launch. "
        "Of the model it needs config.json alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    kernels.add_argument("--card", help=f"one of {', '.join(CARDS)}; default: this machine's")
    kernels.add_argument("--jobs", type=int, help="processes that compile; default: one for each CPU that may be used")
    _add_model_flags(kernels)
    _add_engine_flags(kernels)
    _add_bench(
        commands.add_parser(
            "bench",
            help="load on a running server, and what its clients saw",
            description="Put load on a running server of any make; print what its clients saw, as JSON.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    return parser


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--base-url", default="http://127.0.0.1:8000", help="where the server is")
    bench.add_argument("--model", required=True, default=argparse.SUPPRESS, help="the name to ask for")
    bench.add_argument("--num-prompts", type=int, default=100, help="requests in all")
    bench.add_argument("--random-input-len", type=int, default=512, help="tokens of a prompt (random ids)")
    bench.add_argument("--random-output-len", type=int, default=128, help="tokens of an answer")
    bench.add_argument("--max-concurrency", type=int, default=64, help="requests at a time, at most")
    bench.add_argument("--request-rate", type=float, default=0.0, help="per second, as a Poisson process; 0: at once")
    bench.add_argument("--vocab-size", type=int, default=32000, help="random ids are below this")
    bench.add_argument("--seed", type=int, default=0, help="of the random ids and arrivals")
    bench.add_argument(
        "--api-key", default=argparse.SUPPRESS, help="bearer token to send; default: $OPENAI_API_KEY, or none"
    )
    bench.add_argument(
        "--output-json", type=Path, default=argparse.SUPPRESS, help="a file for the figures as well; default: none"
    )


def _add_model_flags(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("model")
    group.add_argument(
        "--model", required=True, help="a folder (config.json, *.safetensors, tokenizer.json) or a .gguf"
    )
    group.add_argument(
        "--served-model-name", nargs="+", help="names for `model` in requests; default: the path's last part"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: the checkpoint's on CUDA; on the CPU float32, or bfloat16 where it has products of that",
    )
    group.add_argument(
        "--load-format", choices=LOAD_FORMATS, default="auto", help="dummy: random weights, for load tests"
    )
    group.add_argument(
        "--quantization", "-q", choices=QUANTIZATIONS, default="auto",
        help="auto: as the checkpoint says; fp8, int4: quantize when loading; gguf: keep a .gguf file's types",
    )  # fmt: skip
    group.add_argument("--max-model-len", type=int, help="tokens of prompt and answer; default: the model's own")


def _add_engine_flags(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("engine")
    group.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA where there is one"
    )
    group.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        default=1,
        help="devices that share the model, one process each",
    )
    group.add_argument(
        "--pipeline-parallel-size",
        "-pp",
        type=int,
        default=1,
        help="stages that the layers are split into, each of --tensor-parallel-size devices",
    )
    _add_node_flags(serve.add_argument_group("several nodes", "The same command on each, but for --node-rank."))
    group.add_argument(
        "--profile",
        choices=("latency", "throughput"),
        help=f"other defaults for some flags: {_profiles()}; default: none",
    )
    group.add_argument(
        "--max-num-seqs", type=int, help=f"requests that run at once; default: {SchedulerConfig().max_num_seqs}"
    )
    group.add_argument(
        "--max-num-batched-tokens", type=int, help="tokens of a step, at most; default: 8192 on CUDA, 512 on the CPU"
    )
    group.add_argument(
        "--max-inter-token-latency-ms",
        type=float,
        help="milliseconds between two tokens of a stream, kept by cutting prompts into chunks; 0: no bound; "
        "default: 40 on CUDA, 0 on the CPU",
    )
    group.add_argument(
        "--enable-chunked-prefill", action="store_true", default=True, help="always on; accepted for compatibility"
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=CacheConfig().memory_utilization,
        help="share of the GPU's memory for weights, activations and KV together, 0 to 1",
    )
    group.add_argument(
        "--kv-events-config",
        help="tell subscribers over ZMQ what the prefix cache holds: a JSON object with vLLM's names, as "
        '{"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}; default: tell nobody',
    )
    group.add_argument(
        "--enable-lora", action="store_true", help="take LoRA adapters beside the base model; default: no"
    )
    group.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="adapters (PEFT folders) to serve by name; may be given again for more; default: none",
    )
    group.add_argument("--max-loras", type=int, default=LoraConfig().max_loras, help="adapters on the device at once")
    group.add_argument(
        "--max-cpu-loras", type=int, help="adapters that may be loaded, most in host memory; default: --max-loras"
    )
    group.add_argument(
        "--max-lora-rank", type=int, default=LoraConfig().max_lora_rank, help="largest rank of an adapter"
    )
    group.add_argument(
        "--kv-cache-dtype", choices=KV_DTYPES, default="auto",
        help="fp8: half the bytes a token; auto: fp8 where the checkpoint has scales for it, else the model's",
    )  # fmt: skip
    group.add_argument("--kv-cache-blocks", type=int, help="KV blocks of 16 tokens; default: what memory allows")
    group.add_argument(
        "--kv-offloading-size",
        "--host-memory",
        type=float,
        help="GiB of host memory for KV; 0: none; default: on one CUDA device a quarter of what is free, at most the "
        "pool's size; else none",
    )
    group.add_argument(
        "--kv-cache-metrics", action="store_true", default=True, help="always on; accepted for compatibility"
    )
    group.add_argument(
        "--kv-cache-metrics-sample",
        type=float,
        default=CacheConfig().metrics_sample,
        help="share of the KV blocks whose time in the cache is measured; 0: none",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep finished requests' KV",
    )
    group.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="launch a step before the last one is read",
    )
    group.add_argument(
        "--speculative-config",
        help='guess tokens and verify several in one step: a JSON object with vLLM\'s names, {"method": "ngram"} or '
        '{"method": "draft_model", "model": …}, or null; default: n-gram with --profile latency, else one token a step',
    )
    group.add_argument(
        "--jump-forward",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write forced tokens of structured output without sampling them",
    )


def _add_node_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Where a pod of a LeaderWorkerSet is not told, it knows from its environment."""
    group.add_argument(
        "--nnodes", "-n", type=int, default=os.environ.get("LWS_GROUP_SIZE", "1"),
        help="nodes that share the pipeline stages; without it $LWS_GROUP_SIZE, or 1",
    )  # fmt: skip
    group.add_argument(
        "--node-rank", "-r", type=int, default=os.environ.get("LWS_WORKER_INDEX", "0"),
        help="which of them this is; 0 serves the API; without it $LWS_WORKER_INDEX, or 0",
    )  # fmt: skip
    group.add_argument(
        "--master-addr", default=os.environ.get("LWS_LEADER_ADDRESS", NodesConfig().master_addr),
        help="node 0's address; without it $LWS_LEADER_ADDRESS, or this host",
    )  # fmt: skip
    group.add_argument("--master-port", type=int, default=MASTER_PORT, help="port where nodes meet, on node 0")
    group.add_argument(
        "--headless",
        action="store_true",
        help="what every node but 0 does anyway: serve no API; accepted for compatibility",
    )


def _add_server_flags(serve: argparse.ArgumentParser) -> None:
    default = ServerConfig()
    group = serve.add_argument_group("server")
    group.add_argument("--host", default=default.host, help="address to listen on")
    group.add_argument("--port", type=int, default=default.port, help="port of the API and /metrics; 0: a free one")
    group.add_argument(
        "--health-port", type=int, help="port of a second listener for /health/*, on a thread of its own; default: none"
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=default.drain_timeout_s,
        help="seconds that running requests may go on after SIGTERM",
    )
    group.add_argument(
        "--max-num-queued-reqs",
        type=int,
        default=default.max_num_queued_reqs,
        help="requests that wait for a first token, at most; more are refused with 429",
    )
    group.add_argument(
        "--max-num-queued-tokens",
        type=int,
        default=default.max_num_queued_tokens,
        help="prompt tokens that wait, at most; more are refused with 429",
    )
    group.add_argument(
        "--max-queue-wait",
        type=float,
        default=default.max_queue_wait_s,
        help="seconds to a first token beyond which an overload is answered with 429; 0: never",
    )
    group.add_argument(
        "--tool-call-parser", default=default.tool_call_parser, choices=TOOL_CALL_PARSERS,
        help="how the model writes tool calls; auto: by its chat template",
    )  # fmt: skip
    group.add_argument(
        "--reasoning-parser", default=default.reasoning_parser, choices=REASONING_PARSERS,
        help="how the model marks its reasoning; auto: by its chat template",
    )  # fmt: skip
    group.add_argument(
        "--api-server-count", type=int, default=default.api_server_count, help="processes that answer HTTP on the port"
    )
    group.add_argument(
        "--enable-log-requests",
        action=argparse.BooleanOptionalAction,
        default=default.log_requests,
        help="a line for each finished request: counts and times, never what was said",
    )
    group.add_argument(
        "--disable-log-requests",
        action="store_false",
        dest="enable_log_requests",
        help="the default; accepted for compatibility",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        help="where spans are sent (OTLP over HTTP), as http://collector:4318/v1/traces; default: nowhere",
    )
    group.add_argument("--api-key", help="bearer token that clients must send; default: $MAINSAIL_API_KEY, or none")
    group.add_argument(
        "--live-limit",
        type=float,
        help="seconds that a step may take until liveness fails; default: 10 on CUDA, 60 on the CPU",
    )


def json_config(flag: str, text: str | None, kind: type[Config]) -> Config | None:
    """What the flag's JSON object says; None: the flag is not given, or says null. Raises InvalidConfigurationError."""
    if text is None:
        return None
    try:
        return None if text.strip() == "null" else msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidConfigurationError(f"{flag}: {error}") from None


def lora_config(flags: argparse.Namespace) -> LoraConfig | None:
    """Raises InvalidConfigurationError."""
    given: Sequence[str] = getattr(flags, "lora_modules", ())
    if not getattr(flags, "enable_lora", False) and not given:
        return None
    modules: list[tuple[str, str]] = []
    for module in given:
        name, _, path = module.partition("=")
        if not name or not path:
            raise InvalidConfigurationError(f"--lora-modules takes NAME=PATH, not {module!r}")
        modules.append((name, path))
    return LoraConfig(
        max_loras=flags.max_loras, max_cpu_loras=getattr(flags, "max_cpu_loras", None),
        max_lora_rank=flags.max_lora_rank, modules=tuple(modules),
    )  # fmt: skip


def nodes_config(flags: argparse.Namespace) -> NodesConfig:
    """Raises InvalidConfigurationError."""
    if getattr(flags, "headless", False) and flags.node_rank == 0:
        raise InvalidConfigurationError("--headless: node 0 serves the API; give the others a --node-rank above 0")
    return NodesConfig(
        nnodes=flags.nnodes, node_rank=flags.node_rank, master_addr=flags.master_addr, master_port=flags.master_port
    )


def engine_config(flags: argparse.Namespace) -> EngineConfig:
    """Raises InvalidConfigurationError."""
    profile = PROFILES[getattr(flags, "profile", "")]

    def chosen(name: str) -> int | None:
        given: int | None = getattr(flags, name, None)
        return getattr(profile, name) if given is None else given

    max_num_seqs, guessing = chosen("max_num_seqs"), getattr(flags, "speculative_config", None)
    by_profile = profile.speculative if flags.pipeline_parallel_size == 1 else None  # guesses need a single stage

    return EngineConfig(
        model=ModelConfig(
            path=flags.model,
            dtype=flags.dtype,
            load_format=flags.load_format,
            quantization=flags.quantization,
            max_model_len=getattr(flags, "max_model_len", None),
        ),
        cache=CacheConfig(
            dtype=flags.kv_cache_dtype,
            num_blocks=getattr(flags, "kv_cache_blocks", None),
            memory_utilization=flags.gpu_memory_utilization,
            enable_prefix_caching=flags.enable_prefix_caching,
            offloading_size_gib=getattr(flags, "kv_offloading_size", None),
            metrics_sample=flags.kv_cache_metrics_sample,
        ),
        kv_events=json_config("--kv-events-config", getattr(flags, "kv_events_config", None), KVEventsConfig),
        speculative=json_config("--speculative-config", guessing, SpeculativeConfig) if guessing else by_profile,
        scheduler=SchedulerConfig(
            max_num_seqs=SchedulerConfig().max_num_seqs if max_num_seqs is None else max_num_seqs,
            max_num_batched_tokens=chosen("max_num_batched_tokens"),
            max_inter_token_latency_ms=getattr(flags, "max_inter_token_latency_ms", None),
        ),
        lora=lora_config(flags),
        tensor_parallel_size=flags.tensor_parallel_size,
        pipeline_parallel_size=flags.pipeline_parallel_size,
        nodes=nodes_config(flags),
        device=flags.device,
        overlap=flags.overlap,
        jump_forward=flags.jump_forward,
    )


def server_config(flags: argparse.Namespace) -> ServerConfig:
    """Raises InvalidConfigurationError."""
    return ServerConfig(
        host=flags.host,
        port=flags.port,
        health_port=getattr(flags, "health_port", None),
        served_model_names=tuple(getattr(flags, "served_model_name", ())),
        drain_timeout_s=flags.drain_timeout,
        max_num_queued_reqs=flags.max_num_queued_reqs,
        max_num_queued_tokens=flags.max_num_queued_tokens,
        max_queue_wait_s=flags.max_queue_wait,
        api_key=getattr(flags, "api_key", None) or os.environ.get("MAINSAIL_API_KEY") or None,
        api_server_count=flags.api_server_count,
        log_requests=flags.enable_log_requests,
        otlp_traces_endpoint=getattr(flags, "otlp_traces_endpoint", None),
        live_limit_s=getattr(flags, "live_limit", None),
        tool_call_parser=flags.tool_call_parser,
        reasoning_parser=flags.reasoning_parser,
    )


def check_model_path(config: ModelConfig) -> None:
    """Before anything heavy is imported: is there a model at all?"""
    path = Path(config.path)
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist: --model takes a folder or a .gguf file on this machine")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} has no config.json: --model takes a Hugging Face folder or a .gguf file")
    if path.is_file() and path.suffix != ".gguf":
        raise UnsupportedModelError(f"{path} is a file, but no .gguf")


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        flags = build_parser().parse_args(arguments)
        commands = {"serve": _serve, "run-batch": _run_batch, "compile-kernels": _compile_kernels, "bench": _bench}
        commands[flags.command](flags)
    except StartupError as error:
        report_startup_error(error)
        sys.exit(1)


def _serve(flags: argparse.Namespace) -> None:
    engine, server = engine_config(flags), server_config(flags)
    check_model_path(engine.model)
    if engine.nodes.node_rank > 0:
        from mainsail_engine.server.node import run_node

        run_node(engine, server)
        return
    core = start_core(engine, server.api_server_count)  # it imports torch while this process imports the rest
    try:
        from mainsail_engine.server.run import run_server

        run_server(engine, server, core)
    finally:
        core.end()


def _run_batch(flags: argparse.Namespace) -> None:
    engine = engine_config(flags)
    check_model_path(engine.model)
    from mainsail_engine.batch import run_batch

    server = ServerConfig(
        served_model_names=tuple(getattr(flags, "served_model_name", ())),
        max_num_queued_reqs=2**31,
        max_num_queued_tokens=2**62,
        max_queue_wait_s=0.0,
    )
    if engine.nodes.node_rank > 0:
        from mainsail_engine.server.node import run_node

        run_node(engine, server)
        return
    run_batch(engine, server, input_path=flags.input_file, output_path=flags.output_file)


def _compile_kernels(flags: argparse.Namespace) -> None:
    config, card, jobs = engine_config(flags), card_named(getattr(flags, "card", None)), getattr(flags, "jobs", None)
    check_model_path(config.model)
    if jobs is not None and jobs < 1:
        raise InvalidConfigurationError("--jobs must be at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not compile_ahead(config, card, jobs=jobs):
        sys.exit(1)
    leave_mark(mark_of(config, card))


def _bench(flags: argparse.Namespace) -> None:
    from mainsail_engine.bench import Load, check_reachable, run

    check_reachable(flags.base_url)
    load = Load(
        base_url=flags.base_url,
        model=flags.model,
        num_prompts=flags.num_prompts,
        input_len=flags.random_input_len,
        output_len=flags.random_output_len,
        max_concurrency=flags.max_concurrency,
        request_rate=flags.request_rate,
        vocab_size=flags.vocab_size,
        seed=flags.seed,
        api_key=getattr(flags, "api_key", None) or os.environ.get("OPENAI_API_KEY"),
    )
    figures = json.dumps(asyncio.run(run(load)), indent=2)
    print(figures)
    output: Path | None = getattr(flags, "output_json", None)
    if output is not None:
        output.write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

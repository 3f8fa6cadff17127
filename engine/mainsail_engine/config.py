"""The engine's configuration: every field with its unit, its default and why.

Frozen values, chained: `EngineConfig` holds one part for each room. They are checked once, when they are built
(`InvalidConfigurationError` names the flag), and travel to the core process as JSON. Nothing here imports torch.
"""

from __future__ import annotations

import msgspec

from mainsail_engine.errors import InvalidConfigurationError

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOOL_CALL_PARSERS = ("auto", "hermes", "llama3_json", "mistral", "openai", "pythonic")
REASONING_PARSERS = ("auto", "none", "think", "deepseek_r1", "qwen3", "mistral", "openai_gptoss")
LOAD_FORMATS = ("auto", "dummy")
KV_DTYPES = ("auto", "fp8", "fp8_e4m3")
QUANTIZATIONS = ("auto", "fp8", "int4", "gguf")
BLOCK_SIZE = 16
"""Tokens in a KV block. One value: kernels, prefix tree and host tier are built and tuned for it."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidConfigurationError(message)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """A folder in Hugging Face form (config.json, *.safetensors, tokenizer.json) or one .gguf file."""
    dtype: str = "auto"
    """Computation and KV dtype. auto: the checkpoint's on CUDA (float32 becomes bfloat16); on the CPU float32, or
    bfloat16 for a checkpoint of 16 bits or less where the CPU has products of that (AVX512-BF16, AMX)."""
    load_format: str = "auto"
    """dummy: random weights from config.json alone, for load tests and benchmarks."""
    quantization: str = "auto"
    """How weights are held. auto: as a safetensors checkpoint says; a .gguf file in dtype. fp8, int4: quantize what is
    not, when it is loaded. gguf: keep the types of a .gguf file."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together. None: the model's own limit, if the KV pool holds it."""

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        _require(self.load_format in LOAD_FORMATS, f"--load-format must be one of {', '.join(LOAD_FORMATS)}")
        _require(self.quantization in QUANTIZATIONS, f"--quantization must be one of {', '.join(QUANTIZATIONS)}")
        _require(self.max_model_len is None or self.max_model_len >= 1, "--max-model-len must be at least 1")


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    dtype: str = "auto"
    """What keys and values are held in (--kv-cache-dtype). auto: FP8 where the checkpoint has scales for it, else the
    model's dtype. fp8 (e4m3) doubles the tokens that fit."""
    num_blocks: int | None = None
    """KV blocks of 16 tokens (--kv-cache-blocks). None: what memory_utilization leaves."""
    memory_utilization: float = 0.92
    """Share of the device's memory for weights, activations and KV together (--gpu-memory-utilization)."""
    enable_prefix_caching: bool = True
    """Keep the KV of finished requests in the prefix tree until its room is needed."""
    offloading_size_gib: float | None = None
    """Host memory for KV that the device has no room for (--kv-offloading-size, GiB; pinned on CUDA). 0: none. None: on
    CUDA a quarter of the memory that this process may still take, at most as much as the pool; on the CPU, and with
    several ranks (which share what is given), none."""
    metrics_sample: float = 0.01
    """Share of the KV blocks whose time in the cache is measured (--kv-cache-metrics-sample). 0: none."""

    def __post_init__(self) -> None:
        _require(self.dtype in KV_DTYPES, f"--kv-cache-dtype must be one of {', '.join(KV_DTYPES)}")
        _require(self.num_blocks is None or self.num_blocks >= 2, "--kv-cache-blocks must be at least 2")
        _require(
            self.offloading_size_gib is None or 0 <= self.offloading_size_gib < float("inf"),
            "--kv-offloading-size must not be negative",
        )
        _require(0 < self.memory_utilization <= 1, "--gpu-memory-utilization must be above 0 and at most 1")
        _require(0 <= self.metrics_sample <= 1, "--kv-cache-metrics-sample must be from 0 to 1")


class KVEventsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """--kv-events-config, a JSON object with vLLM's names."""

    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    endpoint: str = "tcp://*:5557"
    """Where subscribers connect."""
    replay_endpoint: str | None = None
    """Where those who lost events ask for them. None: nowhere."""
    topic: str = ""
    buffer_steps: int = 10_000
    """Batches kept for replay."""
    hwm: int = 100_000
    """Batches that may wait for a slow subscriber, who loses those beyond."""

    def __post_init__(self) -> None:
        _require(self.publisher in ("zmq", "null"), "--kv-events-config: publisher must be zmq or null")
        _require(self.buffer_steps >= 1, "--kv-events-config: buffer_steps must be at least 1")
        _require(self.hwm >= 1, "--kv-events-config: hwm must be at least 1")


SPECULATIVE_METHODS = ("ngram", "draft_model", "draft")
MAX_SPECULATIVE_TOKENS = 16
MAX_SPECULATIVE_ROWS = 1024


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """--speculative-config, a JSON object with vLLM's names: guess tokens, and verify them together in one step."""

    method: str | None = None
    """ngram: from the request's own text; draft_model (or draft): by a smaller model. None: by whether model is set."""
    model: str | None = None
    """The draft model: a folder or a .gguf, with the same vocabulary."""
    num_speculative_tokens: int | None = None
    """Guesses for a request in one step, at most. None: 16 from the text, 5 from a draft model."""
    prompt_lookup_max: int | None = None
    """n-gram: the longest run of last tokens that is looked for in the text. None: 3, or prompt_lookup_min."""
    prompt_lookup_min: int | None = None
    """… and the shortest. None: 3, or prompt_lookup_max."""
    draft_tensor_parallel_size: int | None = None
    """The draft model runs on one device: 1 or left out."""
    adaptive: bool = True
    """Guess as many as pays, by what was measured, and none where none does. Off: always as many as there may be."""
    max_step_rows: int = 1024
    """Tokens of a step with guesses at most, of all requests: more would need memory for more logits, and graphs."""

    def __post_init__(self) -> None:
        flag, methods = "--speculative-config", ", ".join(SPECULATIVE_METHODS[:2])
        _require(self.method is None or self.method in SPECULATIVE_METHODS, f"{flag}: method must be one of {methods}")
        _require(self.method is not None or self.model is not None, f"{flag}: give a method ({methods}) or a model")
        _require(self.is_draft_model == (self.model is not None), f"{flag}: model belongs to method draft_model alone")
        n = self.num_speculative_tokens
        _require(
            n is None or 1 <= n <= MAX_SPECULATIVE_TOKENS,
            f"{flag}: num_speculative_tokens must be between 1 and {MAX_SPECULATIVE_TOKENS}",
        )
        _require(
            2 <= self.max_step_rows <= MAX_SPECULATIVE_ROWS,
            f"{flag}: max_step_rows must be between 2 and {MAX_SPECULATIVE_ROWS}",
        )
        least, longest = self.ngram_sizes
        _require(1 <= least <= longest <= 16, f"{flag}: 1 <= prompt_lookup_min <= prompt_lookup_max <= 16 is needed")
        _require(self.draft_tensor_parallel_size in (None, 1), f"{flag}: draft_tensor_parallel_size must be 1")

    @property
    def is_draft_model(self) -> bool:
        return self.method in ("draft_model", "draft") or (self.method is None and self.model is not None)

    @property
    def max_guesses(self) -> int:
        return self.num_speculative_tokens or (5 if self.is_draft_model else MAX_SPECULATIVE_TOKENS)

    @property
    def ngram_sizes(self) -> tuple[int, int]:
        """(shortest, longest) n-gram."""
        least, longest = self.prompt_lookup_min, self.prompt_lookup_max
        if least is None:
            least = min(3, longest) if longest is not None else 3
        return least, longest if longest is not None else max(3, least)


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """LoRA adapters beside the base model (--enable-lora)."""

    max_loras: int = 8
    """Adapters on the device at once, each with memory there from the start (--max-loras)."""
    max_cpu_loras: int | None = None
    """Adapters that may be loaded, those without a place on the device in host memory (--max-cpu-loras). None: as many
    as there are places."""
    max_lora_rank: int = 16
    """The largest rank that an adapter may have (--max-lora-rank)."""
    modules: tuple[tuple[str, str], ...] = ()
    """(served name, path) of those that are loaded at the start (--lora-modules)."""

    def __post_init__(self) -> None:
        _require(self.max_loras >= 1, "--max-loras must be at least 1")
        _require(1 <= self.max_lora_rank <= 512, "--max-lora-rank must be between 1 and 512")
        names = [name for name, _ in self.modules]
        _require(self.max_adapters >= self.max_loras, "--max-cpu-loras must be at least --max-loras")
        most = "--max-loras" if self.max_cpu_loras is None else "--max-cpu-loras"
        _require(len(names) <= self.max_adapters, f"--lora-modules has {len(names)} adapters, more than {most}")
        _require(len(set(names)) == len(names), "--lora-modules names an adapter twice")

    @property
    def max_adapters(self) -> int:
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    max_num_seqs: int = 256
    """Requests that run at once: the height of every per-request tensor."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step. None: 8192 on CUDA, 512 on the CPU, where a longer step would stall every stream."""
    max_inter_token_latency_ms: float | None = None
    """What a step may take while requests decode; chunks of prompts are cut to it, from measured times. 0: no bound.
    None: 40 on CUDA, no bound on the CPU."""
    agent_sessions: bool = True
    """Keep the KV of sessions that are expected back, and hold new turns rather than displace it. Off: to compare."""
    watermark: float = 0.01
    """Share of the blocks that admission leaves free, so that running requests grow without preempting at once."""

    def __post_init__(self) -> None:
        _require(self.max_num_seqs >= 1, "--max-num-seqs must be at least 1")
        _require(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= 1,
            "--max-num-batched-tokens must be at least 1",
        )
        _require(
            self.max_inter_token_latency_ms is None or self.max_inter_token_latency_ms >= 0,
            "--max-inter-token-latency-ms must not be negative",
        )


MASTER_PORT = 29500


class NodesConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The hosts that share an engine's pipeline stages, each started by a command of its own."""

    nnodes: int = 1
    """How many (--nnodes)."""
    node_rank: int = 0
    """Which of them this is (--node-rank). Node 0 leads: it serves the API and drives all ranks."""
    master_addr: str = "127.0.0.1"
    """Where the others find node 0 (--master-addr)."""
    master_port: int = MASTER_PORT
    """… and its rendezvous (--master-port)."""

    def __post_init__(self) -> None:
        _require(self.nnodes >= 1, "--nnodes must be at least 1")
        _require(
            0 <= self.node_rank < self.nnodes,
            f"--node-rank must be from 0 to {self.nnodes - 1} with --nnodes {self.nnodes}, not {self.node_rank}",
        )
        _require(0 < self.master_port <= 65535, "--master-port must be between 1 and 65535")
        _require(bool(self.master_addr), "--master-addr must not be empty")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the core process needs to run."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    kv_events: KVEventsConfig | None = None
    """Tell subscribers what the prefix cache holds (--kv-events-config). None: nobody is told."""
    speculative: SpeculativeConfig | None = None
    """Guess tokens and verify them together (--speculative-config). None: one token a step."""
    lora: LoraConfig | None = None
    """Adapters beside the base model. None: there are none (--enable-lora)."""
    tensor_parallel_size: int = 1
    """Devices that share every matrix of the model. Each is driven by a process of its own (a rank)."""
    pipeline_parallel_size: int = 1
    """Stages that the layers are split into, one after the other, each of tensor_parallel_size ranks. As many steps
    are in flight, so that all of them are busy."""
    nodes: NodesConfig = NodesConfig()
    """Hosts that the stages are on."""
    device: str = "auto"
    """cuda or cpu. auto: CUDA where there is one."""
    overlap: bool = True
    """Launch step N+1 before step N's tokens are on the CPU (on CUDA, and with pipeline stages; the tokens are the same
    without)."""
    jump_forward: bool = True
    """Write forced tokens of structured output without sampling them (the text is the same without)."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs (CUDA only; the tokens are the same without)."""

    def __post_init__(self) -> None:
        _require(1 <= self.tensor_parallel_size <= 8, "--tensor-parallel-size must be between 1 and 8")
        stages, nnodes = self.pipeline_parallel_size, self.nodes.nnodes
        _require(1 <= stages <= 64, "--pipeline-parallel-size must be between 1 and 64")
        fit = ", ".join(str(n) for n in range(1, stages + 1) if stages % n == 0)
        _require(
            stages % nnodes == 0,
            f"--nnodes {nnodes} does not divide the stages of --pipeline-parallel-size {stages}: these do: {fit}; "
            f"or set --pipeline-parallel-size to a multiple of {nnodes}",
        )
        _require(
            stages == 1 or self.speculative is None,
            "--speculative-config does not work with --pipeline-parallel-size above 1: leave one of them out",
        )
        _require(
            nnodes == 1 or self.lora is None,
            "--enable-lora does not work with --nnodes above 1 (adapters are read from one node's disk): leave one out",
        )
        _require(
            self.num_ranks == 1 or self.lora is None or self.lora.max_adapters == self.lora.max_loras,
            "--max-cpu-loras above --max-loras works on one device: leave it out, and set --max-loras",
        )

    @property
    def num_ranks(self) -> int:
        """Processes that compute, over all nodes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.nodes.nnodes

    def ranks_of(self, node: int) -> range:
        """Rank = stage * tensor_parallel_size + place in the stage; nodes have consecutive ones."""
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the API process needs besides."""

    host: str = "127.0.0.1"
    port: int = 8000
    health_port: int | None = None
    """A second listener with a thread of its own for /health/*, so that load never fails a probe. None: none."""
    served_model_names: tuple[str, ...] = ()
    """Names that clients may put into `model`. Empty: the last part of the model's path."""
    drain_timeout_s: float = 120.0
    """How long running requests may go on after SIGTERM."""
    max_num_queued_reqs: int = 2048
    """Requests that may wait for their first token. More are refused with 429 and a Retry-After."""
    max_num_queued_tokens: int = 2_000_000
    """Prompt tokens that may wait for their first token, over all requests (a lone request is always let in)."""
    max_queue_wait_s: float = 4.0
    """Under overload, requests whose first token would take longer (as measured) are refused at once. 0: never."""
    api_key: str | None = None
    """What clients must send as a bearer token. None: no key."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls. auto: by its chat template."""
    reasoning_parser: str = "auto"
    """How the model marks its reasoning. auto: by its chat template; none: reasoning is content."""
    api_server_count: int = 1
    """Processes that answer HTTP, on one port. One carries some ten thousand streamed tokens per second."""
    log_requests: bool = False
    """One line for each finished request: counts and times, never what was said."""
    otlp_traces_endpoint: str | None = None
    """Where spans are sent (OTLP over HTTP), as http://collector:4318/v1/traces. None: none are made."""
    live_limit_s: float | None = None
    """How long a step may take before liveness fails. None: 10 s on CUDA, 60 s on the CPU."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "--port must be between 0 and 65535")
        _require(
            self.health_port is None or 0 <= self.health_port <= 65535, "--health-port must be between 0 and 65535"
        )
        _require(1 <= self.api_server_count <= 64, "--api-server-count must be between 1 and 64")
        _require(self.drain_timeout_s >= 0, "--drain-timeout must not be negative")
        _require(self.max_num_queued_reqs >= 1, "--max-num-queued-reqs must be at least 1")
        _require(self.max_queue_wait_s >= 0, "--max-queue-wait must not be negative")
        _require(self.max_num_queued_tokens >= 1, "--max-num-queued-tokens must be at least 1")
        _require(all(self.served_model_names), "--served-model-name must not be empty")
        _require(
            self.tool_call_parser in TOOL_CALL_PARSERS,
            f"--tool-call-parser must be one of {', '.join(TOOL_CALL_PARSERS)}",
        )
        _require(
            self.reasoning_parser in REASONING_PARSERS,
            f"--reasoning-parser must be one of {', '.join(REASONING_PARSERS)}",
        )

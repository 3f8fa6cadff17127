"""spec.engine: how the engine runs the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mainsail_operator.types.schema import Model, Quantity, rule, rules

# Each flag of the engine that a field or the operator owns, and what to set instead.
OWNED_FLAGS: dict[str, str] = {
    "--model": "spec.model.uri",
    "--served-model-name": "spec.model.servedNames",
    "--max-model-len": "spec.engine.maxModelLen",
    "--max-num-seqs": "spec.engine.maxNumSeqs",
    "--max-num-batched-tokens": "spec.engine.maxBatchedTokens",
    "--tensor-parallel-size": "spec.engine.tensorParallelSize",
    "-tp": "spec.engine.tensorParallelSize",
    "--pipeline-parallel-size": "spec.engine.pipelineParallelSize",
    "-pp": "spec.engine.pipelineParallelSize",
    "--nnodes": "spec.engine.pipelineParallelSize",
    "-n": "spec.engine.pipelineParallelSize",
    "--node-rank": "nothing (the operator owns it)",
    "-r": "nothing (the operator owns it)",
    "--master-addr": "nothing (the operator owns it)",
    "--master-port": "nothing (the operator owns it)",
    "--kv-offloading-size": "spec.engine.kvCache.hostMemory",
    "--host-memory": "spec.engine.kvCache.hostMemory",
    "--dtype": "spec.engine.dtype",
    "--load-format": "spec.engine.loadFormat",
    "--quantization": "spec.engine.quantization",
    "-q": "spec.engine.quantization",
    "--kv-cache-dtype": "spec.engine.kvCache.dtype",
    "--gpu-memory-utilization": "spec.engine.kvCache.memoryFraction",
    "--kv-cache-blocks": "spec.engine.kvCache.blocks",
    "--enable-prefix-caching": "spec.engine.kvCache.prefixCaching",
    "--no-enable-prefix-caching": "spec.engine.kvCache.prefixCaching",
    "--drain-timeout": "spec.drain.timeout",
    "--host": "nothing (the operator owns it)",
    "--port": "nothing (the operator owns it)",
    "--health-port": "nothing (the operator owns it)",
}


class KvCacheSpec(Model):
    """The memory that holds the keys and values of running sequences."""

    memory_fraction: float = Field(
        default=0.92,
        description="Share of the accelerator's memory that weights, activations and KV cache may use together, "
        "0 to 1. Too high fails at start with reason OutOfMemory; too low preempts sequences under load. "
        "Without an accelerator it has no effect.",
        json_schema_extra=rules(
            rule(
                "self > 0.0 && self <= 1.0",
                "memoryFraction is a share of the accelerator's memory: more than 0 and at most 1, for example 0.92",
            )
        ),
    )
    blocks: int | None = Field(
        default=None,
        ge=2,
        le=100_000_000,
        description="Number of KV cache blocks, instead of deriving it from memoryFraction. For tests and for "
        "machines without an accelerator. Default: derived.",
    )
    host_memory: Quantity | None = Field(
        default=None,
        description="Host memory for KV that the accelerator has no room for: preempted sequences and idle agents' "
        "sessions come back from there instead of being computed again. It counts against the memory limit. "
        "0 turns it off. Default: a quarter of the free memory, at most as much as the accelerator's KV cache; none "
        "without an accelerator.",
    )
    dtype: Literal["auto", "fp8"] = Field(
        default="auto",
        description="Number format of keys and values. fp8 (e4m3) holds twice the tokens in the same memory, for a "
        "small loss of quality, and needs an accelerator with FP8 (compute capability 8.9). auto takes fp8 where the "
        "model brings scales for it, and the model's own format else.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Keep the KV of finished prompts and reuse it for prompts that begin alike. Saves the prefill of "
        "shared system prompts; costs nothing but memory that nobody else wants.",
    )


class EngineSpec(Model):
    """How the engine runs the model. Every field has a default that suits most models."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.maxBatchedTokens) || self.maxBatchedTokens >= self.maxNumSeqs",
                "maxBatchedTokens must be at least maxNumSeqs: every running sequence needs one token in each step",
                path=".maxBatchedTokens",
            )
        )
    )

    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        le=8,
        description="GPUs of one pod that share the model, each with a part of every matrix: for models that one GPU "
        "cannot hold, or to answer faster. They are on one node, best joined by NVLink. It must divide the model's "
        "heads; where it does not, ModelLoaded=False names the sizes that do.",
    )
    pipeline_parallel_size: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Pods of one replica that share the model's layers, each with tensorParallelSize GPUs: for models "
        "that the GPUs of one node cannot hold. Above 1 a replica is a group of a LeaderWorkerSet (sigs.k8s.io/lws), "
        "which must be installed; where it is not, the condition Stalled says so.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="Longest prompt plus answer, in tokens. Default: what the model was trained for. Lower it when the "
        "KV cache cannot hold one sequence of full length (the engine then fails with reason OutOfMemory).",
    )
    max_num_seqs: int = Field(
        default=256,
        ge=1,
        le=65_536,
        description="Most sequences in one step. More raises throughput and the time between tokens. Others wait.",
    )
    max_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Token budget of one step, shared by prefill chunks and decodes. A larger one shortens the time to "
        "the first token of long prompts; a smaller one keeps running streams smooth while prompts are prefilled. "
        "Default: 8192, or 512 without an accelerator.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of weights and activations. auto takes the model's own on a GPU; on a CPU float32, "
        "or bfloat16 where the CPU multiplies it.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto loads the weights. dummy makes random ones of the right shapes, to test capacity and "
        "rollouts without the download; its answers are noise.",
    )
    quantization: Literal["auto", "fp8", "int4", "gguf"] = Field(
        default="auto",
        description="How weights are held. auto takes a model quantized beforehand as it is (compressed-tensors, fp8, "
        "AWQ, GPTQ, MXFP4), and a .gguf file in dtype. fp8 and int4 quantize a model that is not while it loads: half "
        "or 0.3 of the memory. gguf keeps the types of a .gguf file.",
    )
    kv_cache: KvCacheSpec = Field(default_factory=KvCacheSpec, description="The KV cache: its size and its reuse.")
    extra_args: list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(
        default_factory=list[str],
        max_length=64,
        description="Further arguments of `mainsail-engine serve`, for flags that no field covers. An argument that "
        "the engine does not know shows as ModelLoaded=False with the engine's message. What a field says wins over "
        "--profile: set maxNumSeqs and maxBatchedTokens for it.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            **rules(
                rule(
                    f"self.all(arg, !(arg.split('=')[0] in {list(OWNED_FLAGS)}))",
                    "'extraArgs repeats a flag that a field owns: remove '"
                    f" + self.filter(arg, arg.split('=')[0] in {list(OWNED_FLAGS)})[0].split('=')[0]"
                    " + ' and set '"
                    f" + {OWNED_FLAGS}"
                    f"[self.filter(arg, arg.split('=')[0] in {list(OWNED_FLAGS)})[0].split('=')[0]]",
                    computed=True,
                )
            ),
        },
    )

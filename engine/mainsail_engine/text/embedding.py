"""How a model's hidden states become an embedding, as its own files say: sentence-transformers' layout.

    modules.json             the steps after the model: Pooling, Normalize
    1_Pooling/config.json    which states are pooled, and how
    config.json              is_matryoshka, matryoshka_dimensions: shorter embeddings are beginnings of longer ones

(Reimers and Gurevych, "Sentence-BERT", 2019; Kusupati et al., "Matryoshka Representation Learning", 2022.) A step that
this engine does not compute ends the start, with its name. Without these files an embedding is the mean of the states,
of length 1. Nothing here imports torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainsail_engine.errors import RequestError, UnsupportedModelError
from mainsail_engine.request import Pooling

_MODES = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}
_NAMES = {"cls": Pooling.CLS, "mean": Pooling.MEAN, "lasttoken": Pooling.LAST}


@dataclass(frozen=True, slots=True)
class EmbeddingForm:
    pooling: Pooling = Pooling.MEAN
    normalize: bool = True
    """Embeddings have length 1."""
    shortens: bool = False
    """Beginnings of an embedding are embeddings: those of `dimensions`, or of any length where there are none."""
    dimensions: tuple[int, ...] = ()

    def check_dimensions(self, asked: int | None, size: int) -> None:
        """size: numbers of a whole embedding. Raises RequestError."""
        if asked is None or asked == size:
            return
        if not self.shortens:
            message = f"this model's embeddings have {size} numbers and cannot be shortened (it is no Matryoshka model)"
        elif self.dimensions and asked not in self.dimensions:
            message = f"this model makes embeddings of {', '.join(map(str, self.dimensions))} numbers"
        elif asked > size:
            message = f"this model's embeddings have {size} numbers"
        else:
            return
        raise RequestError(message, param="dimensions")


def read_embedding_form(path: Path) -> EmbeddingForm:
    """Of the model at that path. Raises UnsupportedModelError for a step that is not computed here."""
    if not path.is_dir():
        return EmbeddingForm()
    config = _read(path / "config.json", {})
    dimensions = tuple(int(n) for n in config.get("matryoshka_dimensions") or ())
    shortens = bool(config.get("is_matryoshka") or dimensions)
    modules: list[dict[str, Any]] = _read(path / "modules.json", [])
    if not modules:
        return EmbeddingForm(shortens=shortens, dimensions=dimensions)
    pooling, normalize = None, False
    for module in modules[1:]:
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling" and pooling is None:
            pooling = _pooling(path / str(module["path"]) / "config.json")
        elif kind == "Normalize" and pooling is not None:
            normalize = True
        else:
            raise UnsupportedModelError(f"{path}/modules.json: the step {module['type']} is not supported")
    return EmbeddingForm(pooling or Pooling.MEAN, normalize, shortens, dimensions)


def _pooling(file: Path) -> Pooling:
    settings: dict[str, Any] = _read(file, {})
    named = settings.get("pooling_mode")
    asked = [str(named)] if named else [name for name, value in settings.items() if "_mode_" in name and value is True]
    known = {**_MODES, **_NAMES}
    if len(asked) != 1 or asked[0] not in known:
        raise UnsupportedModelError(f"{file}: pooling by {' and '.join(asked) or 'nothing'} is not supported; one of "
                                    f"{', '.join(_MODES)} is")  # fmt: skip
    if settings.get("include_prompt") is False:
        raise UnsupportedModelError(f"{file}: include_prompt false is not supported")
    return known[asked[0]]


def _read(file: Path, missing: Any) -> Any:
    try:
        return json.loads(file.read_text()) if file.is_file() else missing
    except ValueError as error:
        raise UnsupportedModelError(f"{file} is not valid JSON: {error}") from error

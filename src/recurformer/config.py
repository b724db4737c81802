"""The settings of a model, each documented where it is declared, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from recurformer.settings import Settings, setting, shown, suggest

LATER_SETTINGS = frozenset({"embedding_std"})  # settings that older configurations lack

LayerKind = Literal["recurrent", "standard"]
Activation = Literal["gelu", "gelu_tanh", "swiglu"]
Position = Literal["alibi", "rope", "none"]
AlibiSlopes = Literal["geometric", "interleaved"]
Norm = Literal["rms", "layer"]
QKNorm = Literal["head", "full", "none"]
ResidualScale = Literal["depth", "none"]
Init = Literal["fan_in", "official"]


# Limits that no sensible model reaches. A value above is a damaged file or a slip, refused before memory is taken.
Width = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=4096)]
Vocabulary = Annotated[int, Field(ge=1, le=2**31 - 1)]
# Below 1e-12 the square of a small float32 vanishes beside rounding errors, and faster scans gave NaN.
NormEpsilon = Annotated[float, Field(ge=1e-12, le=1.0, allow_inf_nan=False)]
# Below 1 the wavelengths would shrink from pair to pair; values near 0 overflow.
RopeBase = Annotated[float, Field(ge=1.0, le=1e12, allow_inf_nan=False)]
# Outside, squares of float32 embeddings vanish beside norm_eps or overflow.
EmbeddingStd = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The shape of one language model. Shape letters: L layers, D width, F MLP width, H query heads, G key-value
    heads, K head width.

    Raises:
        ValueError: for a value outside its limits or a combination that makes no model; the message names the values.
    """

    vocab_size: Vocabulary = setting(256, "Token ids run from 0 to vocab_size - 1.")
    d_model: Width = setting(128, "D, the width of the residual stream.")
    n_layers: Layers = setting(4, "L, the number of layers.")
    n_heads: Width = setting(4, "H, the number of query heads.")
    layers: str | tuple[LayerKind, ...] = setting(
        "recurrent",
        'Kind of the layers: "recurrent", "standard", "first:K" (the first K recurrent, the others standard), '
        "or one entry per layer.",
    )
    n_kv_heads: Width | None = setting(None, "G, the number of key-value heads; none: n_heads. Must divide n_heads.")
    head_dim: Width | None = setting(None, "K, the width of a head; none: d_model / n_heads.")
    d_mlp: Width | None = setting(None, "F, the MLP's inner width (of each matrix for swiglu); none: 4 * d_model.")
    activation: Activation = setting("gelu", '"gelu" (exact), "gelu_tanh" or "swiglu".')
    position: Position = setting("alibi", '"alibi", "rope" (half-split rotation, after QK-norm) or "none".')
    alibi_slopes: AlibiSlopes = setting(
        "geometric",
        '"geometric": 2^(-8h/H) for every H, as the official code; "interleaved": Press et al., which differs when H '
        "is no power of two.",
    )
    rope_theta: RopeBase = setting(10000.0, "Base of the rotary wavelengths.")
    norm: Norm = setting("rms", '"rms" or "layer" (weight, no bias); before each branch and before the output layer.')
    norm_eps: NormEpsilon = setting(1e-5, "Added to the mean square (or variance) inside every norm.")
    qk_norm: QKNorm = setting(
        "head",
        'Second norm on queries and keys: "head" (one weight of width K, shared by heads), "full" (over the whole '
        'width, before the split into heads, as the official code) or "none".',
    )
    residual_scale: ResidualScale = setting("depth", '"depth": branches times 1/sqrt(L) (paper); "none" (official).')
    tie_embeddings: bool = setting(False, "Use the embedding matrix as the output layer.")
    vocab_multiple: Width = setting(1, "Pad embedding and output rows to a multiple of this; the padding never shows.")
    attention_bias: bool = setting(False, "Biases on the q, k, v and o projections.")
    mlp_bias: bool = setting(False, "Biases on the MLP's projections.")
    init: Init = setting(
        "fan_in",
        '"fan_in": normal, std 1/sqrt(fan_in), embedding and output 1/sqrt(D); "official": normal cut at 3 sigma, '
        "output projections shrinking with depth.",
    )
    embedding_std: EmbeddingStd | None = setting(
        None,
        "Standard deviation of the embedding at initialisation; none: 1/sqrt(d_model). Not with tie_embeddings.",
    )

    CHECKED_BY_ITSELF: ClassVar = ("layers",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, list):  # TOML, YAML and JSON have no tuples
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.embedding_std is not None and self.tie_embeddings:
            raise ValueError(
                f"embedding_std is {self.embedding_std:g}, and tie_embeddings would give it to the output layer, whose "
                "logits it would blow up; drop one of them"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; change one of them or set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.kv_heads}; "
                "each key-value head serves an equal group of query heads"
            )
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(
                f"position 'rope' rotates pairs, but head_dim is {self.head_width}; make it even or choose 'alibi'"
            )
        _ = self.layer_kinds

    # --- what follows from the settings -----------------------------------------------------------------------------

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, first to last."""
        kinds = get_args(LayerKind)
        if isinstance(self.layers, tuple):
            if len(self.layers) != self.n_layers:
                raise ValueError(
                    f"layers lists {len(self.layers)} kinds, but n_layers is {self.n_layers}; list one for each layer"
                )
            for kind in self.layers:
                if kind not in kinds:
                    raise ValueError(f"layers contains {shown(kind)}; each entry must be 'recurrent' or 'standard'")
            return self.layers
        if self.layers in kinds:
            return (self.layers,) * self.n_layers  # pyright: ignore[reportReturnType]
        if isinstance(self.layers, str) and self.layers.startswith("first:"):
            count = self.layers.removeprefix("first:")
            if not (count.isascii() and count.isdigit()) or int(count) > self.n_layers:
                raise ValueError(
                    f"layers is {shown(self.layers)}; K in 'first:K' must be from 0 to n_layers {self.n_layers}"
                )
            return ("recurrent",) * int(count) + ("standard",) * (self.n_layers - int(count))
        raise ValueError(
            f"layers is {shown(self.layers)}; choose 'recurrent', 'standard', 'first:K' or one kind for each layer"
        )

    @property
    def recurrent_depth(self) -> int:
        """Number of recurrent layers at the bottom, below the first standard one."""
        kinds = self.layer_kinds
        return kinds.index("standard") if "standard" in kinds else len(kinds)

    @property
    def kind(self) -> str:
        """The kinds of the layers in a few letters: "recurrent", "standard", "first:K", or R and S, first to last."""
        kinds = self.layer_kinds
        recurrent = kinds.count("recurrent")
        if recurrent in (0, len(kinds)):
            return kinds[0]
        if all(kind == "recurrent" for kind in kinds[:recurrent]):
            return f"first:{recurrent}"
        letters = "".join(kind[0].upper() for kind in kinds)
        return letters if len(letters) <= 9 else f"{recurrent} of {len(kinds)} R"

    def num_parameters(self, embedding: bool = False) -> int:
        """Number of parameters of a model of this shape; without embedding and output layer unless `embedding`."""
        D, F, K = self.d_model, self.mlp_width, self.head_width
        queries, pairs = self.n_heads * K, self.kv_heads * K
        inner = F * (2 if self.activation == "swiglu" else 1)
        layer = 2 * D + D * (2 * queries + 2 * pairs) + D * (inner + F)
        layer += {"head": 2 * K, "full": queries + pairs, "none": 0}[self.qk_norm]
        layer += (queries + 2 * pairs + D if self.attention_bias else 0) + (inner + D if self.mlp_bias else 0)
        tables = (1 if self.tie_embeddings else 2) * self.padded_vocab_size * D
        return self.n_layers * layer + D + (tables if embedding else 0)

    @property
    def kv_heads(self) -> int:
        """G, with its default filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """K, with its default filled in."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        """F, with its default filled in."""
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def branch_scale(self) -> float:
        """s, the factor of both residual branches (paper section 2.2)."""
        return self.n_layers**-0.5 if self.residual_scale == "depth" else 1.0

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of cache that one token takes over all layers."""
        return 2 * self.n_layers * self.kv_heads * self.head_width * bytes_per_element

    # --- dictionaries and presets ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every field under its own name, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a key that is no field, with the nearest name.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(f"unknown model setting {key!r}{suggest(key, names)}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A named shape, e.g. `ModelConfig.preset("300m-6", layers="standard")`.

        Args:
            name: one of `PRESETS`. The paper's shapes ("150m-12" ... "300m-6") come with the official code's options.
            overrides: fields to change.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}{suggest(name, PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})


# The options of the official configuration files (paper section 7 and its code), shared by the paper's shapes.
OFFICIAL_OPTIONS: dict[str, Any] = {
    "vocab_size": 32100,
    "vocab_multiple": 128,
    "norm": "layer",
    "qk_norm": "full",
    "residual_scale": "none",
    "init": "official",
}


def _paper(width: int, heads: int, layers: int) -> dict[str, Any]:
    return {**OFFICIAL_OPTIONS, "d_model": width, "n_heads": heads, "n_layers": layers}


PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"d_model": 128, "n_heads": 4, "n_layers": 4},
    "tiny": {"d_model": 384, "n_heads": 6, "n_layers": 6},
    "small": {"d_model": 640, "n_heads": 10, "n_layers": 7},
    "150m-12": _paper(1024, 16, 12),
    "150m-6": _paper(1408, 22, 6),
    "300m-24": _paper(1024, 16, 24),
    "300m-12": _paper(1408, 22, 12),
    "300m-6": _paper(2048, 32, 6),
}

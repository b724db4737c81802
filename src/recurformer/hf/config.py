"""A `ModelConfig` as a Hugging Face configuration: the same fields under the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import PretrainedConfig

from recurformer.config import ModelConfig
from recurformer.reading import check_format_version
from recurformer.store.folders import FORMAT_VERSION

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class RecurformerConfig(PretrainedConfig):
    """The shape of a model, as in the `config.json` of a folder written by `recurformer.save`.

    Args:
        values: every field of `ModelConfig`, with its default, and the settings that every Hugging Face configuration
            has.

    Raises:
        ValueError: as `ModelConfig`, and for a folder of a newer format.
    """

    model_type: ClassVar[str] = "recurformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})  # tools ask every configuration for it

    def __init__(self, **values: Any) -> None:
        ours = {theirs: values.pop(theirs) for theirs in self.attribute_map if theirs in values}
        ours = {self.attribute_map[name]: value for name, value in ours.items()}
        ours |= {name: values.pop(name) for name in FIELDS if name in values}
        config = ModelConfig.from_dict(ours)
        version = values.pop("format_version", FORMAT_VERSION)
        check_format_version(version, FORMAT_VERSION, "the configuration")
        use_cache = values.pop("use_cache", True)
        super().__init__(**values)
        self.format_version, self.use_cache = version, use_cache
        for name, value in config.to_dict().items():
            setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: ModelConfig, **values: Any) -> RecurformerConfig:
        """Return the Hugging Face configuration of a `ModelConfig`."""
        return cls(**config.to_dict(), **values)

    def model_config(self) -> ModelConfig:
        """Return the `ModelConfig` of the fields as they stand."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in FIELDS})

    @property
    def num_key_value_heads(self) -> int:
        """G, with its default filled in."""
        return self.model_config().kv_heads

    @property
    def intermediate_size(self) -> int:
        """F, with its default filled in."""
        return self.model_config().mlp_width

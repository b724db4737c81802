"""A `LanguageModel` as a Hugging Face model: a class that holds one and adds no maths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from recurformer.checks import widened
from recurformer.hf.cache import RecurformerCache
from recurformer.hf.config import RecurformerConfig
from recurformer.hf.lora import adapted_weight
from recurformer.loss import IGNORE
from recurformer.model import LanguageModel, Layer
from recurformer.modules import Norm
from recurformer.store.folders import HF_PREFIX, plain_state_dict

BARE = ("embedding", "layers", "norm", "head")  # children of `LanguageModel`
IGNORED = {"tokenizer", "assistant_tokenizer"}  # `generate` passes them on to the model's call
PACKING = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # repeat position_ids
# Name that generation gives to the cache: `past_key_values` until transformers 5.1x, `cache` since.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RecurformerForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of recurrent and standard layers for the Hugging Face ecosystem.

    Attributes:
        model: the `LanguageModel`. Its attribute `scan` selects how recurrent layers are evaluated.
    """

    config_class = RecurformerConfig
    base_model_prefix = HF_PREFIX.removesuffix(".")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _no_split_modules: ClassVar[Any] = ["LanguageModel"]  # on one device

    def __init__(self, config: RecurformerConfig) -> None:
        super().__init__(config)
        self.register_load_state_dict_pre_hook(add_prefix)
        self._hold(LanguageModel(config.model_config()))
        if not self.model.embedding.weight.is_meta:  # drawn above; post_init would draw anew
            for module in self.model.modules():
                module._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        self.post_init()

    @classmethod
    def from_model(cls, model: LanguageModel) -> RecurformerForCausalLM:
        """Return a Hugging Face model around this very model: the two share their parameters."""
        config = RecurformerConfig.from_model_config(model.config, dtype=model.embedding.weight.dtype)
        with torch.device("meta"):
            made = cls(config)
        made._hold(model)
        return made.train(model.training)

    def _hold(self, model: LanguageModel) -> None:
        self.model = model
        self.tied_head = TiedHead(model) if model.config.tie_embeddings else None
        model.read_weights_with(adapted_weight)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether all layers are evaluated again in the backward pass: `LanguageModel.recompute`."""
        return self.model.recompute == "all"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.recompute = "all" if value else "none"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: RecurformerCache | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return the logits, and the loss when there are labels.

        Args:
            input_ids: (B, N) ids.
            attention_mask: (B, N), or with a cache (B, P + N), 0 = padding, anywhere. Positions follow from it.
            past_key_values, cache: two names of one argument, a `RecurformerCache` that is continued in place.
            labels: (B, N) ids, usually `input_ids` themselves: position i is to predict label i + 1. -100 is ignored,
                and so is every label that padding would predict.
            use_cache: None: as the configuration says, but not in training, with labels or with documents.
            logits_to_keep: number of last positions whose logits are returned (0: all), or their indices.
            document_ids: (B, N), packed documents, as `LanguageModel` takes them.
            num_items_in_batch: divisor of the summed loss (gradient accumulation); None: the number of labels.
            return_dict: False returns a tuple; None: as the configuration says.
            output_attentions, output_hidden_states, inputs_embeds: refused.
            cache_position: ignored; a cache knows its length.
            others: `position_ids` and `shift_labels` as below. `generate` also passes arguments of its own, which are
                ignored. Anything else is refused.
                `position_ids` (B, N): positions that start again at 0 separate packed documents.
                `shift_labels` (B, N): the id to predict AT each position; used instead of `labels`.

        Returns:
            CausalLMOutputWithPast: loss, logits (B, kept, V), cache.

        Raises:
            ValueError: for arguments that `LanguageModel` refuses, and for what no layer keeps: embeddings in,
                attentions or hidden states out, a cache of another class.
        """
        core = self.model
        targets = others.pop("shift_labels", None)
        if targets is None and labels is not None:
            targets = shifted(labels, attention_mask)
        call = self._core_call(
            input_ids, attention_mask, past_key_values if cache is None else cache, use_cache, document_ids,
            inputs_embeds=inputs_embeds, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, learning=targets is not None, **others,
        )  # fmt: skip
        loss = None
        if targets is not None:
            out = core(**call.arguments, targets=targets)
            logits, loss = out.logits[:, kept(logits_to_keep)], out.loss
            if num_items_in_batch is not None:
                loss = loss * ((targets != IGNORE).sum() / num_items_in_batch)
        else:
            x = core(**call.arguments, return_logits=False, return_hidden=True).hidden
            logits = core.logits(x[:, kept(logits_to_keep)])
        cached: dict[str, Any] = {CACHE: call.cache}
        made = CausalLMOutputWithPast(loss=loss, logits=logits, **cached)
        return made if (self.config.return_dict if return_dict is None else return_dict) else made.to_tuple()

    def _core_call(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        past: RecurformerCache | None,
        use_cache: bool | None,
        document_ids: Tensor | None,
        *,
        learning: bool,
        **others: Any,
    ) -> CoreCall:
        """Return the arguments of `LanguageModel` for a call of Hugging Face's, or raise ValueError."""
        if input_ids is None or others.pop("inputs_embeds", None) is not None:
            raise ValueError("inputs_embeds are not supported; pass input_ids")
        for name in ("output_attentions", "output_hidden_states"):
            wanted = others.pop(name, None)
            if wanted or (wanted is None and getattr(self.config, name, False)):
                raise ValueError(f"{name} is not available: no layer keeps them; leave it off")
        core = self.model
        if not isinstance(core.embedding, nn.Embedding) and not hasattr(core.embedding, "original_module"):
            raise ValueError("the embedding is wrapped by an adapter, which is not supported; target projections alone")
        if past is not None and not isinstance(past, RecurformerCache):
            raise ValueError(f"the cache is a {type(past).__name__}; pass a recurformer.hf.RecurformerCache")
        positions = others.pop("position_ids", None)
        allowed = IGNORED if positions is None else IGNORED | PACKING
        if document_ids is None and positions is not None:
            document_ids = documents_of(positions, input_ids, attention_mask)
        given = {name for name, value in others.items() if value is not None and value is not False}
        if unknown := sorted(given - allowed):
            raise ValueError(f"this model takes no argument {', '.join(unknown)}; leave it out")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not learning and document_ids is None
        if past is None and use_cache:
            past = RecurformerCache()
        if past is not None and past.kv is None:
            past.kv = core.new_cache(len(input_ids))
        kv = None if past is None else past.kv
        arguments = {"attention_mask": attention_mask, "document_ids": document_ids, "cache": kv}
        return CoreCall({"tokens": input_ids, **arguments}, past)

    # --- the parts, as Hugging Face names them -----------------------------------------------------------------------

    @property
    def base_model(self) -> Backbone:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model below its output layer, called as Hugging Face calls a decoder."""
        return Backbone(self)

    def get_decoder(self) -> Backbone:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer. Where the embedding is it, the result has its weight and no parameter of its own."""
        return self.tied_head if self.config.tie_embeddings else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary to exactly `new_num_tokens`, rounded up to `pad_to_multiple_of`.

        Rows that `vocab_multiple` had added are removed first: they were never trained.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.model.embedding
        V, tied = self.config.vocab_size, self.tied_head
        self.tied_head = None  # Hugging Face would resize it as a layer of its own
        for module in filter(None, (self.get_input_embeddings(), self.get_output_embeddings())):
            assert isinstance(module, nn.Embedding | nn.Linear)
            module.weight = nn.Parameter(module.weight.detach()[:V].clone(), module.weight.requires_grad)
            if isinstance(module, nn.Embedding):
                module.num_embeddings = V
            else:
                module.out_features = V
        made = super().resize_token_embeddings(
            V if new_num_tokens is None else new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        self.tied_head, self.config.vocab_multiple = tied, 1
        config = self.config.model_config()
        for module in self.model.modules():
            if isinstance(module, Layer | LanguageModel):
                module.config = config
        return made

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights that a folder lacks, or that resizing adds. `LanguageModel` draws those of a new model."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.d_model**-0.5)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    # --- generation and folders ------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride] (it differs by version)
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {generation_config.cache_implementation!r}; leave it unset")
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = RecurformerCache()

    def save_pretrained(self, save_directory: Any, *arguments: Any, state_dict: Any = None, **options: Any) -> None:
        """Write a folder as every Hugging Face model does. `recurformer.load` reads it too.

        The weights have the names of this class, so that a reader who calls `load_state_dict` finds each of them.
        """
        if state_dict is None and not getattr(self, "_hf_peft_config_loaded", False):  # else adapters alone are saved
            state_dict = plain_state_dict(self)
        super().save_pretrained(save_directory, *arguments, state_dict=state_dict, **options)


@dataclass(frozen=True)
class CoreCall:
    """A call of `LanguageModel`: its arguments, and the cache that it continues."""

    arguments: dict[str, Any]
    cache: RecurformerCache | None


class TiedHead(nn.Module):
    """The output layer of a model whose embedding is its output layer too: the same weight, no parameter.

    Args:
        core: the model. It does not become a submodule.
    """

    bias = None

    def __init__(self, core: LanguageModel) -> None:
        super().__init__()
        self._core = (core,)

    @property
    def weight(self) -> Tensor:
        return self._core[0].output_weight()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of x (..., D)."""
        return self._core[0].logits(x)


class Backbone:
    """A model below its output layer, called as Hugging Face calls a decoder. Other attributes are `LanguageModel`'s.

    Args:
        owner: the whole model.
    """

    def __init__(self, owner: RecurformerForCausalLM) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner.model, name)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurformerCache | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        return_dict: bool | None = None,
        cache: RecurformerCache | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return the input of the output layer, `last_hidden_state` (B, N, D), and the cache.

        Args: as `RecurformerForCausalLM.forward`.
        """
        owner, past = self._owner, past_key_values if cache is None else cache
        V, rows = owner.model.config.vocab_size, owner.model.config.padded_vocab_size
        if rows != V:
            raise ValueError(
                f"the output layer has {rows} rows for {V} ids, and who reads its weight would count the padding as "
                f"ids; call resize_token_embeddings({V}) first"
            )
        call = owner._core_call(input_ids, attention_mask, past, use_cache, document_ids, learning=False, **others)
        x = owner.model(**call.arguments, return_logits=False, return_hidden=True).hidden
        cached: dict[str, Any] = {CACHE: call.cache}
        made = BaseModelOutputWithPast(last_hidden_state=x, **cached)
        return made if (owner.config.return_dict if return_dict is None else return_dict) else made.to_tuple()


def add_prefix(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Rename weights in place that have the names of the bare model, as folders of `recurformer.save` have."""
    for name in list(state_dict):
        if name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] in BARE:
            state_dict[f"{prefix}{HF_PREFIX}{name.removeprefix(prefix)}"] = state_dict.pop(name)


def documents_of(positions: Tensor, tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Return the documents (B, N) that `position_ids` describe: each begins where positions do not go on by one.

    Returns None for a single document a row. The mask alone decides on the positions of tokens beside padding.

    Raises:
        ValueError: for another shape.
    """
    B, N = tokens.shape
    if positions.dim() != 2 or positions.shape[1] != N or len(positions) not in (1, B):
        raise ValueError(f"position_ids have shape {tuple(positions.shape)}; they must be {(B, N)}")
    begins = (positions.diff(dim=1) != 1).expand(B, -1)
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -N:] != 0
        begins = begins & real[:, 1:] & real[:, :-1]
    return F.pad(begins, (1, 0)).cumsum(1) if begins.any() else None


def shifted(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the token to predict at each position (B, N), given the token of each position."""
    targets = F.pad(widened(labels)[:, 1:], (0, 1), value=IGNORE)
    if attention_mask is None or attention_mask.dim() != 2:  # the model refuses other dimensions
        return targets
    return targets.masked_fill(widened(attention_mask)[:, -labels.shape[1] :] == 0, IGNORE)


def kept(logits_to_keep: int | Tensor) -> Any:
    """Return the positions whose logits are wanted, as an index."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep

"""A `LanguageModel` as a Hugging Face model. It holds one and adds nothing to its maths."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from recurformer.hf.cache import RecurformerCache
from recurformer.hf.config import RecurformerConfig
from recurformer.hf.lora import adapted_weight
from recurformer.loss import IGNORE
from recurformer.model import LanguageModel, Layer
from recurformer.modules import Norm
from recurformer.store.folders import plain_state_dict

PREFIX = "model"
# What generation calls the cache: `past_key_values` until transformers 5.1x, `cache` since.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RecurformerForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of recurrent and standard layers for the Hugging Face ecosystem.

    Attributes:
        model: the `LanguageModel`. `model.scan` says how recurrent layers are evaluated.
    """

    config_class = RecurformerConfig
    base_model_prefix = PREFIX
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _no_split_modules: ClassVar[Any] = ["LanguageModel"]  # on one device

    def __init__(self, config: RecurformerConfig) -> None:
        super().__init__(config)
        self._hold(LanguageModel(config.model_config()))
        if not self.model.embedding.weight.is_meta:  # drawn above; post_init would draw anew
            for module in self.model.modules():
                module._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        self.post_init()

    @classmethod
    def from_model(cls, model: LanguageModel) -> RecurformerForCausalLM:
        """A Hugging Face model around this very model: the two share their parameters."""
        config = RecurformerConfig.from_model_config(model.config, dtype=model.embedding.weight.dtype)
        with torch.device("meta"):
            made = cls(config)
        made._hold(model)
        return made.train(model.training)

    def _hold(self, model: LanguageModel) -> None:
        self.model = model
        model.read_weights_with(adapted_weight)

    @property
    def gradient_checkpointing(self) -> bool:
        """What Hugging Face sets to save memory: `LanguageModel.recompute`."""
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
    ) -> Any:
        """Logits, and the loss when there are labels.

        Args:
            input_ids: (B, N) ids.
            attention_mask: (B, N), or with a cache (B, P + N), 0 = padding, anywhere. Positions follow from it.
            past_key_values, cache: two names of one argument, a `RecurformerCache` that is continued in place.
            labels: (B, N) ids, usually `input_ids` themselves: position i is to predict label i + 1. -100 counts for
                nothing, and neither does what would be predicted from padding.
            use_cache: None: as the configuration says, but not while training, with labels or documents.
            logits_to_keep: number of last positions whose logits are returned (0: all), or their indices.
            document_ids: (B, N), packed documents, as `LanguageModel` takes them.
            num_items_in_batch: the loss is the sum over the labels divided by this (gradient accumulation); None: by
                the number of labels.

        Returns:
            CausalLMOutputWithPast: loss, logits (B, kept, V), cache.

        Raises:
            ValueError: for what `LanguageModel` refuses, and for what it can't give: embeddings in, attentions or
                hidden states out, a cache of another class.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("inputs_embeds are not supported; pass input_ids")
        for name, wanted in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if wanted or (wanted is None and getattr(self.config, name, False)):
                raise ValueError(f"{name} is not available: no layer keeps them; leave it off")
        core = self.model
        if not isinstance(core.embedding, nn.Embedding) and not hasattr(core.embedding, "original_module"):
            raise ValueError("the embedding is wrapped by an adapter, which is not supported; target projections alone")
        past = past_key_values if cache is None else cache
        if past is not None and not isinstance(past, RecurformerCache):
            raise ValueError(f"the cache is a {type(past).__name__}; pass a recurformer.hf.RecurformerCache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and document_ids is None
        if past is None and use_cache:
            past = RecurformerCache()
        if past is not None and past.kv is None:
            past.kv = core.new_cache(len(input_ids))
        kv = None if past is None else past.kv

        loss = None
        if labels is not None:
            targets = shifted(labels, attention_mask)
            out = core(input_ids, targets, attention_mask, document_ids, kv)
            logits, loss = out.logits, out.loss
            if num_items_in_batch is not None:
                loss = loss * ((targets != IGNORE).sum() / num_items_in_batch)
            logits = logits[:, kept(logits_to_keep)]
        else:
            options = {"attention_mask": attention_mask, "document_ids": document_ids, "cache": kv}
            x = core(input_ids, **options, return_logits=False, return_hidden=True).hidden
            logits = core.logits(x[:, kept(logits_to_keep)])
        cached: dict[str, Any] = {CACHE: past}
        made = CausalLMOutputWithPast(loss=loss, logits=logits, **cached)
        return made if (self.config.return_dict if return_dict is None else return_dict) else made.to_tuple()

    # --- embeddings ------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer; None when the embedding is it."""
        return None if self.config.tie_embeddings else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary to exactly `new_num_tokens`, rounded up to `pad_to_multiple_of`.

        Rows that `vocab_multiple` had added go first: they were never trained.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.model.embedding
        V = self.config.vocab_size
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
        self.config.vocab_multiple = 1
        config = self.config.model_config()
        for module in self.model.modules():
            if isinstance(module, Layer | LanguageModel):
                module.config = config
        return made

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights that a folder lacks, or that resizing adds. A new model is drawn by `LanguageModel` itself."""
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
        """As every Hugging Face model; the folder is one that `recurformer.load` reads too."""
        if not getattr(self, "_hf_peft_config_loaded", False):  # adapters alone are saved otherwise
            tensors = plain_state_dict(self) if state_dict is None else state_dict
            state_dict = {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in tensors.items()}
        super().save_pretrained(save_directory, *arguments, state_dict=state_dict, **options)


def shifted(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, N): the token to predict at each position, given the token of each position."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if attention_mask is None or attention_mask.dim() != 2:  # the model refuses the latter
        return targets
    return targets.masked_fill(attention_mask[:, -labels.shape[1] :] == 0, IGNORE)


def kept(logits_to_keep: int | Tensor) -> Any:
    """The positions whose logits are wanted, as an index."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep

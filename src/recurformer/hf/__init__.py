"""The language model as a Hugging Face model. Importing this package registers it with the Auto classes.

Needs the [hf] extra.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("recurformer.hf needs the transformers library; pip install 'recurformer[hf]'") from error

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recurformer.hf.cache import RecurformerCache
from recurformer.hf.config import RecurformerConfig
from recurformer.hf.model import RecurformerForCausalLM
from recurformer.hf.tokenizer import load_tokenizer

transformers.AutoConfig.register(RecurformerConfig.model_type, RecurformerConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(RecurformerConfig, RecurformerForCausalLM, exist_ok=True)
transformers.AutoTokenizer.register(
    RecurformerConfig, fast_tokenizer_class=transformers.PreTrainedTokenizerFast, exist_ok=True
)
# `register` leaves this table alone. Trainer's label smoothing looks a model up in it before shifting the labels, a
# pipeline before taking the model.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(RecurformerConfig.model_type, RecurformerForCausalLM.__name__)

__all__ = ["RecurformerCache", "RecurformerConfig", "RecurformerForCausalLM", "load_tokenizer"]

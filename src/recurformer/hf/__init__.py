"""Our models as Hugging Face models. Importing this registers them with the Auto classes; it needs the [hf] extra."""

try:
    import transformers
except ImportError as error:
    raise ImportError("recurformer.hf needs the transformers library; pip install 'recurformer[hf]'") from error

from recurformer.hf.cache import RecurformerCache
from recurformer.hf.config import RecurformerConfig
from recurformer.hf.model import RecurformerForCausalLM
from recurformer.hf.tokenizer import load_tokenizer

transformers.AutoConfig.register(RecurformerConfig.model_type, RecurformerConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(RecurformerConfig, RecurformerForCausalLM, exist_ok=True)
transformers.AutoTokenizer.register(
    RecurformerConfig, fast_tokenizer_class=transformers.PreTrainedTokenizerFast, exist_ok=True
)

__all__ = ["RecurformerCache", "RecurformerConfig", "RecurformerForCausalLM", "load_tokenizer"]

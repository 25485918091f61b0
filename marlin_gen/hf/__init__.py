"""Models of ``transformers`` on these kernels. Importing this needs transformers (extra ``hf``); it registers
the quantisation method "marlin_gen" there, so that ``AutoModelForCausalLM.from_pretrained`` loads converted folders.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("marlin_gen.hf needs transformers: pip install 'marlin_gen[hf]'") from error

from marlin_gen.hf.config import MarlinGenConfig
from marlin_gen.hf.gguf import from_gguf
from marlin_gen.hf.load import from_pretrained, take_over
from marlin_gen.hf.projections import fuse
from marlin_gen.hf.quantizer import MarlinGenQuantizer
from marlin_gen.hf.tokenizer import tokenizer_from_gguf

__all__ = [
    "MarlinGenConfig", "MarlinGenQuantizer", "from_gguf", "from_pretrained", "fuse", "take_over", "tokenizer_from_gguf",
]  # fmt: skip

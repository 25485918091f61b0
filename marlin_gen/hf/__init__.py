"""Models of ``transformers`` on these kernels. Importing this needs transformers (extra ``hf``); it registers
the quantisation method "marlin_gen" there, so that ``AutoModelForCausalLM.from_pretrained`` loads converted folders.
"""

from marlin_gen.hf.config import MarlinGenConfig
from marlin_gen.hf.gguf import from_gguf
from marlin_gen.hf.load import from_pretrained, take_over
from marlin_gen.hf.quantizer import MarlinGenQuantizer

__all__ = ["MarlinGenConfig", "MarlinGenQuantizer", "from_gguf", "from_pretrained", "take_over"]

"""Text to ids and back: tokenizers, chat templates, incremental detokenisation, stop strings. Imports neither torch nor transformers."""

from presage.tokenize.chat import ChatTemplate
from presage.tokenize.detokenize import Detokenizer
from presage.tokenize.stop_strings import StopStrings
from presage.tokenize.stops import StopChecker
from presage.tokenize.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopChecker", "StopStrings", "Tokenizer"]

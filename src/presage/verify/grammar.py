"""Structured output: constraints to masks. ``grammar_spec`` alone needs no grammar engine and checks requests in the HTTP front."""

from __future__ import annotations

from presage.verify.grammar_compile import GrammarCompiler, tokenizer_info
from presage.verify.grammar_masks import Late, Masker
from presage.verify.grammar_spec import GrammarSpec, spec_of

__all__ = ["GrammarCompiler", "GrammarSpec", "Late", "Masker", "spec_of", "tokenizer_info"]

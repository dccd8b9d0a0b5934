"""The prompt field of completions and the input field of embeddings: text, texts, ids or lists of ids."""

from __future__ import annotations

from collections.abc import Sequence

from presage.core.errors import RequestError
from presage.serve.front import Front
from presage.serve.requests import check_prompt_ids

Prompt = str | list[int] | list[str] | list[list[int]]


async def encode_prompts(front: Front, prompt: Prompt, special: bool, param: str) -> list[list[int]]:
    """Ids of each prompt. Errors: RequestError for empty, too many or out-of-range ones."""
    items = _items(prompt)
    limit = front.config.max_prompts
    if not items or len(items) > limit:
        raise RequestError(f"{param} needs 1 to {limit} entries, got {len(items)}", param=param)
    texts = [t for t in items if isinstance(t, str)]
    tokenizer = front.client.tokenizer
    encoded = iter(await front.off_loop(sum(map(len, texts)), lambda: [tokenizer.encode(t, add_special_tokens=special) for t in texts]))
    out = [next(encoded) if isinstance(item, str) else list(item) for item in items]
    for ids in out:
        check_prompt_ids(ids, front.client.vocab_size, param)
    return out


def _items(prompt: Prompt) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[i for i in prompt if isinstance(i, int)]]
    return [p for p in prompt if not isinstance(p, int)]

"""Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, later ``[TOOL_CALLS]name[ARGS]{...}`` once per call."""

from __future__ import annotations

import re
import secrets
import string

from presage.serve.tools.array import ArrayParser
from presage.serve.tools.base import partial
from presage.serve.tools.scan import ValueScanner

MARK = "[TOOL_CALLS]"
_HEAD = re.compile(r"\s*([A-Za-z0-9_.\-]{1,128})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*")


class MistralParser(ArrayParser):
    """Needs special tokens as text, because the marker is one. Ids have the nine letters Mistral's templates insist on."""

    special_tokens = True

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        super().__init__(names)
        self.value = ValueScanner()

    def make_id(self) -> str:
        """Nine letters and digits."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def start(self) -> bool:
        """State: content until the marker."""
        before, mark, after = self.buf.partition(MARK)
        cut = len(before) if mark else len(self.buf) - partial(self.buf, MARK)
        self.content(self.buf[:cut])
        self.buf = after if mark else self.buf[cut:]
        if mark:
            self.opened, self.state = MARK, self.marked
        return bool(mark)

    def marked(self) -> bool:
        """State: after the marker, either an array or a name."""
        if not self.skip_space():
            return False
        if self.buf[0] == "[":
            return self.array(MARK)
        head, brace, rest = self.buf.partition("{")
        # Without a brace yet, up to 256 characters may still be a name.
        found = _HEAD.fullmatch(head)
        if not brace and len(head) <= 256:
            return False
        self.opened = ""
        if not brace or found is None:
            self.content(MARK)
            self.state = self.start
            return True
        self.begin(found[1])
        self.buf, self.value, self.state = brace + rest, ValueScanner(), self.raw_arguments
        return True

    def raw_arguments(self) -> bool:
        """State: the arguments object of the newer format."""
        end = self.value.feed(self.buf)
        self.arguments(self.buf[:end])
        self.buf = self.buf[end:]
        if self.value.done:
            self.state = self.start
        return self.value.done

    def outside(self) -> bool:
        """State: content again, and perhaps another marker."""
        self.state = self.start
        return True

"""What crosses between front and engine: msgpack frames [tag, body]. Arrays travel as raw int32."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from presage.core.request import Emission, Request


def _enc(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value, np.int32).tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot cross to another process")


def _dec(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return np.frombuffer(value, np.int32)
    raise TypeError(f"{kind.__name__} cannot come from another process")


_encoder = msgspec.msgpack.Encoder(enc_hook=_enc)
_frames = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_request = msgspec.msgpack.Decoder(Request, dec_hook=_dec)
_emissions = msgspec.msgpack.Decoder(list[Emission])
_any = msgspec.msgpack.Decoder()


def pack(tag: str, body: Any) -> bytes:
    """One frame."""
    return _encoder.encode((tag, body))


def unpack(frame: bytes) -> tuple[str, Any]:
    """(tag, body): ``add`` carries a Request, ``out`` a list of Emissions, everything else plain data."""
    tag, raw = _frames.decode(frame)
    if tag == "add":
        return tag, _request.decode(raw)
    if tag == "out":
        return tag, _emissions.decode(raw)
    return tag, _any.decode(raw)

"""Images and recordings as rows: a data URL (RFC 2397) stands where a text would, so that all that holds for texts
(who may see them, what is held out, what a digest covers) holds for them too."""

from __future__ import annotations

import base64
import binascii
import io
import re
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fanbu.errors import DataError, needs_extra

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
MAX_SAMPLES = 2**24
_URL = re.compile(r"data:(image/(?:png|jpeg|webp|bmp|gif)|audio/wav);base64,([A-Za-z0-9+/]*={0,2})")
_BEGINS = {
    b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"BM": "image/bmp", b"GIF8": "image/gif",
}  # fmt: skip


def is_media(text: str) -> bool:
    """Whether a row is an image or a recording and no text."""
    return text.startswith(("data:image/", "data:audio/"))


def media_row(value: Any, kind: str, folder: Path, where: str) -> str:
    """The data URL of one row's image or recording: bytes, a file beside the data file, or a data URL already.

    ``value`` may also be what ``datasets`` and its Parquet files give: a mapping with ``bytes`` or ``path``. Raises
    DataError where it is missing, too large, of another kind, or broken.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        found = value
    elif isinstance(value, str) and value:
        found = _from_bytes(_file(folder, value, where), where)
    elif isinstance(value, bytes) and value:
        found = _from_bytes(value, where)
    else:
        raise DataError(
            "media-broken", f"{where} has no {kind}", allowed="a file name, bytes, or a data URL", got=type(value),
            remedy=f"name the right column under `columns: {{{kind}: ...}}`, or remove the row",
        )  # fmt: skip
    if not found.startswith(f"data:{kind}/"):
        raise DataError(
            "media-broken", f"{where} holds no {kind}", allowed=f"{kind}/...", got=found[:24], remedy="check `task`"
        )
    try:
        (pixels if kind == "image" else samples)(found)
    except DataError as error:
        raise _broken(f"{where}: {error.what}", str(error.allowed)) from None
    return found


def data_url(content: bytes, mime: str) -> str:
    """The bytes as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _file(folder: Path, name: str, where: str) -> bytes:
    path = (folder / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise DataError(
            "media-broken", f"{where} names a file that is not there", allowed=f"a path inside {folder}", got=name,
            remedy="put the files beside the data file, and name them from there",
        )  # fmt: skip
    with path.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _from_bytes(content: bytes, where: str) -> str:
    if len(content) > MAX_BYTES:
        raise _broken(f"{where} is too large", f"{MAX_BYTES} bytes")
    if content[:4] == b"RIFF" and content[8:12] in {b"WAVE", b"WEBP"}:
        mime = "audio/wav" if content[8:12] == b"WAVE" else "image/webp"
    else:
        mime = next((m for begin, m in _BEGINS.items() if content.startswith(begin)), "")
    if not mime:
        raise _broken(f"{where} is in no known format", "PNG, JPEG, WebP, BMP, GIF; WAV")
    return data_url(content, mime)


def _broken(what: str, allowed: str) -> DataError:
    return DataError("media-broken", what, allowed=allowed, remedy="convert or repair the file, or remove the row")


def content_of(url: str) -> bytes:
    """The bytes of a data URL."""
    match = _URL.fullmatch(url)
    if match is None or len(match[2]) > MAX_BYTES * 4 // 3 + 4:
        raise _broken("no data URL that is known here", f"data:TYPE;base64,..., at most {MAX_BYTES} bytes")
    try:
        return base64.b64decode(match[2], validate=True)
    except binascii.Error:
        raise _broken("a data URL whose base64 is broken", "base64") from None


def pixels(url: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[height, width, 3] in RGB; of a moving image the first one."""
    with needs_extra("media"):
        from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(io.BytesIO(content_of(url)), formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _broken(f"an image of {image.width} x {image.height}", f"{MAX_PIXELS} pixels")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _broken(f"an image that cannot be read: {error}", "PNG, JPEG, WebP, BMP, GIF") from None


def samples(url: str) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """Samples in [-1, 1], the mean of all channels, and how many there are a second."""
    try:
        with wave.open(io.BytesIO(content_of(url))) as sound:
            channels, width, rate, count, *_ = sound.getparams()
            if count * channels > MAX_SAMPLES or not 1 <= width <= 4 or not 1000 <= rate <= 384_000:
                raise _broken(f"a recording of {count} samples at {rate} Hz", f"at most {MAX_SAMPLES}, PCM")
            raw = np.frombuffer(sound.readframes(count), np.uint8)
    except (wave.Error, EOFError, OSError, ValueError, ZeroDivisionError) as error:
        raise _broken(f"a recording that cannot be read: {error}", "WAV in PCM") from None
    if len(raw) < width * channels:
        raise _broken("a recording without samples", "one sample or more")
    raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, channels, width)
    if width == 1:  # the only width without a sign
        x = raw[..., 0].astype(np.float32) / 128 - 1
    else:
        whole = np.zeros((*raw.shape[:2], 4), np.uint8)
        whole[..., 4 - width :] = raw
        x = whole.view("<i4")[..., 0].astype(np.float32) / 2**31
    return x.mean(1), rate


def described(text: str, most: int) -> str:
    """A text cut to ``most`` letters; an image or recording by what it is."""
    if not is_media(text):
        return text[:most]
    return f"({text[5:].partition(';')[0]}, {len(content_of(text)):,} bytes)"

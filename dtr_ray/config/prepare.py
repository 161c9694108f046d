"""PrepareConfig: how a data set, wherever it comes from, becomes shards that all trials share."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dtr_ray.config.base import Config, Positive, PositiveFloat, Text
from dtr_ray.config.data import DataConfig
from dtr_ray.config.errors import broken
from dtr_ray.config.evaluation import Features


class FolderSource(Config):
    """A folder of images."""

    type: Literal["folder"]
    path: Text
    """A subfolder a class where there are classes; captions in `NAME.txt` beside each image."""


class ArchiveSource(Config):
    """One zip or tar file with images, laid out as a folder would be."""

    type: Literal["archive"]
    path: Text
    """.zip, .tar, .tar.gz or .tgz; classes from its folders, or from `dataset.json` (StyleGAN's, EDM's)."""


class WebDatasetSource(Config):
    """webdataset's tar shards: `KEY.jpg`, `KEY.cls`, `KEY.txt` one after another."""

    type: Literal["webdataset"]
    path: Text
    """A folder of .tar files, or a pattern such as `data/train-*.tar`."""


class HuggingFaceSource(Config):
    """A folder of the library `datasets` (`save_to_disk`), or one of parquet files."""

    type: Literal["huggingface"]
    path: Text
    split: Text = "train"
    image_column: Text = "image"
    label_column: Text | None = None
    caption_column: Text | None = None
    """Holds a caption, or a list of them."""


class ImageNetSource(Config):
    """ImageNet (ILSVRC 2012): a folder a synset, or the archive `ILSVRC2012_img_train.tar`."""

    type: Literal["imagenet"]
    path: Text
    """The folder of synset folders (`n01440764/...`), or the archive. Classes in the synsets' order."""


class CocoSource(Config):
    """MS-COCO with its captions."""

    type: Literal["coco"]
    path: Text
    """Folder of the images, such as `coco/train2014`."""
    annotations: Text
    """The captions' file, such as `coco/annotations/captions_train2014.json`."""


class TorchvisionSource(Config):
    """One of torchvision's data sets, where it has been downloaded."""

    type: Literal["torchvision"]
    dataset: Literal["CIFAR10", "CIFAR100", "FashionMNIST", "Flowers102", "MNIST", "STL10", "SVHN"]
    path: Text
    """torchvision's `root`."""
    split: Text = "train"
    """`train` or `test`; what the data set knows."""


SourceConfig = Annotated[
    FolderSource
    | ArchiveSource
    | WebDatasetSource
    | HuggingFaceSource
    | ImageNetSource
    | CocoSource
    | TorchvisionSource,
    Field(discriminator="type"),
]


class PrepareConfig(Config):
    """A data set to prepare, whole, as a DATA.yaml holds it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the data set: its folder below `output`."""
    source: SourceConfig
    resolution: Positive = 256
    """Height and width in pixels, after centre crop and resize as ADM does both."""
    num_classes: Positive | None = None
    """1 leaves the source's classes out; default: as many as the source has."""
    vae: Text | None = None
    """diffusers `AutoencoderKL` whose latents are kept; hub id or folder. Without: pixels."""
    latent_scale: PositiveFloat = 0.18215
    """Factor from raw to scaled latents."""
    latent_dtype: Literal["float32", "float16"] = "float32"
    """`float16` halves the disk; the posterior's mean is then rounded to 3 digits."""
    flip: bool = True
    """Keep the latents of mirrored images too, so that trials can flip."""
    keep_pixels: bool | None = None
    """Keep decoded pixels; default: without a VAE."""
    text_encoder: Text | None = None
    """CLIP text model that encodes the captions, once; hub id or folder."""
    text_channels: Positive = 768
    features: list[Features] = ["inception"]
    """Extractors whose reference statistics are made."""
    feature_weights: Text | None = None
    """A local file with clean-fid's Inception weights; default: downloaded, once a node."""
    max_corrupt: Annotated[int, Field(ge=0)] = 100
    """Images that cannot be read are named and left out; more than this many stop the work."""
    shard_images: Positive = 2048
    """Images a shard: what is made again after a kill, at most, by each worker."""
    num_workers: Positive | None = None
    """Workers, over all nodes; default: one a GPU, or one a CPU core where there is no GPU."""
    output: Text = "prepared"
    """Folder that holds the data set's folder; on a cluster, one that every node sees."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vae is None and self.keep_pixels is False:
            raise broken("keep_pixels", "is false without a VAE: nothing would be kept", "vae")
        if self.vae is not None and self.resolution % 8:
            raise broken("resolution", f"with a VAE is a multiple of 8; got {self.resolution}", "vae")
        if self.text_encoder is not None and self.num_classes not in (None, 1):
            rule = f"must be left out (or 1) with captions; got {self.num_classes}"
            raise broken("num_classes", rule, "text_encoder")
        return self

    @property
    def keeps_pixels(self) -> bool:
        """Whether decoded pixels are kept, the default resolved."""
        return self.vae is None if self.keep_pixels is None else self.keep_pixels

    def data(self, path: str, num_classes: int) -> DataConfig:
        """The `data` section of trials that use the prepared folder `path`."""
        return DataConfig(
            name="prepared",
            path=path,
            resolution=self.resolution,
            num_classes=None if self.text_encoder is not None else num_classes,
            vae=self.vae,
            latent_scale=self.latent_scale,
            text_encoder=self.text_encoder,
            text_channels=self.text_channels,
        )

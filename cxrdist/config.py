"""Every option of every command. A recipe is a YAML file of the fields of `TrainConfig`."""

from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from cxrdist.documents import Between, Inside
from cxrdist.errors import CxrdistError, choices

PositiveInt = Annotated[int, Between(1)]
NonNegativeInt = Annotated[int, Between(0)]
PositiveFloat = Annotated[float, Inside(0)]
NonNegativeFloat = Annotated[float, Between(0)]
OpenUnitInterval = Annotated[float, Inside(0, 1)]
ClosedUnitInterval = Annotated[float, Between(0, 1)]
Depth = Annotated[int, Between(8, 16)]
Split = Literal["train", "val", "test"]
Fit = Literal["crop", "pad", "stretch"]
CoverHow = Literal["black", "fill"]
CoverSplit = Literal["all", "train", "val", "test"]

# The largest published: growth rate 48 (DenseNet161), a block of 64 layers (DenseNet264); Huang et
# al. 2016, Table 1.
MOST_GROWTH_RATE = 128
MOST_DENSE_LAYERS = 128
DenseLayers = Annotated[int, Between(1, MOST_DENSE_LAYERS)]

# Metadata of fields. In a command that can resume, every field decides the result, except those
# with one of the first two.
SAME_RESULT = {"decides": False}  # where the result goes, how fast, or what is written beside it
BY_CONTENT = {"decides": False}  # what it stands for is compared instead: a hash or resolved names
NEWER = {"newer": True}  # older documents lack the field and mean its default
SQUARES = {"squares": True}  # it also decides the decoded squares, not only how they are packed


def deciding(config: Any) -> dict[str, Any]:
    """Return the fields of a config that decide the result of its command, groups as dicts.

    A command may resume, or keep the files of an earlier one, if these are equal. It compares the
    content behind the `BY_CONTENT` fields itself.
    """
    values = asdict(config)
    return {f.name: values[f.name] for f in fields(config) if f.metadata.get("decides", True)}


def deciding_squares(config: "PackConfig") -> dict[str, Any]:
    """Return the fields that decide the decoded squares of a pack; it resumes where they are equal.

    Which images, boxes and masks there are is compared by content.
    """
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata.get("squares")}


def location(text: str) -> Path:
    """Return a Path, or a UPath for an fsspec URL such as s3://bucket/folder.

    Raises:
        CxrdistError: the text is neither, or names an archive that cannot be opened.
    """
    if "://" not in text:
        try:
            return Path(text).expanduser()  # shells do not expand the ~ in --out=~/shards
        except RuntimeError as error:  # of expanduser: ~NAME of an unknown user
            raise CxrdistError(f"{text}: {error}; write the directory out") from error
    from tarfile import TarError
    from zipfile import BadZipFile

    from upath import UPath

    # ImportError: a protocol that needs another package. TypeError: one that needs more than a URL.
    # The rest are of an archive that is missing or damaged, as in zip://FOLDER::ARCHIVE.
    wrong = (ValueError, ImportError, TypeError, OSError, BadZipFile, TarError)
    try:
        url = UPath(text)
        url.path  # noqa: B018 - what is wrong with a host shows only now
        url.fs  # noqa: B018 - opens an archive; a store is connected to when it is first read
        return cast(Path, url)  # not a subclass of Path, but it has the same methods
    except wrong as error:
        raise CxrdistError(f"{text}: {error}; expected a path or an fsspec URL") from error


SourceName = Literal[
    "folder",
    "csv",
    "several",
    "chestxray14",
    "chexpert",
    "covid19-radiography",
    "covidx",
    "mimic-cxr",
    "padchest",
    "rsna-pneumonia",
    "vindr-cxr",
]


@dataclass(frozen=True)
class SourceConfig:
    """The images to read, and how to read them."""

    source: SourceName
    """folder: one sub-folder per class, also within train/ val/ test/ or with these below it. csv:
    a table with the column path, and label (one class per image), or labels (several, with |
    between them, or none; perhaps uncertain and missing beside it), or a column for each label (1,
    0, nothing, or -1 or U for uncertain); optionally patient, split, source, view, sex and age;
    paths are relative to the table. several: a YAML file that names several sources, which are
    packed together. The others are public data sets, as they are unpacked."""
    input: Path = field(metadata=SQUARES)
    """The folder, or the CSV or YAML file; a path or an fsspec URL such as s3://bucket/folder."""
    # A subclass may add fields without a default, such as `out`, behind those that have one.
    _: KW_ONLY
    patient_pattern: str | None = None
    """Regular expression whose first group, found in the file name, is the patient."""
    against_rest: str | None = None
    """chestxray14: this label against all other images, instead of the 14 labels."""
    drop_unusable: bool = False
    """covid19-radiography, first release: leave out what COVID-Net lists as unusable."""
    allow_outside: bool = False
    """csv: read images also where the table's paths lead out of its folder (../ or /)."""
    views: str | None = None
    """Views to pack, with commas between them: PA, AP, FRONTAL (one of the two), LATERAL, OTHER,
    UNKNOWN; or all. If not given: PA, AP, FRONTAL and UNKNOWN. Images of other views are listed in
    rejected.csv. The view comes from a table, else from a DICOM tag, else from the file's name."""
    label_map: Path | None = None
    """A YAML file of the source's labels and those to pack in their place; several may become one,
    null leaves a label out (and with one class per image, its images). Labels that it does not name
    stay as they are."""
    empty_cells: Literal["ignore", "negative"] = "ignore"
    """Meaning of an empty cell of a label: ignore (unknown: no loss and no score), or negative. The
    shards record which negatives were empty cells."""
    masks: Path | None = None
    """Masks of the lungs: a folder with masks under their images' names (or in masks/ in place of
    images/, as the COVID-19 Radiography Database has them), or a table of run lengths as CheXmask
    has them; a path or an fsspec URL. Each goes into the shard beside its image."""


@dataclass(frozen=True)
class PackConfig(SourceConfig):
    """Pack raw chest X-rays into WebDataset shards, split by patient."""

    out: Path = field(metadata=SAME_RESULT)
    """The directory of shards to make, a path or an fsspec URL; it must not exist yet."""
    size: PositiveInt = field(default=224, metadata=SQUARES)
    """Side of the packed squares, in pixels."""
    fit: Fit = field(default="crop", metadata=SQUARES)
    """How an image becomes square. pad and stretch reveal the source of an image by the shape of
    its border or the width of the heart; crop (centre) does not."""
    depth: Depth | None = None
    """Bit depth of images of more than 8 bits that do not declare theirs, 8 to 16; 12 makes 4095
    white. If not given: the smallest of 8, 10, 12, 14 and 16 that holds the values of the whole
    source, except for one pixel in a thousand per image."""
    split: str | None = None
    """Fractions of train/val/test, by patient; 0 leaves a split empty: 0/0/1 packs a set for
    evaluation only. Or paper: 60 images of each class for test, the rest 80/20 train/val. Splits
    that the source fixes (a csv column `split`, ChestX-ray14's official lists) take precedence;
    with several sources, only those without splits are split here. 0.7/0.1/0.2 if not given."""
    duplicates: Literal["join", "drop", "report"] = "join"
    """Images that are the same: join their patients before splitting, drop all but one (all where
    their labels differ), or only report them."""
    anonymise: bool | None = field(default=None, metadata=SQUARES)
    """Replace the names of images, patients and sources by meaningless ones; OUT.names.csv, which
    stays with the owner, maps them back. If not given: true for a source with DICOM files."""
    expect: dict[str, NonNegativeInt] = field(default_factory=dict, metadata=SAME_RESULT)
    """Expected images per class, after --label-map and --views; mismatches are reported. For
    recipes of public data sets."""
    seed: NonNegativeInt = 0
    """Seed of the splits and of the order inside the shards."""
    shard_size: PositiveInt = 1000
    """Samples per shard."""
    workers: PositiveInt | None = field(default=None, metadata=SAME_RESULT)
    """Processes that decode; one per core if not given. The shards do not depend on it."""
    skip_bad: bool = field(default=False, metadata=SAME_RESULT)
    """List unreadable images in rejected.csv instead of stopping."""
    text_boxes: Path | None = field(default=None, metadata=BY_CONTENT)
    """Cover burned-in text in the boxes of this CSV, which cxrdist find-text makes."""
    cover: CoverHow = field(default="black", metadata=SQUARES)
    """How to cover the text: with black rectangles (paper, section 2.2), or filled smoothly from
    the surroundings. A network may learn a black rectangle as a proxy for the word; cxrdist
    probe-text measures both."""
    cover_split: CoverSplit = "all"
    """Split in which to cover the text; the paper covered the test images only."""
    lungs_only: bool = field(default=False, metadata=BY_CONTENT)
    """Black out everything outside --masks, and leave out images without a mask: shards to compare
    with a network that sees nothing but the lungs."""
    task: NonNegativeInt | None = field(default=None, metadata=SAME_RESULT)
    """Decode only this share of the images, 0 to --num-tasks - 1: one task of a SLURM array."""
    num_tasks: PositiveInt | None = field(default=None, metadata=SAME_RESULT)
    """Number of tasks among which the images are divided."""
    merge: bool = field(default=False, metadata=SAME_RESULT)
    """Make shards from the images that the tasks have decoded."""


@dataclass(frozen=True)
class FindTextConfig:
    """Find burned-in text and markers, and write them to a CSV that a person can edit."""

    source: SourceName
    """As in cxrdist pack."""
    input: Path
    """As in cxrdist pack."""
    out: Path
    """The CSV to write: path (relative to the source), x, y, width, height (in px of the original
    as displayed), text, score."""
    allow_outside: bool = False
    """As in cxrdist pack."""
    workers: PositiveInt | None = None
    """Processes that search; one per core if not given."""


@dataclass(frozen=True)
class CheckConfig:
    """Check that shards match their index."""

    shards: Path
    """Directory of shards, a path or an fsspec URL."""
    audit: bool = False
    """Also look for duplicates, shared patients and shortcuts; writes SHARDS/audit.json."""


@dataclass(frozen=True)
class Augmentation:
    """The random affine warp; the default ranges are the paper's (section 2.3)."""

    degrees: Annotated[float, Between(0, 180)] = 40.0
    """Rotation, drawn from -degrees to degrees."""
    shift_x: ClosedUnitInterval = 40 / 224
    """Shift to the left or right, at most this fraction of the width (40 of 224 px)."""
    shift_y: ClosedUnitInterval = 28 / 224
    """Shift up or down, at most this fraction of the height (28 of 224 px)."""
    flip: bool = True
    """Mirror every second copy of an image; one without a partner is mirrored by chance."""
    draws: Literal["free", "crossed"] = "free"
    """free: each copy of an image has a rotation and a shift of its own. crossed: 2 x k x k copies
    are k rotations, each with the same k shifts, each plain and mirrored (paper, section 2.3: 8
    copies are 2 x 2 x 2, 72 are 2 x 6 x 6); without flip k x k copies."""


@dataclass(frozen=True)
class Background:
    """A loss term that keeps the network from using the background of the lungs."""

    weight: PositiveFloat
    """Weight of this term; the mean cross-entropy per label has the weight 1."""
    region: str = "thorax"
    """What counts as background, with commas between several: masks (outside the masks of the
    lungs, where an image has one), text (inside the boxes of --text-boxes), border (the outer tenth
    of the image), thorax (outside a fixed ellipse around the thorax)."""
    method: Literal["lrp", "gradient"] = "lrp"
    """lrp: the share of the logits' relevance in the background (ISNet, Bassi et al. 2024), and the
    share of their gradient, which also shows inhibition; training steps alternate between the two,
    validation uses their mean; DenseNets only. gradient: the squared gradient of the
    log-probabilities in the background (Ross et al. 2017)."""


@dataclass(frozen=True)
class Stage:
    """One stage of training; the blocks that `lr` does not name are frozen."""

    lr: dict[str, PositiveFloat]
    """Learning rate of each block that is trained. Blocks of a DenseNet: stem, denseblock1 to
    denseblock4, head; cxrdist/model/networks.py lists those of other networks. `all` stands for all
    blocks that are not named."""
    epochs: PositiveInt
    """Passes over the training images, at most."""
    patience: PositiveInt
    """Epochs without a better validation loss before the stage ends early."""
    block_decay: Annotated[float, Inside(0), Between(most=1)] = 1.0
    """The rate of `all` is multiplied by this from each block to the one before it, from the head
    to the stem (Howard & Ruder 2018, section 3.2: 1/2.6)."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty (SGD), decoupled decay (AdamW)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the rates fall to 0 over the stage's epochs, along half a cosine."""
    warmup_epochs: NonNegativeInt = 0
    """Epochs in which the rates rise linearly from near 0."""
    background: Background | None = None
    """Loss term that keeps the network from using the background; none if not given."""


Architecture = Literal[
    "densenet121",
    "densenet169",
    "densenet201",
    "resnet18",
    "alexnet",
    "squeezenet1_1",
    "convnext_atto",
]
# Growth rate and layers of each block (Huang et al. 2016, Table 1).
DENSENETS = {
    "densenet121": (32, (6, 12, 24, 16)),
    "densenet169": (32, (6, 12, 32, 32)),
    "densenet201": (32, (6, 12, 48, 32)),
}
TITLES = {
    "densenet121": "DenseNet121",
    "densenet169": "DenseNet169",
    "densenet201": "DenseNet201",
    "resnet18": "ResNet18",
    "alexnet": "AlexNet",
    "squeezenet1_1": "SqueezeNet 1.1",
    "convnext_atto": "ConvNeXt-Atto",
}


@dataclass(frozen=True)
class Network:
    """The network; the default is DenseNet121."""

    architecture: Architecture = field(default="densenet121", kw_only=True, metadata=NEWER)
    """densenet121, densenet169 or densenet201 (Huang et al. 2016), resnet18 (He et al. 2015),
    alexnet (Krizhevsky 2014), squeezenet1_1 (Iandola et al. 2016), or convnext_atto (timm, after
    Liu et al. 2022). cxrdist/model/networks.py has a table of their blocks."""
    growth_rate: Annotated[int, Between(1, MOST_GROWTH_RATE)] | None = None
    """DenseNets only: channels that each dense layer adds; the first convolution has twice as many.
    If not given: the published 32."""
    block_config: tuple[DenseLayers, DenseLayers, DenseLayers, DenseLayers] | None = None
    """DenseNets only: dense layers of each block. If not given: as published."""
    dropout: Annotated[float, Between(0), Inside(most=1)] = 0.5
    """Dropout probability before the output layer (paper, section 3.2); in alexnet before each of
    its two hidden layers."""

    def __post_init__(self) -> None:
        """Raise CxrdistError for an unknown network, or one much larger than the published ones."""
        # The annotations are checked for options and documents only: model/layout also derives a
        # network from the tensors of a stranger's checkpoint.
        if self.architecture not in get_args(Architecture):
            known = choices(str(self.architecture), get_args(Architecture))
            raise CxrdistError(f"architecture: is {self.architecture!r:.40}, {known}")
        for name in ("growth_rate", "block_config"):
            if not self.is_densenet and getattr(self, name) is not None:
                raise CxrdistError(
                    f"{name}: is for DenseNets, and architecture is {self.architecture}; "
                    "leave it out"
                )
        bounds = [("growth_rate", self.growth_rate, MOST_GROWTH_RATE)]
        bounds += [("block_config", n, MOST_DENSE_LAYERS) for n in self.block_config or ()]
        for name, value, most in bounds:
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise CxrdistError(f"{name}: has {value!r:.40}, expected 1 to {most}")

    @property
    def is_densenet(self) -> bool:
        """Return whether it is a DenseNet, of a published or another shape."""
        return self.architecture in DENSENETS

    @property
    def has_batch_norm(self) -> bool:
        """Return whether it has BatchNorms, as DenseNets and resnet18 do."""
        return self.is_densenet or self.architecture == "resnet18"

    @property
    def dense_shape(self) -> tuple[int, tuple[int, ...]]:
        """Return the growth rate and the layers of each block; raise KeyError if not a DenseNet."""
        growth_rate, block_config = DENSENETS[self.architecture]
        return (
            growth_rate if self.growth_rate is None else self.growth_rate,
            block_config if self.block_config is None else tuple(self.block_config),
        )

    @property
    def title(self) -> str:
        """Return the display name of the architecture; for an unpublished DenseNet, its shape."""
        if self.is_densenet and self.dense_shape != DENSENETS[self.architecture]:
            growth_rate, layers = self.dense_shape
            return (
                f"DenseNet with blocks of {'-'.join(map(str, layers))} layers and growth rate "
                f"{growth_rate}"
            )
        return TITLES[self.architecture]


@dataclass(frozen=True)
class TrainConfig:
    """Train a network in stages; the same command with the same run directory resumes."""

    shards: Path = field(metadata=BY_CONTENT)
    """Directory of shards, a path or an fsspec URL."""
    run: Path = field(metadata=SAME_RESULT)
    """Run directory."""
    stages: dict[str, Stage]
    """Stages by name, in order. Each starts from the best weights of the one before."""
    init: str = "imagenet"
    """chexnet (densenet121 only) or imagenet (downloaded), none (random), a checkpoint file
    (safetensors or torch.save), its URL (#sha256=DIGITS at its end is checked), or a run
    directory."""
    copies: dict[str, PositiveInt] = field(default_factory=dict)
    """Augmented copies of each image per epoch, by class; 1 for classes that are not named."""
    balance: Literal["none", "classes"] = field(default="none", metadata=NEWER)
    """classes: choose copies so that each class has about as many images per epoch as the most
    frequent class of the training split; whole numbers, at most 50, in place of `copies`. No copies
    for multi-label data, where copies for one label would also multiply the others."""
    uncertain: str = field(default="ignore", metadata=NEWER)
    """How uncertain labels are trained: ignore (no loss), positive (U-Ones of Irvin et al. 2019) or
    negative (U-Zeros); exceptions for single labels follow it, as in positive,Edema=negative.
    Uncertain labels are never scored."""
    global_batch_size: PositiveInt = 9
    """Images per optimiser step over all ranks; 9 in the paper (section 3.3)."""
    max_images_per_rank: PositiveInt | None = None
    """Images per forward pass on a rank; a larger slice is split into equal micro-batches, and
    trained BatchNorm sees one micro-batch of each rank at a time."""
    batch_norm: Literal["synchronised", "per_rank"] = "synchronised"
    """synchronised: where a stage trains BatchNorm, its statistics are those of all ranks, and the
    trained network does not depend on the number of ranks. per_rank: no communication in the
    layers, but the gradient is not that of the whole batch, and more ranks often train a worse
    network."""
    frozen_batch_norm: Literal["kept", "moving"] = field(default="kept", metadata=NEWER)
    """BatchNorm of frozen blocks in training. kept: it normalises by its running statistics, which
    do not change. moving: PyTorch's default: it normalises by the images of the step and updates
    its running statistics; only the parameters are frozen."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Ranges of the random warp."""
    network: Network = field(default_factory=Network)
    """Architecture and its shape."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has momentum 0.9 (paper, section 3.3)."""
    max_gradient_norm: PositiveFloat | None = None
    """Clip the gradient of all parameters together to this norm; no clipping if not given."""
    average: OpenUnitInterval | None = None
    """Decay per step of an exponential moving average of the weights, such as 0.999; in the first
    steps of a stage at most (1 + t) / (10 + t) after t steps. The average is validated and
    published; the weights themselves if not given."""
    compile: bool = False
    """Compile warp, network and loss into one graph; on one GPU, with small batches, capture the
    whole step as a CUDA graph. Worth it on a GPU only, if at all: not measured yet."""
    seed: NonNegativeInt = 0
    """Seed of the new layers, the plan and the dropout."""
    text_boxes: Path | None = field(default=None, metadata=BY_CONTENT)
    """CSV of cxrdist find-text, for a stage with the background region text."""
    fold: str | None = field(default=None, metadata=NEWER)
    """Cross-validation by patient over train and val: 2/5 validates on the second of five folds and
    trains on the others; test stays untouched. The packed splits if not given."""
    cache: Path | None = field(default=None, metadata=SAME_RESULT)
    """Directory of decoded images on local disk, shared by runs; ~/.cache/cxrdist if not given."""
    save_steps: PositiveInt = field(default=1000, metadata=SAME_RESULT)
    """Optimiser steps between two saves within an epoch; the end of each epoch is always saved."""
    track: str | None = field(default=None, metadata=SAME_RESULT)
    """Comma-separated names of Accelerate trackers; their files go to RUN/tracking."""


@dataclass(frozen=True)
class WeightsShowConfig:
    """Show the content of a checkpoint of a whole network; downloads it if needed."""

    file: str
    """A checkpoint file, or whatever else --init takes."""


@dataclass(frozen=True)
class WeightsConvertConfig:
    """Write a checkpoint as safetensors, under torchvision's names, with its labels and source."""

    file: str
    """A checkpoint file, or whatever else --init takes."""
    out: Path
    """File to write, NAME.safetensors; a file with other content is not replaced."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Predict each sample of a split once, on any number of ranks, and print the metrics."""

    run: Path
    """Run directory of a finished training."""
    shards: Path
    """Directory of shards, a path or an fsspec URL."""
    split: Split = "test"
    """Split to evaluate."""
    name: str | None = None
    """Name of an external set, for shards that the run was not trained on; its results go to
    RUN/external/NAME. The name of its directory if not given."""
    seen: Literal["drop", "report"] = "drop"
    """Images of an external set that the network has seen in training or validation, copies of
    them, and other images of the same patients: drop counts them and leaves them out of the scores;
    report scores them too, and marks them."""
    label_map: Path | None = None
    """YAML file that maps each label of an external set to a label of the model. Labels that are
    not listed keep their names; only classes that both have are scored."""
    operating_point: str | None = None
    """How the threshold of each class is chosen on the validation split: youden (largest
    sensitivity + specificity), sensitivity=0.95 or specificity=0.95. If not given, the model keeps
    its rule, at first youden."""
    prevalence: OpenUnitInterval | None = None
    """Share of patients with each class where the model will be used, for predictive values; they
    are also given at the prevalence in the images."""
    fewest: PositiveInt = 10
    """Fewest positives, and fewest negatives, for a headline score; with less, the report says that
    it rests on too few images."""
    batch_size: PositiveInt = 32
    """Images of one forward pass."""
    cache: Path | None = None
    """Directory of decoded images; ~/.cache/cxrdist if not given."""


@dataclass(frozen=True)
class ExplainConfig:
    """Explain predictions with LRP: relevance arrays, their ledger, and heat maps."""

    run: Path = field(metadata=BY_CONTENT)
    """Run directory of a finished training."""
    shards: Path = field(metadata=BY_CONTENT)
    """Directory of shards, a path or an fsspec URL."""
    split: Split = "test"
    """Split to explain."""
    name: str | None = field(default=None, metadata=SAME_RESULT)
    """Name of an external set, as in cxrdist evaluate."""
    classes: str = field(default="all", metadata=BY_CONTENT)
    """all, or comma-separated class names."""
    limit: PositiveInt | None = None
    """Explain this many samples: first the mistakes found by cxrdist evaluate, most confident
    first, then the classes in turn; all if not given."""
    contrast: str | None = field(default=None, metadata=BY_CONTENT)
    """Two comma-separated class names: a map of the first minus the second. If not given: a picture
    of the likeliest class of each image minus the second likeliest one."""
    preset: Literal["canonical", "innvestigate"] = "canonical"
    """canonical: for every network except convnext_atto, which has no proven rules and cannot be
    explained. innvestigate: the maps of the paper's program, for DenseNets."""
    composite: str | None = None
    """Name of a zennit composite to use instead, on the canonical network; has no ledger."""
    flat: bool = True
    """Use the flat rule in the first layer; if false, the z+ rule."""
    biases: bool = True
    """Biases absorb their share of the relevance; if false, denominators leave them out."""
    format: Literal["npz", "webdataset"] = "npz"
    """npz: a float32 file per image. webdataset: tars of float16 maps, half the space."""
    pictures: bool = field(default=True, metadata=SAME_RESULT)
    """Write heat maps as well, and find the nearest training image of each sample, which takes a
    forward pass over all training images."""
    batch_size: PositiveInt = 4
    """Images of one forward pass."""
    cache: Path | None = field(default=None, metadata=SAME_RESULT)
    """Directory of decoded images; ~/.cache/cxrdist if not given."""


@dataclass(frozen=True)
class ProbeTextConfig:
    """Measure whether a network reads the words on the images."""

    run: Path
    """Run directory of a finished training."""
    shards: Path
    """Directory of shards with the text uncovered, a path or an fsspec URL."""
    split: Split = "test"
    """Split to probe."""
    name: str | None = None
    """Name of an external set, as in cxrdist evaluate."""
    boxes: Path | None = None
    """CSV of cxrdist find-text; if not given, text is looked for in the packed squares."""
    word: str = "SEDUTO"
    """Word to paste on the images (paper, section 4.1)."""
    place: Literal["upper-left", "upper-right", "lower-left", "lower-right"] = "upper-left"
    """Corner to paste the word into."""
    height: Annotated[float, Inside(0), Between(most=0.5)] = 0.06
    """Font size as a fraction of the image's side, at least 6 px; capital letters are about three
    quarters as high."""
    limit: PositiveInt | None = None
    """Explain this many images with text, the first in the shards; all if not given."""
    batch_size: PositiveInt = 16
    """Images of one forward pass."""
    cache: Path | None = None
    """Directory of decoded images; ~/.cache/cxrdist if not given."""


@dataclass(frozen=True)
class LocaliseConfig:
    """Score where the network looks against boxes or masks drawn by people."""

    run: Path
    """Run directory of a finished training."""
    shards: Path
    """Directory of shards, a path or an fsspec URL."""
    boxes: Path | None = None
    """CSV with the columns image, label, x, y, width and height, in px of the originals as
    displayed, or the NIH's BBox_List_2017.csv."""
    masks: Path | None = None
    """Masks of the lungs, as in cxrdist pack. With neither boxes nor masks: those in the shards."""
    split: Split = "test"
    """Split to score."""
    name: str | None = None
    """Name of an external set, as in cxrdist evaluate."""
    batch_size: PositiveInt = 4
    """Images of one forward pass."""
    cache: Path | None = None
    """Directory of decoded images; ~/.cache/cxrdist if not given."""


@dataclass(frozen=True)
class ProbeBackgroundConfig:
    """Measure how well a small network classifies the images without their lungs."""

    shards: Path = field(metadata=BY_CONTENT)
    """Directory of shards, a path or an fsspec URL."""
    out: Path = field(metadata=SAME_RESULT)
    """Directory to write; the same command resumes there after it was killed."""
    masks: Path | None = None
    """Masks of the lungs, as in cxrdist pack. If not given: the masks in the shards, or a fixed
    ellipse if there are none."""
    seed: NonNegativeInt = 0
    """Seed of the networks and of the shuffled pixels."""
    cache: Path | None = field(default=None, metadata=SAME_RESULT)
    """Directory of decoded images; ~/.cache/cxrdist if not given."""


@dataclass(frozen=True)
class PredictConfig:
    """Write class probabilities of image files to a CSV, with images prepared as in training."""

    run: Path
    """Run directory of a finished training, or folder of `cxrdist export --to huggingface`."""
    images: list[Path]
    """Image files (any kind that cxrdist pack reads), or folders, in which links are followed."""
    out: Path
    """CSV to write: path, prob_CLASS..., predicted (with several labels, all of at least 0.5).
    Unreadable images, and files that are not images, are listed in NAME-rejected.csv beside it."""
    explain: bool = False
    """Also write NAME-heatmaps/ beside the CSV: heat maps over the original images (at most 2048 px
    wide and high), their relevance as arrays, and relevance.csv, which maps them to the images."""
    dicom: Path | None = None
    """New folder of DICOM files, for DICOM images only: for each image a structured report with the
    probabilities and a secondary capture with the heat map of each class, in the study of the
    image, marked as research only (needs cxrdist[dicom])."""
    skip_bad: bool = False
    """End with exit code 0 although some images could not be read."""
    fit: Fit | None = None
    """How an image becomes square; as in training if not given."""
    depth: Depth | None = None
    """Bit depth of images of more than 8 bits that do not declare theirs, 8 to 16, as in cxrdist
    pack. If not given: as in training; if that had none, the depth that cxrdist pack would choose
    for these images."""
    text_boxes: Path | None = None
    """Cover burned-in text in the boxes of this CSV, with paths as given here or relative to the
    folder given. Without it, text is found and covered if the model was trained on images with
    covered text (needs cxrdist[text]), and left as it is otherwise."""
    batch_size: PositiveInt = 16
    """Images of one forward pass."""


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a run, or about the predictions of any program."""

    run: Path | None = None
    """Run directory; the page is RUN/report.html."""
    predictions: Path | None = None
    """Instead of a run: a CSV with key, label and prob_CLASS... for each image, and patient,
    source, view, sex, age where known."""
    out: Path | None = None
    """Directory for the page and its metrics.json, with --predictions."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare two runs on the same images: paired differences, with intervals by patient."""

    run_a: Path
    """Run directory."""
    run_b: Path
    """Run directory of the other run."""
    out: Path
    """New or empty directory for comparison.json, flipped.csv and the page."""
    split: Split = "test"
    """Split that both were evaluated on."""
    name: str | None = None
    """Name of an external set that both were evaluated on, instead of a split."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model for other programs, after checking that its logits are the same."""

    run: Path
    """Run directory of a finished training; onnx and torch-export also take an ensemble."""
    to: Literal["onnx", "torch-export", "timm", "huggingface"]
    """onnx: one file, from uint8 images to logits and calibrated probabilities, with classes and
    thresholds as its metadata (needs cxrdist[export]). torch-export: the same graph as a file that
    PyTorch runs without cxrdist. timm: a folder that timm loads, and for a DenseNet
    torchxrayvision. huggingface: a folder for the Hub, with the model card."""
    out: Path
    """File (.onnx, .pt2) or folder to write; it must not exist yet."""
    shards: Path | None = None
    """Directory of shards, a path or an fsspec URL: the logits are compared on up to 100 images of
    its test split. If not given: on squares of random grey values, and the metadata says so."""


@dataclass(frozen=True)
class SeedsConfig:
    """Train one recipe several times, and join the members into an ensemble."""

    run: Path
    """Directory to make: RUN/member-0 ... are runs, RUN itself is their ensemble."""
    shards: Path
    """Directory of shards, a path or an fsspec URL."""
    recipe: str = "finetune"
    """Recipe of all members: a YAML file, or the name of one that comes with cxrdist."""
    seeds: Annotated[int, Between(2)] = 5
    """Number of members, 2 to 20, with seeds 0, 1 ...; with --folds the number of folds."""
    folds: bool = False
    """Members are folds by patient: each validates on another part of train and val."""
    member: NonNegativeInt | None = None
    """Train only this member, as a task of a SLURM array does; all in turn if not given."""
    cache: Path | None = None
    """Directory of decoded images; ~/.cache/cxrdist if not given."""


@dataclass(frozen=True)
class SchemaConfig:
    """Print the JSON schema (2020-12) of a document that cxrdist writes."""

    document: str | None = None
    """Its name: run, model, metrics, audit ...; an object of all of them if not given."""


@dataclass(frozen=True)
class DemoConfig:
    """Run all steps on synthetic X-rays: pack, train, evaluate, explain, report."""

    out: Path = Path("demo")
    """Directory for the images, the shards and the run; it must not exist yet."""
    source: Literal["phantom", "folder"] = "phantom"
    """phantom: synthetic X-rays made on the spot. folder: your own, one sub-folder per class."""
    input: Path | None = None
    """The folder, with --source folder."""
    patient_pattern: str | None = None
    """Regular expression whose first group, found in the file name, is the patient."""
    recipe: Literal["demo", "lungs"] = "demo"
    """lungs: every synthetic X-ray of COVID-19 has faint opacities and a word, and the training
    keeps the network from using the background of the lungs."""


@dataclass(frozen=True)
class RecipesConfig:
    """List the recipes that come with cxrdist and their measured results, or print one."""

    name: str | None = None
    """Recipe to print; all are listed if not given."""


@dataclass(frozen=True)
class BenchConfig:
    """Time ways to do the same job side by side on this machine, from packing to explaining."""

    only: str | None = None
    """Comma-separated names of measurements to run; all that this machine can run if not given. gpu
    times training steps on 1 to n GPUs: for n in 1 2 4 8; do RANKS=$n bash
    launch/local.sh bench --only gpu; done"""
    input: Path | None = None
    """Folder of original images for the packing rows; synthetic 1024 px ones if not given."""
    size: PositiveInt = 224
    """Side of the images, in pixels."""
    repeats: PositiveInt = 5
    """Rounds; each runs all contenders of a row in turn, the table shows medians."""

"""NYUv2 as a data module, from any of its common formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lightning_gradnorm._messages import check, did_you_mean, is_integer, is_number
from lightning_gradnorm.experiments.loading.splits import SplitsDataModule
from lightning_gradnorm.experiments.problems.dense.nyuv2.augmentations import Augmentations
from lightning_gradnorm.experiments.problems.dense.nyuv2.convert import progress_bar
from lightning_gradnorm.experiments.problems.dense.nyuv2.images import TASKS, Images, WithEpoch
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_convention import AUTO, Convention
from lightning_gradnorm.experiments.problems.dense.nyuv2.prepared import SPLITS, Direct, Prepared
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import PREPARED, describe, find_form, find_source
from lightning_gradnorm.experiments.problems.dense.nyuv2.splitting import split_by_scene
from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import Size


class NYUv2(SplitsDataModule[Images]):
    """Indoor scenes with 13-class labels, depth and surface normals: 795 training and 654 test images.

    ``root`` is a folder with one of: the official ``nyu_depth_v2_labeled.mat``, ``splits.mat``, ``classMapping40.mat`` and
    ``class13Mapping.mat``; the ``train`` and ``val`` of MTAN and LibMTL; the parquet shards of Hugging Face's
    ``tanganke/nyuv2``; or the output of ``scripts/prepare_nyuv2.py``, by far the fastest. The format is detected
    automatically and printed. Batches from a source and from its prepared copy are bit-identical.

    A batch is ``(images, targets)``: images ``float32`` in [0, 1] of shape ``(batch, 3, H, W)``; targets ``segmentation``
    ``int64`` ``(batch, h, w)``, 0 to 12 and -1 to ignore; ``depth`` ``float32`` ``(batch, 1, h, w)``, meters, 0 where
    unknown; ``normals`` ``float32`` ``(batch, 3, h, w)``, unit vectors, x right, y up, z toward the camera, zero where
    unknown; and ``keypoints`` ``float32`` ``(batch, 48, 3)``, each (x, y, visible) in pixels of the output from its
    upper left edge, if the prepared data have them (`KeypointLoss` draws the heat maps).

    Validation images are whole scenes held out of the official training images. If scenes are unknown (MTAN, Hugging
    Face), ten consecutive images count as one. The test images are the official ones, which the common code calls ``val``.

    Source: Silberman et al., Indoor Segmentation and Support Inference from RGBD Images, ECCV 2012; 13 classes after
    Couprie et al., ICLR 2013.

    Args:
        root: The folder.
        input_size: Height and width of the images; None for those of the data. The paper has 320 x 320.
        output_size: Height and width of the targets; None for those of the data. The paper has 80 x 80.
        tasks: The targets, from segmentation, depth, normals and keypoints.
        augmentations: Augmentations of training images, such as ``Augmentations(flip=0.5)``; None for no augmentation, as
            in the paper.
        val_share: Share of the training images to hold out for validation; 0 for none, as in the paper.
        form: ``"official"``, ``"mtan"`` or ``"huggingface"``, if the folder contains several formats.
        normals_convention: Directions of the three channels of the stored normals, in order, as seen by the camera: one each
            of right or left, up or down, towards or away, such as ``"right away up"``. They are turned to right, up, towards.
            ``"auto"`` detects and prints it by comparison with the depth. If that is not conclusive, it warns and leaves
            the normals unchanged.
        check: Before training, read a whole source and check every value. For prepared data, compare the checksums.
        batch_size: Samples per batch and rank.
        seed: Seed of the validation scenes, the augmentations and the order of the training batches.
        num_workers: Worker processes per loader.
        drop_last: Drop the last batch of a training epoch if it has fewer than ``batch_size`` samples (different ones
            each epoch).

    Raises:
        TypeError: A size or the seed is not an integer.
        ValueError: An argument is out of range, or at ``setup``: a file is invalid. The message names the file and field.
        FileNotFoundError: At ``setup``: ``root`` has none of the formats, or a file is missing.
        ModuleNotFoundError: At ``setup``: the reader of this format is not installed.
    """

    sampler = WithEpoch

    def __init__(
        self,
        root: str | Path,
        input_size: Sequence[int] | None = None,
        output_size: Sequence[int] | None = None,
        tasks: Sequence[str] = TASKS[:3],
        augmentations: Augmentations | None = None,
        val_share: float = 0.1,
        form: str | None = None,
        normals_convention: str = AUTO,
        check: bool = True,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, drop_last)
        for task in tasks:
            if task not in TASKS:
                raise ValueError(
                    f"NYUv2: tasks should be of {', '.join(TASKS)}; got {task!r}: {did_you_mean(task, TASKS)}"
                )
        _check(len(tasks) > 0 and len(set(tasks)) == len(tasks), "tasks", "different ones, at least one", list(tasks))
        _check(is_number(val_share) and 0 <= val_share < 1, "val_share", "at least 0 and less than 1", val_share)
        if normals_convention != AUTO:
            Convention.parse(normals_convention)
        self.root = Path(root)
        self.input_size = _size("input_size", input_size)
        self.output_size = _size("output_size", output_size)
        self.tasks = tuple(tasks)
        self.augmentations = augmentations
        self.val_share = val_share
        self.form = form
        self.normals_convention = normals_convention
        self.check = check
        self._stored: Prepared | Direct | None = None
        if val_share == 0:
            self._validate_on_nothing()

    @property
    def stored(self) -> Prepared | Direct:
        """The reader of the images, opened at first use."""
        if self._stored is None:
            self._stored = self._open()
        return self._stored

    def prepare_data(self) -> None:
        """Check every value once per machine before training, if ``check`` is set."""
        if not self.check:
            return
        stored = self.stored
        if isinstance(stored, Prepared):
            stored.verify()
            return
        # Not in parallel, because the disk is the bottleneck and errors are clearer.
        with progress_bar(show=True) as bar:
            for split in SPLITS:
                for index in bar.track(range(stored.count(split)), description=f"check {split}"):
                    stored.source.read(split, index)

    def make_splits(self) -> dict[str, Images]:
        """Hold out the validation scenes."""
        stored = self.stored
        train, val = split_by_scene(stored.count("train"), stored.scenes("train"), self.val_share, self.seed)
        splits = {
            "train": ("train", train, self.augmentations),
            "val": ("train", val, None),
            "test": ("test", np.arange(stored.count("test")), None),
        }
        return {
            name: Images(stored, split, indices, self.tasks, augmentations, self.seed)
            for name, (split, indices, augmentations) in splits.items()
        }

    def _open(self) -> Prepared | Direct:
        stored: Prepared | Direct
        if self.form is None and find_form(self.root) == PREPARED:
            prepared = stored = Prepared(self.root)
            for name, wanted in (("input_size", self.input_size), ("output_size", self.output_size)):
                found = getattr(stored, name)
                if wanted not in (None, found):
                    raise ValueError(
                        f"NYUv2: {name} should be {found}, for which the data in {self.root} were prepared; got {wanted}. "
                        "Prepare the data again, in another folder, for other sizes."
                    )
            normals = prepared.source["normals"]
            if self.normals_convention not in (AUTO, normals):
                raise ValueError(
                    f"NYUv2: normals_convention should be 'auto' for prepared data, which record that the normals in "
                    f"{self.root} were {normals!r}; got {self.normals_convention!r}. Prepare the data again, in another "
                    "folder, with --normals-convention."
                )
            rank_zero_info(
                f"NYUv2: {self.root} is prepared from the {prepared.source['form']} format: {stored.count('train')} train and "
                f"{stored.count('test')} test images of {_by(stored.input_size)}, targets of {_by(stored.output_size)}. "
                f"The convention of the source's normals: {normals}."
            )
        else:
            source = find_source(self.root, self.form)
            rank_zero_info(
                f"{describe(source)} Each image is read and resized on every access. To do this only once: "
                f"python scripts/prepare_nyuv2.py {self.root} FOLDER"
            )
            convention = self.normals_convention if "normals" in self.tasks else None
            stored = Direct(source, self.input_size, self.output_size, convention)
        missing = [task for task in self.tasks if task not in stored.kinds]
        if missing:
            raise ValueError(
                f"NYUv2: tasks should be of {', '.join(task for task in TASKS if task in stored.kinds)}, which the data in "
                f"{self.root} have; got {', '.join(missing)}."
            )
        return stored


def _check(holds: bool, parameter: str, expected: str, found: object) -> None:
    check("NYUv2", holds, parameter, expected, found)


def _size(parameter: str, size: Sequence[int] | None) -> Size | None:
    if size is None:
        return None
    values = tuple(size)
    fits = len(values) == 2 and all(is_integer(value) and value >= 1 for value in values)
    _check(fits, parameter, "height and width, two positive integers", values)
    return values[0], values[1]


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"

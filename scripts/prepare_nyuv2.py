"""Converts NYUv2 from any of its formats to memory-mapped arrays at the sizes you want.

    python scripts/prepare_nyuv2.py SOURCE FOLDER --input-size 320 320 --output-size 80 80    # the paper's
    python scripts/prepare_nyuv2.py SOURCE FOLDER                                             # the source's own size
    python scripts/prepare_nyuv2.py --verify FOLDER                                           # compare the checksums

SOURCE is a folder with the official .mat files, MTAN's train/ and val/, or Hugging Face's parquet shards. After an
interruption, the same command continues where it stopped. Normals are turned to x right, y up, z toward the camera. Then
train with data=nyuv2 data.root=FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_gradnorm.experiments.problems.dense.nyuv2.convert import prepare
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_convention import AUTO
from lightning_gradnorm.experiments.problems.dense.nyuv2.prepared import Prepared
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import FORMS, describe, find_source


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="source and target; with --verify, targets"
    )
    parser.add_argument("--input-size", nargs=2, type=int, metavar=("H", "W"), help="size of the images")
    parser.add_argument(
        "--output-size", nargs=2, type=int, metavar=("H", "W"), help="size of labels, depth and normals"
    )
    parser.add_argument("--form", choices=list(FORMS), help="format to use if the source's folder has several")
    parser.add_argument(
        "--normals-convention",
        default=AUTO,
        metavar="'right away up'",
        help="directions of the channels of the stored normals; detected by default",
    )
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read and convert")
    parser.add_argument("--verify", action="store_true", help="only compare the checksums of prepared data")
    options = parser.parse_args(arguments)
    try:
        if options.verify:
            for folder in options.folders:
                Prepared(folder).verify()
                print(f"{folder}: every byte is as it was written.")
            return
        if len(options.folders) != 2:
            parser.error(f"SOURCE and FOLDER should be given; got {len(options.folders)} folders.")
        root, folder = options.folders
        for name in ("input_size", "output_size"):
            size = getattr(options, name)
            if size is not None and min(size) < 1:
                parser.error(f"--{name.replace('_', '-')} should be positive; got {size}.")
        source = find_source(root, options.form)
        print(describe(source))
        sizes = (tuple(options.input_size or source.size), tuple(options.output_size or source.size))
        prepared = prepare(
            source,
            folder,
            *sizes,
            num_workers=options.num_workers,
            show_progress=True,
            normals_convention=options.normals_convention,
        )
        megabytes = sum(file.stat().st_size for file in folder.glob("*.npy")) / 1e6
        print(f"{prepared.root}: {megabytes:.0f} MB. Train with data=nyuv2 data.root={prepared.root}")
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

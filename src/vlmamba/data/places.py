"""Where the pictures of LLaVA's two training files come from: official places, numbers of files, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Place:
    """One folder of pictures below the image folder.

    Attributes:
        folder: as the paths of the JSON begin; empty for a file whose paths have no common beginning.
        name: what it is.
        page: the official site; archive: what to download from there.
        files: pictures that it holds when complete, used or not.
        gigabytes: of the archive (10^9 bytes); the unpacked pictures take about as much, being compressed already.
        how: what has to be known to get it right.
    """

    folder: str
    name: str
    page: str
    archive: str
    files: int
    gigabytes: float
    how: str


MIX_665K = (
    Place(
        "coco/train2017",
        "COCO 2017 training images",
        "https://cocodataset.org/#download",
        "http://images.cocodataset.org/zips/train2017.zip",
        118_287,
        19.3,
        "unpack into coco/",
    ),
    Place(
        "gqa/images",
        "GQA images",
        "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        148_854,
        20.3,
        "unpack into gqa/",
    ),
    Place(
        "ocr_vqa/images",
        "OCR-VQA book covers",
        "https://ocr-vqa.github.io/",
        "loadDataset.py of https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
        207_572,
        7.0,
        "the script fetches one cover at a time from a shop's servers (hours; some are gone; the size is an estimate). "
        "It keeps .gif and .png where the JSON says .jpg: both names are found, nothing needs renaming",
    ),
    Place(
        "textvqa/train_images",
        "TextVQA training and validation images",
        "https://textvqa.org/dataset/",
        "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        25_119,
        6.6,
        "unpack into textvqa/",
    ),
    Place(
        "vg/VG_100K",
        "Visual Genome, part 1",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
        64_346,
        9.2,
        "unpack into vg/",
    ),
    Place(
        "vg/VG_100K_2",
        "Visual Genome, part 2",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
        43_903,
        5.5,
        "unpack into vg/",
    ),
)
PRETRAIN_558K = Place(
    "",
    "LCS-558K: pictures of LAION, CC and SBU",
    "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
    558_128,
    27.4,
    "unpack into images/ and pass that folder",
)
JSON_FILES = {
    "llava_v1_5_mix665k.json": "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K (1.03 GB)",
    "blip_laion_cc_sbu_558k.json": "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain (0.18 GB)",
}


def folder_of(path: str, file: str) -> str:
    """The part that a picture of `file` belongs to: a known folder, else the first of its path. The pictures of
    LCS-558K, in hundreds of numbered folders, are one."""
    if _is_pretrain(file):
        return PRETRAIN_558K.folder
    for place in MIX_665K:
        if path.startswith(place.folder + "/"):
            return place.folder
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else ""


def place_of(folder: str, file: str) -> Place | None:
    """Where a part can be had, if it is one of LLaVA's."""
    if _is_pretrain(file):
        return PRETRAIN_558K
    return next((place for place in MIX_665K if place.folder == folder), None)


def _is_pretrain(file: str) -> bool:
    return PurePosixPath(file).name.startswith("blip_laion_cc_sbu_558k")

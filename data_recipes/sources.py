"""Pictures that several sets share."""

from data_recipes.recipe import Pictures, Source

_COCO = "http://images.cocodataset.org/zips/"
_VG = "https://cs.stanford.edu/people/rak248/VG_100K_2/"
_OCR_PAGE = "https://ocr-vqa.github.io (loadDataset.py there writes a folder of pictures)"

COCO_2014 = Source("train2014.zip", _COCO + "train2014.zip")
COCO_2017 = Source("train2017.zip", _COCO + "train2017.zip")
GQA = Source("gqa_images.zip", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip")
TEXTVQA = Source(
    "train_val_images.zip", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
)
OCR_VQA = Source("ocr_vqa_images", None, page=_OCR_PAGE)
VG = Source("vg_images.zip", _VG + "images.zip")
VG_2 = Source("vg_images2.zip", _VG + "images2.zip")

# Of llava_v1_5_mix665k.json, by the folders that its names begin with.
LLAVA_MIX = (
    Pictures("coco/train2017/", COCO_2017, "train2017/"),
    Pictures("gqa/images/", GQA, "images/"),
    Pictures("ocr_vqa/images/", OCR_VQA),
    Pictures("textvqa/train_images/", TEXTVQA, "train_images/"),
    Pictures("vg/VG_100K/", VG, "VG_100K/"),
    Pictures("vg/VG_100K_2/", VG_2, "VG_100K_2/"),
)

"""Writes pictures, boxes and masks as users have them."""

import numpy as np
from PIL import Image

VOC = "<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"
BOX = "<object><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"


def write_picture(path, size=(8, 6), mode="RGB", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path, **options)
    return path


def write_boxes(path, *boxes, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(VOC.format(size=size, objects="".join(BOX.format(*box) for box in boxes)))


def write_mask(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(array)
    if mode == "P":
        mask.putpalette([0, 0, 0, 128, 0, 0] + [0] * 759 + [224, 224, 192])
    mask.save(path)

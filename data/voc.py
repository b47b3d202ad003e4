"""VOC's annotations, turned into COCO's form.

`<folder>/ImageSets/Main/<name>.txt` names the images; each has `Annotations/<image>.xml` and
`JPEGImages/<image>.jpg` beside it.
"""

import math
import os
from xml.etree import ElementTree

from engine.progress import progress

from .datasets import inside


def read_parts(root, parts, ignore_difficult):
    """Read parts of VOC as one.

    Args:
        root: the devkit's folder.
        parts: such as ["VOC2007/trainval", "VOC2012/trainval"].
        ignore_difficult: whether objects marked difficult become COCO's crowds. They are trained
            on, as in detectron2, and ignored in evaluation, as in VOC: a detection that lies in a
            crowd is neither right nor wrong.

    Returns:
        COCO's dict, see data/coco.py, without categories: each annotation has the name of its own
        as "category".

    Raises:
        SystemExit: a file is missing or broken.
    """
    images, annotations, listed_by = [], [], {}
    for part in parts:
        list_file, stems = read_list(root, part)
        folder = os.path.join(root, os.path.dirname(part))
        for stem in progress(stems, part):
            path = os.path.join(folder, "Annotations", f"{stem}.xml")
            path = inside(os.path.join(folder, "Annotations"), path, list_file)
            if path in listed_by:
                raise SystemExit(
                    f"{list_file} names {stem}, which {listed_by[path]} has named already; "
                    "an image must stand in a part once"
                )
            listed_by[path] = list_file
            image, objects = read_xml(path, list_file)
            image |= {
                "id": len(images) + 1,
                "file": os.path.join(folder, "JPEGImages", f"{stem}.jpg"),
            }
            images.append(image)
            for one in objects:
                is_difficult = one.pop("difficult")
                one |= {"image_id": image["id"], "iscrowd": int(is_difficult and ignore_difficult)}
                annotations.append(one)
    return {"images": images, "annotations": annotations}


def read_list(root, part):
    """The path of a part's list, and the names that stand in it, without ending."""
    folder, _, name = part.rpartition("/")
    path = os.path.join(root, folder, "ImageSets", "Main", f"{name}.txt")
    if not folder or not os.path.exists(path):
        raise SystemExit(
            f"{path} does not exist; with layout voc, detect.train and detect.val are lists such "
            "as [VOC2007/trainval, VOC2012/trainval]"
        )
    with open(path) as f:
        return path, [line.split()[0] for line in f if line.split()]


def read_xml(path, list_file):
    """One image's annotations.

    Returns:
        the image, {height, width}, and its objects, each {category, bbox, area, difficult}.

    Raises:
        SystemExit: the file is missing or broken; list_file is told as that which names it.
    """
    try:
        tree = ElementTree.parse(path, ElementTree.XMLParser(target=Plain())).getroot()
        image = {side: int(text_of(tree, f"size/{side}")) for side in ("height", "width")}
        if min(image.values()) < 1:
            raise ValueError(f"its image is {image['width']} x {image['height']} pixels")
        # Not .iter: the parts of an object have boxes too.
        return image, [read_object(one) for one in tree.findall("object")]
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist, and {list_file} names it") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise SystemExit(f"{path} is not an annotation of VOC: {error}") from None


def read_object(tree):
    """One object of an image.

    VOC counts pixels from 1 and a box holds both of its ends, so that (1, 1, W, H) is the whole
    image: here [0, 0, W, H], as in detectron2.
    """
    x1, y1, x2, y2 = (
        float(text_of(tree, f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax")
    )
    if not math.isfinite(x1 + y1 + x2 + y2):
        raise ValueError(f"a box has ends {x1}, {y1}, {x2}, {y2}")
    width, height = x2 - x1 + 1, y2 - y1 + 1
    return {
        "category": text_of(tree, "name").strip(),
        "bbox": [x1 - 1, y1 - 1, width, height],
        "area": width * height,
        "difficult": tree.findtext("difficult", "0").strip() == "1",
    }


def text_of(tree, path):
    """The text of an element below this one. ValueError where there is none."""
    text = tree.findtext(path)
    if not text:
        raise ValueError(f"it has no {path}")
    return text


class Plain(ElementTree.TreeBuilder):
    """XML without a document type.

    One that has a document type may name entities which stand for other files, or for more than
    memory holds.
    """

    def doctype(self, name, public, system):
        """Refuse it."""
        raise ValueError("it declares a document type")

"""Vectors with names and thumbnails, as TensorBoard's projector reads them.

torch's SummaryWriter.add_embedding writes the same files, but holds all thumbnails in float64, more
than once, and notes the name of the machine.
"""

import math
import os

import torch
from PIL import Image

CONFIG = """embeddings {{
  tensor_name: "embeddings"
  tensor_path: "tensors.tsv"
  metadata_path: "metadata.tsv"
  sprite {{
    image_path: "sprite.png"
    single_image_dim: {size}
    single_image_dim: {size}
  }}
}}
"""


def write_projector(folder, vectors, names, thumbnails):
    """Write the files of TensorBoard's projector.

    Args:
        folder: an empty folder.
        vectors: (n, D).
        names: of the n images, each a line of printable text.
        thumbnails: (n, 3, S, S) uint8.
    """
    with open(os.path.join(folder, "tensors.tsv"), "w", encoding="ascii") as f:
        for vector in vectors:
            f.write("\t".join(f"{number:.7g}" for number in vector.tolist()) + "\n")
    with open(os.path.join(folder, "metadata.tsv"), "w", encoding="utf-8") as f:
        f.writelines(f"{name}\n" for name in names)
    Image.fromarray(sprite(thumbnails).numpy()).save(os.path.join(folder, "sprite.png"))
    with open(os.path.join(folder, "projector_config.pbtxt"), "w", encoding="ascii") as f:
        f.write(CONFIG.format(size=thumbnails.shape[-1]))


def sprite(thumbnails):
    """Thumbnails (n, 3, S, S), row by row in the smallest square picture, (H, H, 3)."""
    n, _, S, _ = thumbnails.shape
    side = math.isqrt(n - 1) + 1
    tiles = torch.zeros(side * side, 3, S, S, dtype=torch.uint8)
    tiles[:n] = thumbnails
    rows = tiles.view(side, side, 3, S, S).permute(0, 3, 1, 4, 2)
    return rows.reshape(side * S, side * S, 3)

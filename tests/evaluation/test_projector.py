"""TensorBoard's projector: the files are those that TensorBoard itself reads."""

import numpy as np
import torch
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from evaluation.projector import write_projector


def test_tensorboard_reads_vectors_names_and_thumbnails(tmp_path):
    vectors = torch.randn(7, 5)
    thumbnails = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
    names = [f"photo {i} ä.jpg" for i in range(7)]
    write_projector(str(tmp_path), vectors, names, thumbnails)
    config = (tmp_path / "projector_config.pbtxt").read_text()
    (info,) = text_format.Parse(config, ProjectorConfig()).embeddings
    torch.testing.assert_close(
        torch.tensor(np.loadtxt(tmp_path / info.tensor_path)).float(), vectors
    )
    assert (tmp_path / info.metadata_path).read_text(encoding="utf-8").splitlines() == names
    # Seven images of 4 by 4 pixels stand in a square of three by three.
    assert info.sprite.single_image_dim == [4, 4]
    picture = np.array(Image.open(tmp_path / info.sprite.image_path))
    assert picture.shape == (12, 12, 3) and not picture[8:, 4:].any()
    fifth = picture[4:8, 4:8].transpose(2, 0, 1)
    assert (fifth == thumbnails[4].numpy()).all()

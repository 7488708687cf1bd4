"""Pictures are written whole, for grey and coloured images and rows of different lengths."""

import matplotlib.image
import numpy as np

from experiments import figures


def test_rows_of_different_lengths_and_channels(tmp_path):
  for channels in (1, 3):
    rows = [("generated", np.zeros((4, 8, 8, channels))), ("mean", np.ones((1, 8, 8, channels)))]
    figures.image_rows(tmp_path / "rows.png", rows)
    picture = matplotlib.image.imread(tmp_path / "rows.png")[..., :3]
    assert picture.min() < 0.1  # the black images
    assert picture.max() > 0.9


def test_regions_show_the_winning_class_and_a_white_boundary(tmp_path):
  def logits(points):
    return np.stack([5 * points[:, 0], -5 * points[:, 0]], axis=1)  # class 0 on the right

  figures.plane(tmp_path / "plane.png", [("regions", ("regions", logits))], num_classes=2)
  picture = matplotlib.image.imread(tmp_path / "plane.png")[..., :3]
  height, width = picture.shape[:2]
  left, middle, right = (picture[height // 2, int(width * share)] for share in (0.3, 0.55, 0.8))
  assert left[0] > left[2]  # class 1 is red
  assert right[2] > right[0]  # class 0 is blue
  assert middle.min() > max(left.min(), right.min())  # whiter at the boundary

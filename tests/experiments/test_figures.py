"""Pictures are written whole, for grey and coloured images and rows of different lengths."""

import io

import matplotlib.image
import numpy as np
import pytest

from experiments.measure import pictures
from kkt_jax.auditing import pictures as audit_pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_show_every_image_at_its_place(channels):
  rows = [("generated", np.zeros((4, 8, 8, channels))), ("mean", np.ones((1, 8, 8, channels)))]
  picture = matplotlib.image.imread(io.BytesIO(audit_pictures.image_rows(rows)))[..., :3]
  assert picture.shape[:2] == (60, 340)  # 2 rows and 4 columns of (8 + 2) x 3 pixels, beside 220 for captions
  np.testing.assert_array_equal(picture[12, [232, 262, 292, 322]], 0)  # four black images
  np.testing.assert_array_equal(picture[42, [232, 262, 292, 322]], 1)  # a white one, and nothing beside it
  assert picture[30:, :220].min() < 0.5  # its caption


def test_regions_show_the_winning_class_and_a_white_boundary(tmp_path):
  def logits(points):
    return np.stack([5 * points[:, 0], -5 * points[:, 0]], axis=1)  # class 0 on the right

  pictures.plane(tmp_path / "plane.png", [("regions", logits)], num_classes=2)
  picture = matplotlib.image.imread(tmp_path / "plane.png")[..., :3]
  height, width = picture.shape[:2]
  left, middle, right = (picture[height // 2, int(width * share)] for share in (0.3, 0.55, 0.8))
  assert left[0] > left[2]  # class 1 is red
  assert right[2] > right[0]  # class 0 is blue
  assert middle.min() > max(left.min(), right.min())  # whiter at the boundary


def test_points_of_the_plane_have_the_colour_of_their_class(tmp_path):
  points = np.array([[-1.0, 0.0]] * 50 + [[1.0, 0.0]] * 50)
  pictures.plane(tmp_path / "plane.png", [("points", (points, np.repeat([0, 1], 50)))], num_classes=2)
  picture = matplotlib.image.imread(tmp_path / "plane.png")[..., :3]
  blue, red = (
    (np.abs(picture - colour).max(axis=2) < 0.02).nonzero()[1] for colour in ([0.2, 0.4, 0.8], [0.86, 0.22, 0.07])
  )
  assert len(blue) and len(red)
  assert blue.mean() < red.mean()  # class 0 on the left


def test_the_remaining_pictures_are_drawn(tmp_path):
  x = np.linspace(0.0, 1.0, 5)
  pictures.scaling_curves(tmp_path / "fig3.png", x, np.stack([x, 2 * x], 1), np.stack([x, 2 * x], 1))
  pictures.u_shape(tmp_path / "fig2.png", x, x, alpha=1.0, delta=0.2)
  for path in ("fig2.png", "fig3.png"):
    picture = matplotlib.image.imread(tmp_path / path)[..., :3]
    assert picture.std() > 0.05, path  # something is on it

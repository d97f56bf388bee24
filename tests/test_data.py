"""Every data source through real files in their real formats, decoding, and the augmentation."""

import copy
import dataclasses
import errno
import hashlib
import math
import os
import pickle
import shutil
import signal
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import FOLDER, end_of, outcome, pixels, run, save_image, script, start

import mhkd
import mhkd_data
import mhkd_images
import mhkd_runs

torchvision_datasets = pytest.importorskip("torchvision.datasets")
pytest.importorskip("PIL")


def config(tmp_path, **values):
    settings = {"student": "resnet8", "method": "ce", "data": str(tmp_path)}
    return mhkd.Config(**(settings | {"out": str(tmp_path / "out")} | values))


def load(tmp_path, dataset="digits", **values):
    return mhkd.load_data(config(tmp_path, dataset=dataset, **values))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def images_of(data, part):
    return data.images[getattr(data, part)].numpy()


def labels_of(data, part):
    return data.labels[getattr(data, part)].tolist()


# The files of CIFAR, pickled rows of 3,072 bytes, channel after channel, and of SVHN, MATLAB's


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Writes files as the archives hold them, and has torchvision believe that they are whole."""

    def write(dataset):
        kind, K = getattr(torchvision_datasets, dataset.upper()), 10 + 90 * (dataset == "cifar100")
        sets = {  # as many labels as there are, in no order
            part: (pixels(n, 32, 32, 3, seed=n), np.array([7 * i % K for i in range(n)]))
            for part, n in (("train", 200), ("test", 100))
        }
        if dataset == "svhn":  # images [32, 32, 3, N], labels [N, 1] where 10 is the digit 0
            savemat, files = pytest.importorskip("scipy.io").savemat, {}
            for part, (images, labels) in sets.items():
                path, y = tmp_path / f"{part}_32x32.mat", np.where(labels, labels, 10)
                savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": y[:, None].astype(np.uint8)})
                files[part] = ["", path.name, md5(path)]
            monkeypatch.setattr(kind, "split_list", files)
            return sets
        folder, fine = tmp_path / kind.base_folder, "fine_" if dataset == "cifar100" else ""
        folder.mkdir()

        def file(name, content):
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
            return [name, md5(folder / name)]

        for part, (images, labels) in sets.items():
            rows = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
            names = [part] if fine or part == "test" else [f"data_batch_{i}" for i in range(1, 6)]
            parts = zip(names, np.split(rows, len(names)), np.split(labels, len(names)))
            files = [file(name, {"data": x, f"{fine}labels": [*y]}) for name, x, y in parts]
            monkeypatch.setattr(kind, f"{part}_list", files)
        key = f"{fine}label_names"
        name, checksum = file("names", {key: [f"class{i:02}" for i in range(K)]})
        monkeypatch.setattr(kind, "meta", {"filename": name, "key": key, "md5": checksum})
        return sets

    return write


@pytest.mark.parametrize("dataset, mean, std", [  # the benchmark's constants; the authors' for svhn
    ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ("svhn", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
])  # fmt: skip
def test_a_data_set_is_read_from_its_files_ordered_by_labels_and_pixels(
    dataset, mean, std, archive, tmp_path
):
    sets, data = archive(dataset), load(tmp_path, dataset)
    for part, (images, labels) in sets.items():
        wanted = sorted(zip(labels.tolist(), (image.tobytes() for image in images)))
        found = [image.tobytes() for image in images_of(data, part)]
        assert list(zip(labels_of(data, part), found)) == wanted
    names = [f"class{i:02}" for i in range(100 if dataset == "cifar100" else 10)]
    assert data.classes == ([*"0123456789"] if dataset == "svhn" else names)
    assert (data.mean, data.std) == (mean, std)


@pytest.mark.parametrize("settings", [{}, {"subset": 30, "image_size": 16, "batch_size": 10}])
def test_cifar100_as_folders_of_images_gives_the_same_bits(
    settings, archive, tmp_path, monkeypatch
):
    monkeypatch.setitem(mhkd_data.SIZES, "cifar100", (100, 300, "class07"))
    for part, (images, labels) in archive("cifar100").items():
        for i, (image, label) in enumerate(zip(images, labels)):
            place = tmp_path / "folders" / part / f"class{label:02}"
            save_image(place / f"{999 - i}.png", image)
    places = (tmp_path, tmp_path / "folders")
    one, other = (load(place, "cifar100", **settings) for place in places)
    assert one.sha256 == other.sha256
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert (one.mean, one.std, one.classes) == (other.mean, other.std, other.classes)


def test_folders_of_other_images_are_not_taken_for_cifar(tmp_path):
    for i in range(8):
        name = f"photos/{('train', 'test')[i % 2]}/{'ab'[i // 4]}/{i}.png"
        save_image(tmp_path / name, pixels(40, 30, 3, seed=i))
    for dataset in ("cifar10", "cifar100", "svhn"):
        with pytest.raises(
            mhkd.UsageError, match="2 classes .a, b, .* and 8 images.*--dataset folder"
        ):
            load(tmp_path / "photos", dataset, batch_size=2)


def test_folders_with_as_many_other_classes_are_not_taken_for_cifar(tmp_path, monkeypatch):
    monkeypatch.setitem(mhkd_data.SIZES, "cifar10", (2, 4, "airplane"))
    for i in range(4):
        name = f"photos/{('train', 'test')[i % 2]}/{'ab'[i // 2]}/{i}.png"
        save_image(tmp_path / name, pixels(40, 30, 3, seed=i))
    with pytest.raises(mhkd.UsageError, match="so it is not cifar10: use --dataset folder"):
        load(tmp_path / "photos", "cifar10", batch_size=2)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **keywords):
        raise URLError(OSError(-3, "Temporary failure in name resolution"))

    for module in ("cifar", "svhn"):
        for name in ("download_and_extract_archive", "download_url"):
            target = f"torchvision.datasets.{module}.{name}"
            monkeypatch.setattr(target, refuse, raising=False)


def test_a_damaged_file_of_cifar100_is_not_trained_on(archive, tmp_path, no_network):
    archive("cifar100")
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(mhkd.UsageError, match="CIFAR100 is not in"):
        load(tmp_path, "cifar100")


@pytest.mark.parametrize("dataset, file", [
    ("cifar100", "cifar-100-python.tar.gz"), ("cifar10", "cifar-10-python.tar.gz"),
    ("svhn", "train_32x32.mat"),
])  # fmt: skip
def test_without_files_and_network_one_sentence_says_where_to_put_them(
    dataset, file, tmp_path, no_network, failing
):
    options = ["--student", "resnet8", "--method", "ce", "--dataset", dataset, "--device", "cpu"]
    said = failing(tmp_path / "out", *options, "--data", tmp_path / "data")
    assert all(part in said for part in (str(tmp_path / "data"), file, "--dataset digits"))


# A folder of the user's images


@pytest.fixture
def folder(tmp_path):
    """Two classes of images of all kinds; the test part is called val."""
    for i, (name, shape, keywords) in enumerate((
        ("train/cat/a.png", (41, 57, 3), {}), ("train/cat/deeper/b.JPG", (20, 90, 3), {}),
        ("train/cat/c.webp", (33, 32, 3), {"lossless": True}), ("train/dog/grey.png", (50, 40), {}),
        ("train/dog/rgba.png", (35, 35, 4), {}), ("train/dog/exact.png", (32, 32, 3), {}),
        ("val/cat/d.png", (32, 32, 3), {}), ("val/dog/e.jpeg", (64, 48, 3), {}),
    )):  # fmt: skip
        save_image(tmp_path / "pictures" / name, pixels(*shape, seed=i), **keywords)
    return tmp_path / "pictures"


def of_folder(folder, **values):
    values = {"batch_size": 2, "out": str(folder.parent / "out")} | values
    return load(folder, "folder", **values)


def decoded_as(folder, array):
    """An image file of that array, as it is decoded."""
    save_image(folder / "val" / "cat" / "d.png", array)
    return images_of(of_folder(folder), "test")[0]


def test_a_folder_of_images_of_all_kinds_is_read_with_its_classes_and_measured(folder):
    data = of_folder(folder)
    train = images_of(data, "train")
    assert data.classes == ["cat", "dog"]
    assert train.shape == (6, 32, 32, 3) and train.dtype == np.uint8 and data.prefetch
    assert (labels_of(data, "train"), labels_of(data, "test")) == ([0, 0, 0, 1, 1, 1], [0, 1])
    assert np.array_equal(train[3], pixels(32, 32, 3, seed=5))  # pixel for pixel
    assert np.array_equal(images_of(data, "test")[0], pixels(32, 32, 3, seed=6))
    assert [i for i, image in enumerate(train) if (image[..., :1] == image).all()] == [4]  # grey
    np.testing.assert_allclose(data.mean, (train / 255).mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(data.std, (train / 255).std(axis=(0, 1, 2)), atol=1e-6)


def test_all_that_is_left_out_is_counted_and_named(folder, capsys):
    wanted = of_folder(folder)
    for place in ("train/cat", "train/cat/deeper"):
        for name in ("._a.png", ".hidden.jpg", "a.heic", "b.HEIC", "notes", "x.txt"):
            (folder / place / name).write_text("not an image")
    for name in (".ipynb_checkpoints", "deeper/.thumbnails", "@eaDir", "deeper/@eaDir", "x.png"):
        save_image(folder / "train" / "dog" / name / "a.png", pixels(32, 32, 3))
    for name in (".git", "@eaDir", "__MACOSX"):  # they would be classes
        save_image(folder / "train" / name / "a.png", pixels(32, 32, 3))
    (folder / "train" / "dog" / "linked").symlink_to(folder / "train" / "cat")
    (folder / "val" / "stray.png").write_text("not in a class")
    (folder / "valid").mkdir()
    capsys.readouterr()
    data, (*_, facts) = of_folder(folder), mhkd_images.from_folder(config(folder, dataset="folder"))
    assert data.sha256 == wanted.sha256 and data.classes == ["cat", "dog"]
    left_out = {"hidden": 11, ".heic": 4, "without suffix": 2, ".txt": 2, "linked folders": 1}
    left_out |= {"folders named like images": 1, "outside of class folders": 1}
    assert facts == {"left_out": left_out | {"folders that are not used": 1}, "unreadable": []}
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"note: in '{folder}' these are left out: ")
    for part in ("1 linked folders (train/dog/linked)", "1 folders that are not used (valid)",
                 "4 .heic (train/cat/a.heic, train/cat/b.HEIC, train/cat/deeper/a.heic, ...)",
                 "1 folders named like images (train/dog/x.png)", "(val/stray.png)"):  # fmt: skip
        assert part in said
    assert of_folder(folder, skip_unreadable=True).sha256 == wanted.sha256


def test_nothing_is_said_where_nothing_is_left_out(folder, capsys):
    *_, facts = mhkd_images.from_folder(config(folder, dataset="folder"))
    assert facts == {"left_out": {}, "unreadable": []} and capsys.readouterr().out == ""


def test_a_folder_named_valid_holds_the_test_images(folder):
    wanted = of_folder(folder)
    (folder / "val").rename(folder / "valid")
    data = of_folder(folder)
    assert data.sha256 == wanted.sha256 and len(data.test) == 2


# Images that cannot be read


def damage(folder):
    """Images that cannot be read, in all ways: their names, in the order of the data set."""
    save_image(folder / "train" / "cat" / "cut.png", pixels(40, 40, 3, seed=70))
    content = (folder / "train" / "cat" / "cut.png").read_bytes()
    (folder / "train" / "cat" / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "train" / "dog" / "empty.jpg").write_bytes(b"")
    os.mkfifo(folder / "train" / "dog" / "fifo.png")
    (folder / "train" / "dog" / "link.png").symlink_to("nothing")
    (folder / "val" / "cat" / "a.png").write_text("text")
    names = ("cat/cut.png", "dog/empty.jpg", "dog/fifo.png", "dog/link.png")
    return [*(f"train/{name}" for name in names), "val/cat/a.png"]


def test_all_images_that_cannot_be_read_are_listed_at_once(folder):
    names = damage(folder)
    with pytest.raises(mhkd.UsageError) as error:
        of_folder(folder)
    said = str(error.value)
    assert said.startswith("5 of 13 images cannot be read (") and "\n" not in said
    listed = ", ".join(f"'{folder / name}'" for name in names)
    assert said.endswith(f"): remove them, or leave them out with --skip-unreadable: {listed}")
    for i in range(10):
        (folder / "train" / "cat" / f"{i}.png").write_text("text")
    with pytest.raises(mhkd.UsageError, match="15 of 23 images") as error:
        of_folder(folder)
    assert str(error.value).count("'/") == 11 and str(error.value).endswith("9.png', ...")


def test_an_error_of_the_machine_is_not_taken_for_an_unreadable_image(folder, monkeypatch):
    decode_one = mhkd_images.decode_one

    def failing_disk(pil, path, side):
        with mhkd.explain(f"the image '{path}' cannot be read", "remove it"):
            if path.stem == "exact":
                raise OSError(errno.EIO, "Input/output error")
        return decode_one(pil, path, side)

    with monkeypatch.context() as patch:
        patch.setattr(mhkd_images, "decode_one", failing_disk)
        patch.setattr("mhkd_code.code_sha256", lambda roots: "the same")
        with pytest.raises(mhkd.UsageError, match="cannot be read.*Input/output error"):
            of_folder(folder, skip_unreadable=True)
        patch.setattr(mhkd_images, "decode_one", decode_one)
        assert len(of_folder(folder, skip_unreadable=True).images) == 8


def test_test_images_that_are_also_training_or_unlabelled_images_are_counted(folder, capsys):
    of_folder(folder)
    assert "note" not in capsys.readouterr().out
    shutil.copy(folder / "val" / "cat" / "d.png", folder / "train" / "dog" / "exact.png")
    (folder / "unlabelled").mkdir()
    os.link(folder / "val" / "dog" / "e.jpeg", folder / "unlabelled" / "copy.jpeg")
    data = of_folder(folder, method="kd", teacher="resnet14")
    assert data.facts["test_images_in_training"] == 2
    assert "2 of 2 test images are also training or unlabelled images" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [3, 512])
def test_images_that_cannot_be_read_can_be_left_out(
    chunk, folder, decoded, monkeypatch, capsys, failing
):
    monkeypatch.setattr(mhkd_images, "CHUNK", chunk)
    wanted, names = of_folder(folder), damage(folder)
    with pytest.raises(mhkd.UsageError):
        of_folder(folder)
    decoded.clear()
    data = of_folder(folder, skip_unreadable=True)  # all of them have been tried before
    assert not decoded
    assert data.sha256 == wanted.sha256 and torch.equal(data.images, wanted.images)
    assert torch.equal(data.labels, wanted.labels) and torch.equal(data.train, wanted.train)
    capsys.readouterr()
    settings = config(folder, dataset="folder", out=folder.parent / "out", skip_unreadable=True)
    *_, facts = mhkd_images.from_folder(settings)
    assert facts == {"left_out": {}, "unreadable": names}
    listed = ", ".join(f"'{folder / name}'" for name in names)
    assert capsys.readouterr().out.endswith(
        f"5 of 13 images cannot be read: left out are {listed}\n"
    )
    small = of_folder(folder, skip_unreadable=True, subset=2)
    assert small.sha256 == of_folder(folder, skip_unreadable=True, subset=2).sha256
    assert len(small.train) == 2 and len(small.images) == 4
    # They are tried again without the option, and their repair is noticed.
    with pytest.raises(mhkd.UsageError, match="5 of 13 images cannot be read"):
        of_folder(folder)
    (folder / names[0]).unlink()
    save_image(folder / names[0], pixels(32, 32, 3, seed=71))
    assert len(of_folder(folder, skip_unreadable=True).train) == 7


def test_a_class_without_readable_images_is_named(folder):
    (folder / "val" / "dog" / "e.jpeg").write_bytes(b"")
    message = "class folder '.*val/dog' contains no images that can be used"
    for _ in range(2):
        with pytest.raises(mhkd.UsageError, match=message):
            of_folder(folder, skip_unreadable=True)
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(mhkd.UsageError, match="contains no images that can be used"):
        of_folder(folder, skip_unreadable=True)


def test_a_run_without_unreadable_images_goes_to_its_end_and_records_them(
    folder, failing, tmp_path
):
    damage(folder)
    assert "5 of 13 images cannot be read" in failing(tmp_path / "out", *FOLDER, folder)
    assert run(tmp_path / "out", *FOLDER, folder, "--skip-unreadable") == 0
    (path,) = (tmp_path / "out").glob("folder*/result.json")
    facts = mhkd_runs.read_json(path)["data_facts"]
    assert len(facts["unreadable"]) == 5 and facts["left_out"] == {}


@pytest.mark.parametrize("upright", [True, False])
def test_a_long_image_is_resized_by_its_shorter_side_and_cut_in_the_middle(upright, folder):
    array = np.zeros((192, 64, 3), np.uint8)
    array[64:128] = 200  # the middle third, a square
    image = decoded_as(folder, array if upright else array.transpose(1, 0, 2))
    assert (image[4:-4, 4:-4] == 200).all()
    assert (image >= 90).all()  # the resampling may touch the border


def test_sixteen_bit_grey_levels_keep_their_brightness(folder):
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    wanted = np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(decoded_as(folder, levels), wanted)


def test_grey_levels_whose_range_is_not_that_of_16_bits_are_refused(folder):
    levels = np.zeros((32, 32), np.uint16)
    for name, options in (
        ("white is zero.tif", {"tiffinfo": {262: 0}}), ("transparent.png", {"transparency": 9}),
    ):  # fmt: skip
        path = folder / "train" / "cat" / name
        save_image(path, levels, **options)
        with pytest.raises(mhkd.UsageError, match="must be 16 bits, 0 black, opaque"):
            of_folder(folder)
        path.unlink()


def test_images_are_decoded_again_by_other_code(folder, decoded, monkeypatch):
    of_folder(folder)
    before = len(decoded)
    of_folder(folder)
    assert len(decoded) == before > 0
    monkeypatch.setattr("mhkd_code.code_sha256", lambda roots: "of other code")
    of_folder(folder)
    assert len(decoded) == 2 * before


def test_the_command_line_and_a_program_use_the_same_decoded_images(folder, tmp_path):
    options = [*FOLDER, folder, "--batch-size", "2"]
    assert script(*options, "--out", tmp_path / "runs").returncode == 0
    assert run(tmp_path / "runs", *options, "--seed", "1") == 0
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 1


def test_unlabelled_images_of_a_data_set_must_be_the_last_ones(tmp_path, monkeypatch):
    def source(last):
        labels = torch.arange(30) % 2
        labels[-5 if last else 3 :][:5] = mhkd.UNLABELLED
        return lambda i: torch.zeros(len(i), 16, 16, 3, dtype=torch.uint8), labels, 15, ["a", "b"]

    for last in (True, False):
        kind = mhkd_data.DataSet(lambda _, last=last: source(last), {"image_size": 16})
        monkeypatch.setitem(mhkd_data.DATASETS, "mine", kind)
        if last:
            assert len(load(tmp_path, "mine", batch_size=8).train) == 15 + 5
        else:
            with pytest.raises(mhkd.UsageError, match="unlabelled images of mine must be the last"):
                load(tmp_path, "mine", batch_size=8)


def test_a_recipe_with_a_setting_that_has_one_default_for_all_data_is_refused(monkeypatch):
    others = {"augment": "trivial", "teacher_store": "float32", "view_seed": 3}
    for name, value in (others | {"units": (1, 2), "teacher_heads": "pretrained"}).items():
        kind = mhkd_data.DataSet(mhkd_data.from_digits, {"epochs": 7, name: value})
        monkeypatch.setitem(mhkd_data.DATASETS, "mine", kind)
        message = f"recipe of the data set mine cannot contain {name}"
        with pytest.raises(mhkd.UsageError, match=message):
            mhkd.Config("resnet14", "resnet8", method="mhkd", dataset="mine")


def test_transparent_pixels_are_black_whatever_colour_they_hide(folder):
    array = np.full((32, 32, 4), 200, np.uint8)
    array[..., 3] = np.where(np.arange(32) < 16, 0, 255)
    image = decoded_as(folder, array)
    assert (image[:, :16] == 0).all() and (image[:, 16:] == 200).all()


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "validation")])
def test_parts_with_other_names_are_not_taken_for_classes(names, folder):
    for old, new in zip(("train", "val"), names):
        (folder / old).rename(folder / f"{new}_")  # macOS ignores the case
        (folder / f"{new}_").rename(folder / new)
    for options in ({}, {"test_fraction": 0.2}):
        with pytest.raises(mhkd.UsageError, match=f"rename '.*{names[0]}' to 'train' and"):
            of_folder(folder, **options)


def test_runs_inside_of_the_data_are_no_class(tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    for name in ("cat", "dog", "runs", "unlabelled"):
        for i in range(4):
            save_image(photos / name / f"{i}.png", pixels(32, 32, 3, seed=i))
    monkeypatch.chdir(photos)
    settings = {"dataset": "folder", "data": Path("."), "test_fraction": 0.25, "image_size": 32}
    settings |= {"teacher": "resnet14", "student": "resnet8", "method": "kd"}
    data = mhkd.load_data(mhkd.Config(**settings))  # --out runs
    assert data.classes == ["cat", "dog"] and data.facts["unlabelled"] == 4
    assert "1 folders that are not used (runs)" in capsys.readouterr().out
    (photos / "runs" / "a run").mkdir()
    (photos / "runs" / "a run" / "config.json").touch()
    assert mhkd.load_data(mhkd.Config(**settings | {"out": tmp_path})).classes == ["cat", "dog"]
    for out in (photos, photos / "more" / "runs"):
        with pytest.raises(mhkd.UsageError, match="must be outside of the classes of --data"):
            mhkd.load_data(mhkd.Config(**settings | {"out": out}))


def test_folders_beside_the_parts_that_are_not_used_are_named(folder, capsys):
    save_image(folder / "unlabeled" / "a.png", pixels(32, 32, 3))
    of_folder(folder)
    assert "1 folders that are not used (unlabeled)" in capsys.readouterr().out


def test_a_test_folder_is_taken_rather_than_a_val_folder(folder):
    for name, colour in (("cat", 10), ("dog", 20)):
        save_image(folder / "test" / name / "x.png", np.full((40, 40, 3), colour, np.uint8))
    assert np.unique(images_of(of_folder(folder), "test")).tolist() == [10, 20]


def test_images_of_one_colour_can_be_normalised_and_are_noted(folder, capsys):
    for path in folder.rglob("*.*"):
        save_image(path, np.full((32, 32, 3), 90, np.uint8))
    data = of_folder(folder)
    assert data.center_crop(data.train).isfinite().all()
    assert "all pixels of the training images are the same" in capsys.readouterr().out


def test_an_epoch_from_a_mapping_has_every_image_once_with_its_label(folder):
    data, settings = of_folder(folder), config(folder, dataset="folder", batch_size=2)
    images, labels, places = map(torch.cat, zip(*mhkd.epoch_batches(data, settings, 1)))
    assert sorted(places.tolist()) == [*range(6)] and images.shape == (6, 3, 32, 32)
    assert torch.equal(labels, data.labels[data.train[places]])


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the images that are decoded from now on."""
    names, real = [], mhkd_images.decode_one
    monkeypatch.setattr(
        mhkd_images, "decode_one", lambda p, f, s: names.append(f.name) or real(p, f, s)
    )
    return names


def test_a_folder_is_decoded_once_and_a_subset_of_it_only_where_it_is_needed(folder, decoded):
    of_folder(folder, subset=2)
    assert len(decoded) == 4
    first, second = of_folder(folder), of_folder(folder)
    assert len(decoded) == 12
    assert torch.equal(first.images, second.images) and first.sha256 == second.sha256


def swap(root):
    """Two files of one size change places, and keep their times."""
    one, other = root / "train" / "cat" / "a.png", root / "train" / "dog" / "exact.png"
    for path, new in ((one, root / "spare"), (other, one), (root / "spare", other)):
        path.rename(new)


@pytest.mark.parametrize("change, left, size", [
    (lambda root: save_image(root / "train/dog/exact.png", pixels(32, 32, 3, seed=60)), 6, 32),
    (lambda root: save_image(root / "train/dog/new.png", pixels(32, 32, 3, seed=61)), 7, 32),
    (lambda root: (root / "train/dog/exact.png").unlink(), 5, 32),
    (swap, 6, 32), (lambda root: None, 6, 24),
], ids=["overwritten", "added", "removed", "swapped with times kept", "another size"])  # fmt: skip
def test_the_decoded_images_are_made_anew_where_something_changed(change, left, size, folder):
    for i, name in enumerate(("cat/a.png", "dog/exact.png")):  # of one size and time
        save_image(folder / "train" / name, pixels(32, 32, 3, seed=62 + i), compress_level=0)
        os.utime(folder / "train" / name, (1, 1))
    before = of_folder(folder)
    change(folder)
    after = of_folder(folder, image_size=size)
    assert after.sha256 != before.sha256
    assert len(after.train) == left
    assert after.images.shape[1:] == (size, size, 3)


@pytest.mark.parametrize("file, harm", [
    ("images.u8", lambda c: c[:-1] + bytes([c[-1] ^ 1])), ("images.u8", lambda c: c[:4096]),
    ("index.json", lambda c: c.replace(b"a", b"b", 1)),
    ("index.json", lambda c: b'{"chunks": ["of an earlier version"]}'),
], ids=["flipped bit", "truncated", "index", "earlier version"])  # fmt: skip
def test_a_damaged_mapping_is_noticed_and_made_again(file, harm, folder, decoded, capsys):
    wanted = of_folder(folder).images.clone()
    (path,) = (folder.parent / "out").rglob(file)
    path.write_bytes(harm(path.read_bytes()))
    decoded.clear()
    assert torch.equal(of_folder(folder).images, wanted) and len(decoded) == 8
    assert "decoding 8 images into" in capsys.readouterr().out


def test_a_decoding_that_was_killed_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    save_image(tmp_path / "one.png", pixels(16, 16, 3))
    for i in range(1200):  # three chunks
        path = tmp_path / "many" / ("train", "val")[i % 3 == 2] / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "one.png").read_bytes())
    options = [*FOLDER, tmp_path / "many", "--batch-size", "450"]
    killed = [*options, "--out", tmp_path / "out"]
    assert end_of(start(*killed, die=("fsync", 3))) == -signal.SIGKILL  # its second chunk
    assert end_of(start(*killed, output=tmp_path / "said")) == 0
    assert "decoding 688 images into" in (tmp_path / "said").read_text()
    assert run(tmp_path / "again", *options) == 0
    one, other = (next((tmp_path / n).rglob("images.u8")) for n in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_a_full_disk_while_decoding_is_a_sentence_that_names_the_file(
    folder, monkeypatch, failing, tmp_path
):
    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "images.u8' could not be written" in failing(tmp_path / "out", *FOLDER, folder)
    assert run(tmp_path / "out", *FOLDER, folder) == 0


# Held out images, digits


def test_the_held_out_images_are_a_share_of_every_class_always_the_same(tmp_path):
    share = 0.1
    whole, data = load(tmp_path), load(tmp_path, val_fraction=share)
    counts = np.bincount(labels_of(whole, "train"))
    held = np.bincount(labels_of(data, "val"))
    assert (abs(held - share * counts) <= 0.5).all()
    assert sorted([*data.train.tolist(), *data.val.tolist()]) == whole.train.tolist()
    assert torch.equal(data.test, whole.test) and len(whole.val) == 0
    assert torch.equal(data.val, load(tmp_path, val_fraction=share, seed=1).val)


def test_digits_are_1437_to_train_on_and_360_others_to_test_and_need_no_files(tmp_path):
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    data = load(tmp_path / "none", image_size=32)
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
    whole, small, same, other = (
        load(tmp_path, batch_size=10, **values)
        for values in ({}, {"subset": 50}, {"subset": 50, "seed": 3}, {"subset": 51})
    )
    assert (len(small.train), len(small.test)) == (50, 360)
    few = load(tmp_path, batch_size=10, subset=50, test_subset=20)
    assert (len(few.train), len(few.test)) == (50, 20)
    assert torch.equal(few.images[few.train], small.images[small.train])
    pool = {image.tobytes() for image in images_of(whole, "train")}
    assert all(image.tobytes() in pool for image in images_of(small, "train"))
    assert len(load(tmp_path, subset=10_000).train) == 1437
    assert torch.equal(small.images, same.images)
    assert small.sha256 == same.sha256 != other.sha256


# Data sets of one's own


def own(monkeypatch, images, labels=None, classes=3, **settings):
    labels = torch.arange(len(images)) % 3 if labels is None else labels
    source = (lambda i: images[i], labels, len(images) // 2, [*"abcdefgh"[:classes]])
    monkeypatch.setitem(mhkd.DATASETS, "mine", mhkd.DataSet(lambda config: source, **settings))


def test_the_milestones_of_a_data_sets_recipe_follow_its_epochs(tmp_path, monkeypatch):
    for recipe, steps in (({}, (150, 180, 210)), ({"lr_steps": (40,)}, (40,))):
        own(monkeypatch, torch.zeros(8, 32, 32, 3, dtype=torch.uint8), recipe=recipe)
        assert config(tmp_path, dataset="mine").lr_steps == steps
        own(
            monkeypatch,
            torch.zeros(8, 32, 32, 3, dtype=torch.uint8),
            recipe={"epochs": 60} | recipe,
        )
        usual = config(tmp_path, dataset="mine")
        assert usual.lr_steps == (steps if recipe else (38, 45, 52)) and not usual.differs
        half = config(tmp_path, dataset="mine", epochs=30)
        assert half.lr_steps == ((20,) if recipe else (19, 22, 26))


def test_a_list_of_milestones_is_the_tuple(tmp_path):
    given = config(tmp_path, dataset="cifar100", lr_steps=[150, 180, 210])
    assert given.lr_steps == (150, 180, 210) and not given.differs


@pytest.mark.parametrize("recipe, message", [
    ({"epoch": 60}, "mine named 'epoch': did you mean epochs"),
    ({"negatives": 5, "nce": 1}, "'nce'"),
])  # fmt: skip
def test_a_setting_that_does_not_exist_is_refused_in_a_recipe(
    recipe, message, tmp_path, monkeypatch
):
    own(monkeypatch, torch.zeros(8, 32, 32, 3, dtype=torch.uint8), recipe=recipe)
    with pytest.raises(mhkd.UsageError, match=message):
        config(tmp_path, dataset="mine")


BYTES = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)


@pytest.mark.parametrize("images, settings, message", [
    (torch.rand(8, 28, 28, 3), {}, r"32 \[8, 28, 28, 3\] for 8 indices, not uint8 \[8, M, M, 3\]"),
    (BYTES[:, :, :24], {}, r"uint8 \[8, 32, 24, 3\]"), (BYTES[..., 0], {}, r"\[8, 32, 32\]"),
    (BYTES[:, :24, :24], {"mapped": True}, "24 pixels: use --image-size 24"),
    (BYTES[:0], {}, "mine has 0 training, 0 validation and 0 test images: more"),
    (BYTES, {"labels": [0, 1, 2, 2, 0, 1, 2, 3]}, "labels from 0 to 3 for 3 classes"),
    (BYTES, {"labels": [0, 1, 2, 2, 0, 1, 2, -2]}, "labels from -2 to 2"),
    (BYTES, {"labels": [0.0, 1, 2, 2, 0, 1, 2, 2]}, "float32 labels of shape .8.*give integers"),
    (BYTES, {"labels": list("aabbccaa")}, "labels of mine are no numbers.*give integers"),
    (BYTES, {"labels": [[0]] * 8}, r"labels of shape \[8, 1\]"),
    (BYTES, {"statistics": ((125.3, 123.0, 114.0), (63.0, 62.0, 66.0))}, "wrong mean .*0 to 1"),
])  # fmt: skip
def test_what_a_data_set_gives_is_checked(images, settings, message, tmp_path, monkeypatch):
    own(monkeypatch, images, **settings)
    with pytest.raises(mhkd.UsageError, match=message):
        load(tmp_path, "mine", batch_size=2)


def test_a_data_set_that_ignores_the_indices_is_refused(tmp_path, monkeypatch):
    source = lambda config: (lambda indices: BYTES, torch.arange(8) % 3, 6, list("abc"))  # noqa: E731
    monkeypatch.setitem(mhkd.DATASETS, "mine", mhkd.DataSet(source))
    assert len(load(tmp_path, "mine", batch_size=2).train) == 6
    with pytest.raises(mhkd.UsageError, match="for 5 indices, not uint8 .5, M, M, 3"):
        load(tmp_path, "mine", batch_size=2, subset=3)


def test_arrays_of_numpy_and_names_of_any_kind_are_a_data_set(tmp_path, monkeypatch):
    source = lambda config: (  # noqa: E731
        lambda indices: BYTES.numpy()[indices],
        np.arange(8, dtype=np.int32) % 3,
        6,
        np.arange(3),
    )
    monkeypatch.setitem(mhkd.DATASETS, "mine", mhkd.DataSet(source))
    data = load(tmp_path, "mine", batch_size=2)
    assert data.classes == ["0", "1", "2"] and data.labels.dtype == torch.int64


def test_classes_without_training_or_validation_images_are_named(tmp_path, monkeypatch, capsys):
    labels = torch.tensor([0] * 20 + [1] * 20 + [2] + [0, 1, 2])
    images = torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8)
    source = lambda config: (lambda i: images[i], labels, 41, ["cat", "dog", "eel"])  # noqa: E731
    monkeypatch.setitem(mhkd.DATASETS, "mine", mhkd.DataSet(source))
    data = load(tmp_path, "mine", val_fraction=0.6, batch_size=2)
    # The only image of a class is used for training.
    assert data.train_labels.bincount().tolist() == [8, 8, 1]
    assert "note: 1 classes have no validation images: eel" in capsys.readouterr().out
    labels[40] = 0
    load(tmp_path, "mine", batch_size=2)
    assert "note: 1 classes have no training images: eel" in capsys.readouterr().out


def test_data_that_were_loaded_with_other_settings_are_refused(tmp_path, capsys):
    data = load(tmp_path, subset=100)
    capsys.readouterr()
    for name, value in (("subset", 80), ("val_fraction", 0.1), ("mean", (0.1, 0.1, 0.1))):
        other = {"subset": 100, name: value} | ({"std": (0.2, 0.2, 0.2)} if name == "mean" else {})
        with pytest.raises(mhkd.UsageError, match=f"loaded with {name} .*load them with this"):
            mhkd.train(config(tmp_path, dataset="digits", **other), data)
    assert len(load(tmp_path, subset=2000).train) == 1437
    assert "2000 images is asked for, and there are 1437" in capsys.readouterr().out


def test_labels_that_were_changed_after_loading_are_other_data(tmp_path, capsys):
    settings = {"subset": 40, "test_subset": 20, "method": "ce", "teacher": None, "epochs": 1}
    settings |= {"dataset": "digits", "device": "cpu", "batch_size": 20}
    given = config(tmp_path, **settings)
    data = mhkd.load_data(given)
    first = mhkd.train(given, data)["data_sha256"]
    assert first == data.sha256 and "changed after loading" not in capsys.readouterr().out
    other = dataclasses.replace(data, labels=9 - data.labels)
    with pytest.raises(mhkd_runs.RunError, match="another data: run again with --overwrite"):
        mhkd.train(given, other)
    assert "note: labels or parts of the data were changed" in capsys.readouterr().out


def test_images_that_were_changed_after_loading_are_other_data_and_copies_are_not(tmp_path, capsys):
    settings = {"dataset": "digits", "method": "ce", "teacher": None}
    data, cpu = mhkd.load_data(config(tmp_path, **settings)), torch.device("cpu")
    same = [data, copy.deepcopy(data), pickle.loads(pickle.dumps(data)), data.labelled()]
    same.append(dataclasses.replace(data, images=data.images.clone()))
    assert {mhkd_data.on_device(part, cpu).sha256 for part in same} == {data.sha256}
    assert "changed after loading" not in capsys.readouterr().out
    inverted = dataclasses.replace(data, images=255 - data.images)
    changed = mhkd_data.on_device(inverted.to(cpu), cpu)
    assert changed.sha256 != data.sha256 == inverted.sha256
    assert "note: images of the data were" in capsys.readouterr().out
    assert mhkd_data.on_device(changed, cpu).sha256 == changed.sha256
    data.images.copy_(inverted.images)
    assert mhkd_data.on_device(copy.deepcopy(data), cpu).sha256 == changed.sha256
    assert mhkd_data.on_device(data, cpu).sha256 == changed.sha256
    twice = [torch.cat([data.images, more]) for more in (data.images[:1], 255 - data.images[:1])]
    labels = torch.cat([data.labels, data.labels[:1]])
    added = [dataclasses.replace(data, images=images, labels=labels) for images in twice]
    assert len({mhkd_data.on_device(part, cpu).sha256 for part in (data, *added)}) == 3


def test_the_accuracy_of_classes_of_one_name_is_that_of_each(tmp_path):
    given = config(tmp_path, dataset="digits", method="ce", teacher=None)
    data = dataclasses.replace(mhkd.load_data(given), classes=["crane", *"123456789"])
    data.classes[2] = "crane"
    result = mhkd.evaluate(mhkd.build_model("resnet8", 10), data)
    assert len(result["class_accuracy"]) == 10 and "crane (class 2)" in result["class_accuracy"]
    mean = sum(result["class_accuracy"].values()) / 10
    assert result["mean_class_accuracy"] == pytest.approx(mean)


# Augmentation and normalisation


def test_crop_and_flip_are_those_of_a_slow_loop_over_the_images(device, tmp_path):
    images = pixels(40, 12, 12, 3)
    _, corners, mirrored, _ = mhkd.draw_epoch(config(tmp_path, dataset="cifar100"), 40, 1)
    wanted = []
    for image, (row, column), flip in zip(images, corners.tolist(), mirrored.tolist()):
        crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[row : row + 12, column : column + 12]
        wanted.append(crop[:, ::-1] if flip else crop)
    tensors = (t.to(device) for t in (torch.from_numpy(images), corners, mirrored))
    assert np.array_equal(mhkd.augment(*tensors, 4).cpu().numpy(), np.stack(wanted))


def test_resized_crop_and_flip_are_scipys_interpolation_between_the_pixels(device, tmp_path):
    ndimage = pytest.importorskip("scipy.ndimage")
    M, S, span = 20, 14, (np.arange(14) + 0.5) / 14
    images = torch.rand(6, M, M, 3, dtype=torch.float64)
    draw = config(tmp_path, dataset="folder", image_size=64)
    _, boxes, mirrored, _ = mhkd.draw_epoch(draw, 6, 1)
    assert 0 < mirrored.sum() < 6
    boxes, wanted = boxes.double(), np.empty((6, S, S, 3))
    for b, (x, y, width, height) in enumerate(boxes.tolist()):
        columns = (x - width / 2 + width * (span[::-1] if mirrored[b] else span)) * M - 0.5
        rows = (y - height / 2 + height * span) * M - 0.5
        places = np.meshgrid(rows, columns, indexing="ij")
        for c, channel in enumerate(images[b].permute(2, 0, 1).numpy()):
            wanted[b, :, :, c] = ndimage.map_coordinates(channel, places, order=1, mode="nearest")
    found = mhkd_images.resized_crop(*(t.to(device) for t in (images, boxes, mirrored)), S)
    np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=0, atol=1e-9)


def test_boxes_lie_inside_and_have_the_wanted_areas_and_ratios(tmp_path):
    draw = config(tmp_path, dataset="folder", image_size=64, crop_scale=0.2)
    _, boxes, mirrored, _ = mhkd.draw_epoch(draw, 5000, 1)
    centres, sides = boxes[:, :2], boxes[:, 2:]
    assert (centres - sides / 2 >= -1e-6).all() and (centres + sides / 2 <= 1 + 1e-6).all()
    area, ratio = sides.prod(dim=1), (sides[:, 0] / sides[:, 1]).log()
    assert area.min() >= 0.19 and area.max() <= 1 and abs(area.mean() - 0.6) < 0.03
    assert ratio.abs().max() <= math.log(4 / 3) + 1e-4 and abs(ratio.mean()) < 0.02
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.mark.parametrize(
    "policy, name", [("trivial", "TrivialAugmentWide"), ("rand", "RandAugment")]
)
def test_each_image_is_augmented_by_torchvision_from_its_own_seed(policy, name):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, seeds = torch.from_numpy(pixels(9, 20, 20, 3)), torch.arange(9) + 2**61
    state = torch.get_rng_state()
    found = mhkd_images.apply_policy(images, policy, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    for image, seed, changed in zip(images, seeds, found):
        with torch.random.fork_rng():
            torch.manual_seed(seed.item())
            wanted = getattr(v2, name)()(image.permute(2, 0, 1)).permute(1, 2, 0)
        assert torch.equal(changed, wanted)
    assert sum(map(torch.equal, images, found)) < 4  # some operations change nothing
    some = torch.tensor([4, 1])
    assert torch.equal(mhkd_images.apply_policy(images[some], policy, seeds[some]), found[some])


@pytest.mark.parametrize("size", [32, 64])
def test_augmentation_follows_crop_and_flip_and_is_drawn_with_the_view(tmp_path, monkeypatch, size):
    pytest.importorskip("torchvision")
    for i in range(8):
        for part in ("train", "test"):
            save_image(tmp_path / part / f"{i % 2}" / f"{i}.png", pixels(80, 80, 3, seed=i))
    plain = of_folder(tmp_path, image_size=size)
    settings = {"dataset": "folder", "image_size": size, "view_seed": 0, "batch_size": 8}

    def view(policy, seed=0, epoch=1):
        made = config(tmp_path, **settings, augment=policy, seed=seed)
        (images, _, indices) = next(mhkd.epoch_batches(plain, made, epoch))
        return images[indices.argsort()]

    trivial = view("trivial")
    assert torch.equal(trivial, view("trivial", seed=1))
    assert not torch.equal(trivial, view("trivial", epoch=2))
    assert not torch.equal(trivial, view("crop"))
    unchanged = lambda images, policy, seeds: images  # noqa: E731
    monkeypatch.setattr(mhkd_images, "apply_policy", unchanged)
    assert torch.equal(view("trivial"), view("crop"))


def test_a_run_at_64_pixels_from_a_mapping_is_killed_and_resumed_bit_for_bit(tmp_path):
    for i in range(24):
        place = tmp_path / "large" / ("train", "val")[i % 3 == 2] / f"{i % 2}"
        save_image(place / f"{i}.png", pixels(80, 70 + i, 3, seed=i))
    options = [*FOLDER, tmp_path / "large", "--epochs", "3", "--image-size", "64"]
    options += ["--val-fraction", "0.25", "--augment", "trivial"]
    killed = [*options, "--out", tmp_path / "a"]
    assert end_of(start(*killed, die=("replace", 6))) == -signal.SIGKILL
    assert end_of(start(*killed, output=tmp_path / "said")) == 0
    assert "continues after epoch 1" in (tmp_path / "said").read_text()
    assert run(tmp_path / "b", *options) == 0
    (one,), (other,) = ((tmp_path / n).glob("folder*") for n in "ab")
    assert outcome(one) == outcome(other)


def test_evaluation_sees_the_middle_of_the_stored_images_normalised(folder, device):
    save_image(folder / "val" / "cat" / "d.png", pixels(74, 74, 3))
    data = of_folder(folder, image_size=64).to(device)
    assert data.images.shape[1:3] == (74, 74)  # 1.15 times as large
    scaled = pixels(74, 74, 3)[5:69, 5:69] / 255
    wanted = ((scaled - np.array(data.mean)) / np.array(data.std)).transpose(2, 0, 1)
    found = data.center_crop(data.test)[0]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.cpu().numpy(), wanted, atol=2e-5)


def test_draws_reach_every_corner_and_half_of_the_images_are_flipped(tmp_path):
    settings = config(tmp_path, dataset="cifar100")
    order, corners, mirrored, _ = draws = mhkd.draw_epoch(settings, 5000, 1)
    assert not any(map(torch.equal, mhkd.draw_epoch(settings, 5000, 2), draws))
    assert sorted(order.tolist()) == list(range(5000))
    assert len({tuple(corner) for corner in corners.tolist()}) == 81
    assert (corners.min().item(), corners.max().item()) == (0, 8)
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.mark.parametrize("values", [{"dataset": "digits"}, {"dataset": "cifar100", "flip": False}])
def test_digits_are_never_flipped_and_others_not_with_no_flip(values, tmp_path):
    assert not mhkd.draw_epoch(config(tmp_path, **values), 500, 1)[2].any()

"""Folders without a test part, and unlabelled images: issue 25, parts 5 and 6."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import end_of, environments, pixels, run, save_image, start
from test_training import read

import mhkd
import mhkd_images
import mhkd_record

pytest.importorskip("PIL")


@pytest.fixture
def photos(tmp_path):
    """Two classes of 10 images, without train/."""
    for i, (name, n) in enumerate(itertools.product(("cat", "dog"), range(10))):
        save_image(tmp_path / "photos" / name / f"{n}.png", pixels(16, 16, 3, seed=i))
    return tmp_path / "photos"


@pytest.fixture
def parted(photos):
    """The same with train/ and test/, and five unlabelled images at several depths."""
    for name, n in itertools.product(("cat", "dog"), range(10)):
        place = photos / ("train" if n < 7 else "test") / name
        place.mkdir(parents=True, exist_ok=True)
        (photos / name / f"{n}.png").rename(place / f"{n}.png")
    for name in ("cat", "dog"):
        (photos / name).rmdir()
    for i, name in enumerate(("a.png", "b.jpg", "x/c.png", "x/y/d.png", "z/e.png")):
        save_image(photos / "unlabelled" / name, pixels(20, 16, 3, seed=50 + i))
    return photos


def config(folder, **values):
    settings = {"student": "resnet8", "teacher": "resnet14", "method": "fitnet", "batch_size": 4}
    settings |= {"dataset": "folder", "data": str(folder), "out": str(folder.parent / "out")}
    return mhkd.Config(**settings | {"image_size": 16} | values)


def load(folder, **values):
    return mhkd.load_data(config(folder, **values))


def pixels_of(data, part):
    return {bytes(image.numpy()) for image in data.images[getattr(data, part)]}


# A fraction for the test


def test_a_folder_of_classes_is_divided_per_class_and_always_in_the_same_way(photos, tmp_path):
    data = load(photos, test_fraction=0.2)
    assert data.classes == ["cat", "dog"]
    assert data.labels[data.test].tolist() == [0, 0, 1, 1]
    assert data.labels[data.train].tolist() == [0] * 8 + [1] * 8
    assert not pixels_of(data, "train") & pixels_of(data, "test")
    shutil.copytree(photos, tmp_path / "elsewhere")
    other = load(tmp_path / "elsewhere", test_fraction=0.2, seed=3)
    assert other.sha256 == data.sha256 and torch.equal(other.images, data.images)
    # A further image of one class changes the test images by one at most.
    save_image(photos / "cat" / "new.png", pixels(16, 16, 3, seed=99))
    more = load(photos, test_fraction=0.2)
    assert len(pixels_of(more, "test") & pixels_of(data, "test")) >= 3
    assert [len(load(photos, test_fraction=f).test) for f in (0.01, 0.45, 0.8)] == [2, 9, 17]


def test_the_fraction_is_recorded_and_its_runs_have_their_own_names(photos):
    one, other = config(photos, test_fraction=0.2), config(photos, test_fraction=0.3)
    assert one.differs["test_fraction"] == 0.2
    assert mhkd_record.name_of(one, one.differs) != mhkd_record.name_of(other, other.differs)
    assert one.of_teacher().test_fraction == 0.2


def test_a_fraction_where_there_are_parts_or_no_fraction_where_there_are_none_is_an_error(parted):
    with pytest.raises(mhkd.UsageError, match="--test-fraction.*train' exists: leave it out"):
        load(parted, test_fraction=0.2)
    shutil.rmtree(parted / "train")
    with pytest.raises(mhkd.UsageError, match="no folder .*train.*--test-fraction 0.2"):
        load(parted)
    with pytest.raises(mhkd.UsageError, match="--test-fraction must be above 0 and below 1"):
        config(parted, test_fraction=1.0)
    for name, value in (("test_fraction", 0.2), ("unlabelled", "some")):
        with pytest.raises(mhkd.UsageError, match="is for --dataset folder, not digits"):
            config(parted, dataset="digits", **{name: value})


def test_a_flat_folder_with_a_class_of_one_image_or_of_none_is_an_error(photos):
    (photos / "few").mkdir()
    with pytest.raises(mhkd.UsageError, match="few' contains no images"):
        load(photos, test_fraction=0.2)
    save_image(photos / "few" / "a.png", pixels(16, 16, 3))
    with pytest.raises(mhkd.UsageError, match="few' has one image: training and test need one"):
        load(photos, test_fraction=0.2)
    for name in ("few", "dog"):
        shutil.rmtree(photos / name)
    with pytest.raises(mhkd.UsageError, match="photos' has 1 class folders"):
        load(photos, test_fraction=0.2)


# Unlabelled images


def test_unlabelled_images_are_training_images_without_a_label(parted):
    data = load(parted, val_fraction=0.3)
    assert data.labels[data.train].tolist() == [0] * 5 + [1] * 5 + [mhkd.UNLABELLED] * 5
    assert data.facts["unlabelled"] == 5 and data.labelled_fraction == 10 / 15
    for part in ("val", "test"):
        assert (data.labels[getattr(data, part)] >= 0).all()
        assert not pixels_of(data, part) & pixels_of(data, "train")
    small = load(parted, subset=4)
    assert (small.train_labels >= 0).sum() == 4 and len(small.train) == 9
    assert mhkd.evaluate(mhkd.build_model("resnet8", 2), data)["accuracy"] >= 0


def test_what_the_labelled_images_are_does_not_depend_on_the_others(parted):
    data, ce = load(parted), load(parted, method="ce", teacher=None)
    assert ce.facts.get("unlabelled") is None and ce.unlabelled_sha256 is None
    alone = data.labelled()
    assert (alone.sha256, alone.mean, alone.std) == (ce.sha256, ce.mean, ce.std)
    assert pixels_of(alone, "train") == pixels_of(ce, "train")
    assert alone.labelled_fraction == 1 and "unlabelled" not in alone.facts
    before = data.unlabelled_sha256
    save_image(parted / "unlabelled" / "a.png", pixels(16, 16, 3, seed=98))
    assert load(parted).unlabelled_sha256 != before and load(parted).sha256 == data.sha256


def test_the_folder_can_be_named_and_may_be_beside_a_flat_one(parted, photos, tmp_path):
    (parted / "unlabelled").rename(tmp_path / "elsewhere")
    assert load(parted).labelled_fraction == 1
    named = load(parted, unlabelled=str(tmp_path / "elsewhere"))
    assert named.facts["unlabelled"] == 5 and named.facts["left_out"] == {}
    (parted / "train").rename(tmp_path / "flat")
    (tmp_path / "elsewhere").rename(tmp_path / "flat" / "unlabelled")
    flat = load(tmp_path / "flat", test_fraction=0.2)
    assert flat.classes == ["cat", "dog"] and flat.facts["unlabelled"] == 5


def test_unlabelled_images_that_cannot_be_used_are_an_error_that_says_what_to_do(parted):
    with pytest.raises(mhkd.UsageError, match="no folder 'nowhere', which --unlabelled names"):
        load(parted, unlabelled="nowhere")
    for method in ("crd", "lsh", "crd+mhkd"):
        name = method.partition("+")[0]
        with pytest.raises(mhkd.UsageError, match=f"--method {name} needs the labels of all image"):
            load(parted, method=method)
        with pytest.raises(mhkd.UsageError, match=f"--method {name} needs the labels of all image"):
            config(parted, method=method, unlabelled="some")
    with pytest.raises(mhkd.UsageError, match="--method ce cannot use --unlabelled: leave it out"):
        config(parted, method="ce", unlabelled=str(parted / "unlabelled"))
    (parted / "train" / "unlabelled").mkdir()
    with pytest.raises(mhkd.UsageError, match="train/unlabelled' would be a class: move it.*renam"):
        load(parted)
    shutil.rmtree(parted / "train" / "unlabelled")
    shutil.rmtree(parted / "unlabelled")
    (parted / "unlabelled").mkdir()
    with pytest.raises(mhkd.UsageError, match="unlabelled' contains no images"):
        load(parted)


@pytest.mark.parametrize("folder", ["", "train", "train/cat", "test"])
def test_labelled_and_test_images_are_not_taken_for_unlabelled_ones(parted, folder):
    with pytest.raises(mhkd.UsageError, match="an unlabelled image and also a labelled or a test"):
        load(parted, unlabelled=str(parted / folder))


def test_a_class_folder_is_not_taken_for_a_folder_of_unlabelled_images(photos):
    with pytest.raises(mhkd.UsageError, match="an unlabelled image and also a labelled or a test"):
        load(photos, test_fraction=0.2, unlabelled=str(photos / "cat"))


def test_ce_does_not_read_unlabelled_images(parted):
    (parted / "unlabelled" / "a.png").write_text("no image")
    *_, facts = mhkd_images.from_folder(config(parted, method="ce", teacher=None))
    assert facts == {"left_out": {}, "unreadable": []}


def test_the_cross_entropy_counts_labelled_rows_and_is_0_without_any():
    z = torch.randn(6, 3, requires_grad=True)
    labels = torch.tensor([0, 2, -1, 1, -1, -1])
    torch.testing.assert_close(
        mhkd.mean_cross_entropy(z, labels), F.cross_entropy(z[[0, 1, 3]], labels[[0, 1, 3]])
    )
    loss = mhkd.mean_cross_entropy(z, torch.full((6,), mhkd.UNLABELLED))
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("method", ["fitnet", "dhkd", "cc+rkd"])
def test_methods_train_with_batches_that_have_few_labels_or_none(method, parted):
    for i in range(21):  # 14 labelled of 40
        save_image(parted / "unlabelled" / f"more{i}.png", pixels(16, 16, 3, seed=60 + i))
    data = load(parted, method=method)
    options = config(parted, method=method)
    distiller = mhkd.Distiller(options, data, mhkd.build_model("resnet14", 2)).train()
    steps, sizes, right, labelled, ce = [], [], 0, 0, 0
    for images, labels, indices in mhkd.epoch_batches(data, options, 1):
        labels[:3] = mhkd.UNLABELLED
        terms, metrics = distiller(images, labels, indices)
        assert all(term.isfinite() for term in terms.values())
        distiller.backward(terms)
        steps.append(torch.stack(list(metrics.values())))
        sizes.append(len(labels))
        right += metrics["train_accuracy"] / 100
        labelled += (labels >= 0).sum()
        ce += metrics.get("ce_0", torch.zeros(())) * (labels >= 0).sum()
    means = mhkd_record.means_of(steps, sizes, [*metrics], [], 1)
    assert means.get("ce_0", 0) == pytest.approx(ce.item() / labelled.item())
    assert means["train_accuracy"] == pytest.approx(100 * right.item() / labelled.item())
    assert all(p.grad.isfinite().all() for p in distiller.student.parameters())


def test_a_teacher_that_is_trained_here_needs_a_batch_of_labelled_images(parted, tmp_path, failing):
    options = ["--dataset", "folder", "--data", parted, "--image-size", "16", "--epochs", "1"]
    options += ["--batch-size", "15", "--device", "cpu", "--student", "resnet8", "--method", "kd"]
    said = failing(tmp_path / "out", *options, "--teacher", "resnet14")
    assert "--batch-size 15 is larger than the 14 training images of --method ce" in said


def test_a_run_with_unlabelled_images_has_its_own_record_and_shares_teacher_and_student_alone(
    parted, tmp_path
):
    out = tmp_path / "out"
    options = ["--dataset", "folder", "--data", parted, "--image-size", "16", "--epochs", "1"]
    options += ["--batch-size", "4", "--device", "cpu", "--student", "resnet8"]
    taught = [*options, "--teacher", "resnet14", "--method", "fitnet"]
    assert run(out, *taught) == 0
    (folder,) = out.glob("*-fitnet-*unlabelled=5*")
    record = read(folder / "result.json")
    assert record["data_facts"]["unlabelled"] == 5 and record["differs"]["unlabelled"] == 5
    (teacher,) = out.glob("*-resnet14-ce-*")
    assert "unlabelled" not in read(teacher / "result.json")["data_facts"]
    before = (teacher / "student.pt").stat().st_mtime_ns
    (parted / "unlabelled").rename(tmp_path / "elsewhere")
    assert run(out, *taught) == 0  # without them: another run with the same teacher
    assert len([*out.glob("*-fitnet-*")]) == 2
    assert (teacher / "student.pt").stat().st_mtime_ns == before
    assert run(out, *taught, "--unlabelled", tmp_path / "elsewhere") == 0  # the first again
    assert len([*out.glob("*-fitnet-*")]) == 2
    save_image(tmp_path / "elsewhere" / "a.png", pixels(16, 16, 3, seed=97))
    assert run(out, *taught, "--unlabelled", tmp_path / "elsewhere") == 1  # other images


def test_stored_teacher_outputs_are_those_of_the_same_unlabelled_images(parted, tmp_path):
    settings = {"teacher_store": "float32", "epochs": 1, "teacher_epochs": 1, "method": "kd"}
    settings["out"] = str(tmp_path / "runs")
    one = mhkd.train(config(parted, **settings))
    save_image(parted / "unlabelled" / "more.png", pixels(16, 16, 3, seed=97))
    other = mhkd.train(config(parted, **settings, seed=1))
    assert (one["data_facts"]["unlabelled"], other["data_facts"]["unlabelled"]) == (5, 6)
    (parted / "unlabelled").rename(tmp_path / "away")
    mhkd.train(config(parted, **settings, seed=2))  # reads the rows of the labelled images
    stored = [torch.load(path) for path in tmp_path.glob("runs/cache/teacher-*/logits/*.pt")]
    wanted = [[*range(14, 20)], [*range(19)]]  # 14 labelled images, and 5 or 6 unlabelled ones
    assert sorted(sorted(part["indices"].tolist()) for part in stored) == sorted(wanted)


def test_a_data_set_of_a_users_program_may_have_unlabelled_images(tmp_path, monkeypatch):
    def source(config):
        images = torch.randint(256, (30, 16, 16, 3), dtype=torch.uint8)
        labels = torch.tensor([0, 1] * 10 + [mhkd.UNLABELLED] * 10)
        return lambda indices: images[indices], labels, 16, ["cat", "dog"]

    monkeypatch.setitem(mhkd.DATASETS, "mine", mhkd.DataSet(source))
    settings = {"student": "resnet8", "teacher": "resnet14", "dataset": "mine", "image_size": 16}
    settings |= {"batch_size": 8, "epochs": 1, "out": str(tmp_path), "device": "cpu"}
    data = mhkd.load_data(mhkd.Config(**settings, method="rkd"))
    assert (len(data.train), len(data.test), data.facts) == (26, 4, {"unlabelled": 10})
    result = mhkd.train(mhkd.Config(**settings, method="rkd"), data)
    assert result["differs"]["unlabelled"] == 10
    alone = mhkd.train(mhkd.Config(**settings, method="ce"), data)
    assert "unlabelled" not in alone["differs"] and alone["data_facts"] == {}
    with pytest.raises(mhkd.UsageError, match="--method crd needs the labels of all images"):
        mhkd.train(mhkd.Config(**settings, method="crd"), data)


@pytest.mark.parametrize("options", [
    ["--method", "kd"], ["--method", "mhkd", "--teacher-heads", "pretrained"],
    ["--method", "kd", "--teacher-store"], ["--method", "mhkd", "--augment", "trivial"],
], ids=["kd", "pretrained heads", "store", "augment"])  # fmt: skip
def test_kd_and_mhkd_train_on_unlabelled_images(options, parted, tmp_path):
    out = tmp_path / "out"
    common = ["--dataset", "folder", "--data", parted, "--image-size", "16", "--epochs", "2"]
    common += ["--batch-size", "4", "--device", "cpu", "--student", "resnet8"]
    common += ["--teacher", "resnet14", "--backend", "reference"]
    if "mhkd" in options:
        common += ["--head-width", "8", "--head-stride", "2"]
    assert run(out, *common, *options) == 0
    (folder,) = out.glob(f"*-resnet14-resnet8-{options[1]}-*unlabelled=5*")
    log = (folder / "log.jsonl").read_text().splitlines()
    assert len(log) == 2 and [line for line in log if "labelled" in line] == []


def test_several_processes_refuse_unlabelled_images_which_each_would_weight_by_itself(
    parted, tmp_path
):
    options = ["--dataset", "folder", "--data", parted, "--image-size", "16", "--epochs", "1"]
    options += ["--batch-size", "4", "--device", "cpu", "--student", "resnet8", "--method", "rkd"]
    options += ["--teacher", "resnet14", "--out", tmp_path / "out"]
    said = [tmp_path / f"{i}.txt" for i in range(2)]
    both = [start(*options, output=o, environment=e) for o, e in zip(said, environments(2))]
    assert [end_of(process) for process in both] == [1, 1]
    assert "unlabelled images cannot be used with several processes" in said[0].read_text()


@pytest.mark.parametrize("method", ["kd", "mhkd"])
def test_a_folder_of_unlabelled_images_may_be_named_when_the_teacher_is_trained_too(
    method, parted, tmp_path
):
    shutil.move(parted / "unlabelled", tmp_path / "extra")
    options = ["--dataset", "folder", "--data", parted, "--image-size", "16", "--epochs", "1"]
    options += ["--batch-size", "4", "--device", "cpu", "--student", "resnet8", "--method", method]
    options += ["--teacher", "resnet14", "--unlabelled", tmp_path / "extra"]
    options += ["--teacher-heads", "pretrained", "--head-width", "8"] * (method == "mhkd")
    assert run(tmp_path / "out", *options) == 0
    data = load(parted, unlabelled=str(tmp_path / "extra"), method="kd")
    mhkd.train(config(parted, method="ce", teacher=None, device="cpu", epochs=1), data)


def test_data_that_were_loaded_without_the_unlabelled_images_are_refused(parted):
    data = load(parted, method="ce", teacher=None)
    with pytest.raises(mhkd.UsageError, match="loaded with data .*photos', and the .*elsewhere'"):
        other = config(parted, device="cpu", data=str(parted.parent / "elsewhere"))
        mhkd.train(other, load(parted))
    with pytest.raises(mhkd.UsageError, match="loaded without unlabelled images"):
        mhkd.train(config(parted, device="cpu", epochs=1), data)
    assert len(load(parted).train) == len(data.train) + 5

"""The student in use: what it sees, what it accepts, export."""

import numpy as np
import pytest
import torch
from conftest import FOLDER, pixels, run, save_image
from test_elsewhere import student_file

import mhkd
import mhkd_deploy
import mhkd_runs

PIL = pytest.importorskip("PIL.Image")


def images(size, count=2, seed=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def student(tmp_path):
    """A student of 16 pixels."""
    student_file(tmp_path / "student.pt", "resnet8", 16)
    return mhkd_deploy.load_student(tmp_path / "student.pt")


# What the student sees


def save_kinds(folder):
    """Images of all kinds, most of them not square: their names."""
    array = pixels(50, 100, 3)
    exif = PIL.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    alpha = np.dstack([array, pixels(50, 100, seed=1)])
    grey16 = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    kinds = {
        "wide.png": (array, {}), "tall.jpg": (array.transpose(1, 0, 2), {}),
        "exif.jpg": (array, {"exif": exif}), "alpha.png": (alpha, {}), "grey16.png": (grey16, {}),
        "grey.png": (array[..., 0], {}), "small.png": (array[:20, :20], {}),
    }  # fmt: skip
    for name, (content, keywords) in kinds.items():
        save_image(folder / name, np.ascontiguousarray(content), **keywords)
    PIL.fromarray(array).convert("P").save(folder / "palette.gif")
    PIL.fromarray(array).convert("CMYK").save(folder / "cmyk.jpg")
    return [*kinds, "palette.gif", "cmyk.jpg"]


@pytest.mark.parametrize("size, resized", [(16, 16), (64, 74)])
def test_preprocess_gives_the_pixels_of_the_test_images_of_a_run(size, resized, tmp_path):
    names = sorted(save_kinds(tmp_path / "photos" / "test" / "a"))
    for place in ("train/a", "train/b", "test/b"):
        save_image(tmp_path / "photos" / place / "0.png", pixels(20, 20, 3))
    settings = {"student": "resnet8", "method": "ce", "dataset": "folder", "batch_size": 2}
    settings |= {"data": str(tmp_path / "photos"), "out": str(tmp_path / "out")}
    data = mhkd.load_data(mhkd.Config(**settings, image_size=size))
    student_file(tmp_path / "student.pt", "resnet8", size)  # as before there was "resize"
    old = mhkd_deploy.load_student(tmp_path / "student.pt")
    content = torch.load(tmp_path / "student.pt") | {"resize": data.images.shape[1]}
    torch.save(content, tmp_path / "student.pt")
    student = mhkd_deploy.load_student(tmp_path / "student.pt")
    assert old.resize == student.resize == resized
    at = (resized - size) // 2
    for name, index in zip(names, data.test.tolist()):
        wanted = data.images[index, at : at + size, at : at + size].permute(2, 0, 1)
        path = tmp_path / "photos" / "test" / "a" / name
        with PIL.open(path) as image:
            for given in (path, str(path), image):
                found = student.preprocess(given)
                assert found.dtype == torch.float32 and found.shape == (3, size, size)
                assert torch.equal((255 * found).round().to(torch.uint8), wanted), name


def test_a_run_reports_the_accuracy_that_predict_has_on_the_files_of_2_to_1_pictures(tmp_path):
    for part, count in (("train", 12), ("test", 6)):
        for i in range(count):  # the left and right quarters are the same for both classes
            array = np.full((40, 80, 3), 128, np.uint8)
            array[:, 20:60] = (40, 200)[i % 2] + pixels(40, 40, 3, seed=i) // 8
            save_image(tmp_path / "photos" / part / "ab"[i % 2] / f"{i}.png", array)
    options = [*FOLDER, tmp_path / "photos", "--image-size", "64", "--epochs", "3"]
    assert run(tmp_path / "out", *options, "--crop-scale", "0.5", "--lr", "0.01") == 0
    (folder,) = (tmp_path / "out").glob("folder*")
    student = mhkd_deploy.load_student(folder / "student.pt")
    paths = sorted((tmp_path / "photos" / "test").rglob("*.png"))
    found = student.predict(paths, batch_size=4)
    accuracy = 100 * np.mean([name == path.parent.name for (name, _), path in zip(found, paths)])
    assert accuracy == mhkd_runs.read_json(folder / "result.json")["accuracy"]


def test_predict_names_classes_with_their_probabilities(student, tmp_path):
    names = save_kinds(tmp_path)
    paths = [tmp_path / name for name in names]
    wanted = student(torch.stack([student.preprocess(path) for path in paths])).softmax(dim=1)
    student.train()  # a batch would be normalised by its own statistics
    for batch_size in (1, 4, 64):
        found = student.predict(paths, batch_size=batch_size)
        assert [name for name, _ in found] == [student.classes[k] for k in wanted.argmax(dim=1)]
        np.testing.assert_allclose([p for _, p in found], wanted.amax(dim=1).detach(), rtol=1e-5)
    with PIL.open(paths[0]) as image:
        assert student.predict(paths[0]) == student.predict(str(paths[0])) == student.predict(image)
        assert student.predict(image) == student.predict([image]) == student.predict(iter([image]))
    assert student.predict([]) == []


@pytest.mark.parametrize("mode, multiplied", [("RGBA", "RGBa"), ("LA", "La")])
def test_colours_that_are_multiplied_by_alpha_are_those_that_are_not(mode, multiplied, student):
    image = PIL.fromarray(np.full((16, 16, 4), (200, 100, 50, 128), np.uint8)).convert(mode)
    found = [student.preprocess(given) for given in (image, image.convert(multiplied))]
    torch.testing.assert_close(*found, atol=2 / 255, rtol=0)
    assert found[1].max() < 0.45


def test_what_is_no_image_is_refused(student, tmp_path):
    (tmp_path / "text.png").write_text("text")
    for name, message in (("text.png", "text.png' cannot be read"), ("none.png", "none.png' cann")):
        with pytest.raises(mhkd.UsageError, match=message):
            student.predict([tmp_path / name])
    with pytest.raises(mhkd.UsageError, match="not ndarray: use PIL.Image.fromarray"):
        student.preprocess(pixels(16, 16, 3))
    with pytest.raises(mhkd.UsageError, match="range of pixels of mode F is unknown.*convert it"):
        student.preprocess(PIL.fromarray(np.ones((16, 16), np.float32)))


# Types and ranges of its input


def test_the_student_takes_inputs_of_every_type_and_can_be_half_and_double(student, tmp_path):
    x = (255 * images(16)).round().to(torch.uint8)
    wanted = student(x)
    assert wanted.dtype == torch.float32
    for dtype, near in ((torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        other = mhkd_deploy.load_student(tmp_path / "student.pt").to(dtype)
        for network, of_output in ((student, torch.float32), (other, dtype)):
            for given in (x, (x / 255).to(dtype), (x / 255).double(), x / 255):
                found = network(given)
                assert found.dtype == of_output
                torch.testing.assert_close(found.float(), wanted, rtol=near, atol=near)
    assert mhkd_deploy.load_student(tmp_path / "student.pt").half()(x).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_that_are_not_in_0_to_1_are_refused(dtype, student):
    x = images(16).to(dtype)
    for outside in (1.7 * x, 255 * x, 2 * x - 1, (x - 0.45) / 0.22):
        with pytest.raises(
            mhkd.UsageError, match=r"floats in 0 to 1, not .* to .*: divide .*uint8"
        ):
            student(outside)
    assert student(1.2 * x - 0.1).isfinite().all()  # as a bicubic filter gives
    assert student(images(16)[:0]).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16, torch.bool])
def test_integers_other_than_uint8_are_refused(dtype, student):
    with pytest.raises(mhkd.UsageError, match=f"floats in 0 to 1 or uint8, not {dtype}"):
        student((255 * images(16)).to(dtype))


@pytest.mark.parametrize("how", ["export", "trace", "compile", "onnx"])
def test_the_student_can_be_exported_and_compiled(how, student, tmp_path):
    x, other = images(16), images(16, 5, seed=4)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    if how == "export":
        found = torch.export.export(student, (x,), dynamic_shapes=shapes).module()(other)
    elif how == "trace":
        found = torch.jit.trace(student, x)(other)
    elif how == "compile":
        found = torch.compile(student, backend="eager", fullgraph=True)(other)
    else:
        reference = pytest.importorskip("onnx.reference")
        pytest.importorskip("onnxscript")
        path = str(tmp_path / "student.onnx")
        torch.onnx.export(student, (x,), path, dynamo=True, dynamic_shapes=shapes)
        session = reference.ReferenceEvaluator(path)
        (array,) = session.run(None, {"images": other.numpy()})
        found = torch.from_numpy(array)
    torch.testing.assert_close(found, student(other), rtol=1e-3, atol=1e-4)


def test_a_network_that_is_given_must_fit(student, tmp_path):
    path = tmp_path / "student.pt"
    with pytest.raises(mhkd_runs.RunError, match="another network or number of classes"):
        mhkd_deploy.load_student(path, mhkd.build_model("vgg8", 4))
    with pytest.raises(mhkd.UsageError, match="model= is function, not a network"):
        mhkd_deploy.load_student(path, mhkd.build_model)

"""Stored teacher outputs: exact, shared by runs, safe against damage, kills and full disks."""

import errno
import os
import re
import signal

import pytest
import torch
from conftest import (
    ALONE,
    MHKD,
    PAIR,
    end_of,
    environments,
    folder_of,
    outcome,
    read,
    run,
    start,
    weights_of,
)

import mhkd
import mhkd_store

pytest.importorskip("sklearn")
HEADS = ["--teacher-heads", "pretrained"]
STORE = ["--teacher-store"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The options that name a teacher's checkpoint."""
    out = tmp_path_factory.mktemp("teacher")
    assert run(out, *ALONE, "--student", "resnet14") == 0
    return ["--teacher-weights", folder_of(out, "resnet14") / "student.pt"]


@pytest.fixture
def batches(monkeypatch):
    """A list with an entry for each batch that the teacher has computed in training."""
    counted, observe = [], mhkd.Distiller.observe

    def count(self, network, images):
        counted.extend([len(images)] if network is self.teacher else [])
        return observe(self, network, images)

    monkeypatch.setattr(mhkd.Distiller, "observe", count)
    return counted


def student(out, method):
    return outcome(folder_of(out, method=method.replace("+", "*")))


def views(out):
    """The files of the teacher's logits."""
    return sorted(out.glob("cache/teacher-*/logits/view-*.pt"))


@pytest.mark.parametrize("method", [
    "kd", "mhkd", "mhkd --teacher-heads logits", "crd+kd", "rkd", "lsh", "kd --augment rand",
    "lsh+mhkd",  # runs the frozen heads before the first epoch
])  # fmt: skip
def test_a_float32_store_changes_no_bit_and_the_next_run_does_not_run_the_teacher(
    tmp_path, teacher, batches, method
):
    method, *more = method.split()
    options = [*(MHKD + HEADS if "mhkd" in method else PAIR), "--method", method, *more, *teacher]
    options += ["--negatives", "50"] if "crd" in method else []
    assert run(tmp_path / "plain", *options, "--view-seed", "0") == 0
    assert run(tmp_path / "stored", *options, *STORE) == 0
    # Two epochs of five batches, twice. Before, lsh needs those of the first epoch.
    assert batches == (25 if "lsh" in method else 20) * [40]
    del batches[:]
    assert student(tmp_path / "stored", method) == student(tmp_path / "plain", method)
    assert len(views(tmp_path / "stored")) == 2
    folder_of(tmp_path / "stored", method=method.replace("+", "*")).rename(tmp_path / "first")
    assert run(tmp_path / "stored", *options, *STORE) == 0
    assert not batches
    assert student(tmp_path / "stored", method) == outcome(tmp_path / "first")


def test_runs_of_other_seeds_and_students_see_the_same_views_and_read_the_same_rows(
    tmp_path, teacher, batches
):
    options = [*PAIR, "--method", "kd", *teacher, *STORE]
    assert run(tmp_path, *MHKD, *HEADS, *teacher, *STORE) == 0
    del batches[:]
    assert run(tmp_path, *options) == 0  # another method that needs some of the outputs
    assert run(tmp_path, *options, "--seed", "1") == 0
    assert run(tmp_path, *options, "--student", "resnet20") == 0
    assert not batches
    assert run(tmp_path / "alone", *options[:-1], "--view-seed", "0", "--seed", "1") == 0
    (stored,), (alone,) = tmp_path.glob("*-seed1-*"), (tmp_path / "alone").glob("*-seed1-*")
    pairs = zip(weights_of(stored).values(), weights_of(alone).values())
    assert all(torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in pairs)


def test_views_depend_on_view_seed_and_epoch_and_not_on_seed_and_order():
    def draws(epoch=1, **settings):
        settings = {"dataset": "digits", "subset": 200, "epochs": 4, **settings}
        order, crops, flips, _ = mhkd.draw_epoch(
            mhkd.Config(student="resnet8", method="ce", flip=True, **settings), 200, epoch
        )
        by_image = order.argsort()
        return order, torch.cat([crops[by_image], flips[by_image, None]], dim=1)

    order, view = draws(view_seed=3)
    other_order, same_view = draws(view_seed=3, seed=1)
    assert not torch.equal(order, other_order) and torch.equal(view, same_view)
    for other in (draws(view_seed=4), draws(view_seed=3, epoch=2), draws()):
        assert not torch.equal(view, other[1])


@pytest.mark.parametrize("side", [32, 64])
def test_images_keep_their_views_if_others_are_added_after_them(side):
    settings = {"student": "resnet8", "method": "ce", "image_size": side, "view_seed": 0}
    few, more = (mhkd.draw_epoch(mhkd.Config(**settings), size, 1) for size in (30, 100))
    for a, b in zip(few[1:], more[1:]):
        assert torch.equal(a[few[0].argsort()], b[more[0].argsort()][:30])
    assert len({*more[2].tolist()}) == 2 and not torch.equal(few[0], more[0][:30])


def test_with_fewer_views_they_are_used_in_turn_and_stored_once(tmp_path, teacher, batches):
    options = [*PAIR, "--method", "kd", *teacher, "--epochs", "5", "--teacher-views", "2"]
    assert run(tmp_path, *options, *STORE) == 0
    assert len(batches) == 10 and len(views(tmp_path)) == 2
    (logits,) = tmp_path.glob("cache/teacher-*/logits")
    stored = [mhkd_store.Store({"logits": (logits, 10)}, 200, views).stored for views in (1, 5)]
    assert stored == [1, 2]  # of the views that are needed
    assert run(tmp_path / "plain", *options) == 0
    stored, plain = (folder_of(out, method="kd") for out in (tmp_path, tmp_path / "plain"))
    assert [e["train_accuracy"] for e in outcome(stored)[0]][:2] == [
        e["train_accuracy"] for e in outcome(plain)[0]
    ][:2]
    record = read(stored / "result.json")["config"]
    assert [record[name] for name in ("teacher_views", "teacher_store", "view_seed")] == [
        2, "float32", 0
    ]  # fmt: skip


def test_more_views_than_epochs_are_as_many_and_this_is_said_once(tmp_path, teacher, capsys):
    options = [*PAIR, "--method", "kd", *teacher, *STORE]
    assert run(tmp_path, *options, "--teacher-views", "7") == 0
    assert capsys.readouterr().out.count("--teacher-views is limited to the 2 epochs") == 1
    assert read(folder_of(tmp_path) / "result.json")["config"]["teacher_views"] is None
    assert run(tmp_path, *options) == 0
    assert "already finished" in capsys.readouterr().out


def test_half_precision_takes_half_the_space_and_reads_what_it_has_written(tmp_path, teacher):
    options = [*PAIR, "--method", "kd", *teacher, "--teacher-store", "float16"]
    assert run(tmp_path, *options) == 0
    rows = [torch.load(path)["rows"] for path in views(tmp_path)]
    assert [(r.dtype, r.shape) for r in rows] == 2 * [(torch.float16, (200, 10))]
    first = student(tmp_path, "kd")
    folder_of(tmp_path, method="kd").rename(tmp_path / "first")
    assert run(tmp_path, *options) == 0
    assert student(tmp_path, "kd") == first


def test_rows_of_another_teacher_augmentation_precision_or_pytorch_are_never_used(
    tmp_path, teacher, batches, monkeypatch
):
    options = [*PAIR, "--method", "kd", *STORE]
    assert run(tmp_path, *options, *teacher) == 0
    changes = [["--crop-padding", "1"], ["--view-seed", "1"], ["--mean", ".3,.3,.3", "--std"]]
    changes[2] += [".3,.3,.3"]
    changes += [["--precision", "bfloat16"], ["--subset", "120"], ["--teacher-store", "float16"]]
    for change in changes:
        del batches[:]
        assert run(tmp_path, *options, *teacher, *change) == 0
        assert batches, change
    del batches[:]
    assert run(tmp_path, *options, "--teacher-seed", "1") == 0
    assert batches
    del batches[:]
    monkeypatch.setattr(torch, "__version__", "2.99.0")  # it may draw other crops
    assert run(tmp_path, *options, *teacher, "--seed", "1") == 0
    assert batches
    assert len({*tmp_path.glob("cache/teacher-*")}) == 9


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_damaged_rows_are_computed_again(tmp_path, teacher, batches, capsys, damage):
    options = [*PAIR, "--method", "kd", *teacher, *STORE]
    assert run(tmp_path, *options) == 0
    wanted, path = student(tmp_path, "kd"), views(tmp_path)[0]
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "bit":
        content = bytearray(whole)
        content[len(whole) // 2] ^= 1
        path.write_bytes(content)
    else:
        torch.save({"indices": torch.tensor([200]), "rows": torch.zeros(1, 10)}, path)
    folder_of(tmp_path, method="kd").rename(tmp_path / "first")
    del batches[:]
    assert run(tmp_path, *options) == 0
    assert f"'{path}' is damaged" in capsys.readouterr().out
    assert len(batches) == 5 and student(tmp_path, "kd") == wanted
    assert path.read_bytes() == whole


def test_only_images_that_are_missing_are_added(tmp_path):
    rows = torch.randn(10, 3)

    def read_view(indices):
        store = mhkd_store.Store({"a": (tmp_path / "a", 1), "b": (tmp_path / "b", 2)}, 10, 1)
        store.open(0)
        computed = []
        for part in indices:
            part = torch.tensor(part)
            found = store.outputs(
                part,
                lambda part=part: (
                    computed.append(part) or {"a": rows[part, :1], "b": rows[part, 1:]}
                ),
            )
            assert torch.equal(torch.cat([found["a"], found["b"]], dim=1), rows[part])
        store.save()
        return len(computed)

    assert read_view([[0, 1, 2], [7, 5, 3]]) == 2
    assert read_view([[2, 0, 5], [5, 4, 1]]) == 1
    assert read_view([[0, 1, 2, 3, 4, 5, 7]]) == 0
    assert read_view([[6, 8], [9, 0]]) == 2
    stored = [torch.load(path)["indices"].tolist() for path in tmp_path.glob("b/*.pt")]
    assert sorted(stored) == [[0, 1, 2, 3, 5, 7], [4], [6, 8, 9]]


def test_rows_of_labelled_images_are_shared_and_those_of_other_unlabelled_images_are_not(tmp_path):
    def read_view(count, unlabelled):
        """Which of the first `count` rows were computed, for this run's unlabelled images."""
        store = mhkd_store.Store(
            {"a": (tmp_path, 1)}, count, 1, labelled=4, unlabelled=unlabelled
        )  # fmt: skip
        store.open(0)
        rows = torch.arange(10.0)[:, None]
        rows[4:] += {"": 0, "x": 100, "y": 200}[unlabelled]
        computed = []
        for i in range(count):
            compute = lambda i=i: computed.append(i) or {"a": rows[[i]]}  # noqa: E731
            assert torch.equal(store.outputs(torch.tensor([i]), compute)["a"], rows[[i]])
        store.save()
        return computed

    assert read_view(10, "x") == [*range(10)]
    assert read_view(4, "") == []
    assert read_view(7, "y") == [4, 5, 6]
    assert read_view(7, "y") == read_view(10, "x") == []


def test_a_file_that_cannot_be_read_at_the_moment_is_not_removed(tmp_path, monkeypatch):
    said = []
    store = mhkd_store.Store({"a": (tmp_path, 1)}, 3, 1, log=said.append)
    store.open(0)
    store.outputs(torch.arange(3), lambda: {"a": torch.ones(3, 1)})
    store.save()
    with monkeypatch.context() as patched:

        def full(*arguments, **keywords):
            raise OSError(errno.EMFILE, "Too many open files")

        patched.setattr(torch, "load", full)
        store.open(0)
    assert not store.complete and "cannot be read ([Errno 24] Too many open files)" in said[0]
    store.open(0)
    assert store.complete and len(said) == 1


def test_a_kill_loses_at_most_the_rows_of_an_epoch_and_leaves_no_wrong_ones(tmp_path, teacher):
    options = [*PAIR, "--method", "kd", *teacher, *STORE]
    assert run(tmp_path / "whole", *options) == 0
    for die in (("fsync", 2), ("replace", 2), ("replace", 4)):  # while it writes rows, or after
        arguments = [*options, "--out", tmp_path / "killed"]
        assert end_of(start(*arguments, die=die)) == -signal.SIGKILL, die
    assert run(tmp_path / "killed", *options) == 0
    assert student(tmp_path / "killed", "kd") == student(tmp_path / "whole", "kd")
    assert [p.read_bytes() for p in views(tmp_path / "killed")] == [
        p.read_bytes() for p in views(tmp_path / "whole")
    ]


def test_two_runs_at_once_write_the_same_rows_and_neither_waits(tmp_path, teacher):
    options = [*PAIR, "--method", "kd", *teacher, *STORE, "--out", tmp_path]
    outputs = [tmp_path / f"{seed}.txt" for seed in (0, 1)]
    both = [start(*options, "--seed", s, output=outputs[s]) for s in (0, 1)]
    assert [end_of(process) for process in both] == [0, 0]
    assert not any("damaged" in path.read_text() for path in outputs)
    rows = {path.name[:9]: torch.load(path)["rows"] for path in views(tmp_path)}
    assert [len(r) for r in rows.values()] == [200, 200]
    assert not list(tmp_path.rglob("*.part"))


def test_on_a_full_disk_the_run_continues_and_says_so_once(tmp_path, teacher, monkeypatch, capsys):
    save = torch.save

    def full(content, file):
        if "rows" in content:
            file.write(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    options = [*PAIR, "--method", "kd", *teacher]
    assert run(tmp_path / "full", *options, *STORE) == 0
    assert capsys.readouterr().out.count("No space left") == 1
    assert not [path for path in tmp_path.glob("full/cache/**/*") if path.is_file()]
    monkeypatch.undo()
    assert run(tmp_path / "plain", *options, "--view-seed", "0") == 0
    assert student(tmp_path / "full", "kd") == student(tmp_path / "plain", "kd")


def test_a_store_that_cannot_be_written_is_announced_and_the_run_continues(
    tmp_path, teacher, capsys
):
    (tmp_path / "cache").write_text("in the way")
    assert run(tmp_path, *PAIR, "--method", "kd", *teacher, *STORE) == 0
    assert "continues without storing" in capsys.readouterr().out


def test_the_size_is_announced_before_the_first_epoch(tmp_path, teacher, capsys):
    assert mhkd_store.Store({"logits": (tmp_path, 100)}, 50_000, 240).nbytes == 4.8e9
    assert run(tmp_path, *MHKD, *HEADS, *teacher, *STORE) == 0
    said = capsys.readouterr().out
    found = re.search(r"teacher-\w+': (\S+) MB for .* 2 views of 200 images, of which 0", said)
    assert found.start() < said.index("mhkd epoch 1/2")
    assert found[1] == "0"


def test_two_processes_store_their_shares_and_later_runs_of_one_process_read_them(
    tmp_path, teacher, batches
):
    options = [*PAIR, "--method", "kd", *teacher, *STORE, "--teacher-views", "1", "--out", tmp_path]
    both = [start(*options, environment=environment) for environment in environments(2)]
    assert [end_of(process) for process in both] == [0, 0]
    shares = [torch.load(path)["indices"].tolist() for path in views(tmp_path)]
    assert len(shares) == 2 and sorted(sum(shares, [])) == list(range(200))
    assert run(tmp_path, *options) == 0
    assert not batches


@pytest.mark.parametrize(
    "options, wanted",
    [
        ([*MHKD, *STORE], "--teacher-heads pretrained"),
        ([*PAIR, "--method", "fitnet+kd", *STORE], "fitnet"),
        ([*PAIR, "--method", "kd", "--teacher-store", "float64"], "float16"),
        ([*PAIR, "--method", "kd", "--teacher-views", "0"], "--teacher-views must be at least 1"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_a_teacher_is_trained(
    tmp_path, failing, options, wanted
):
    assert wanted in failing(tmp_path, *options)
    assert not os.listdir(tmp_path)


def test_frozen_heads_of_another_kind_are_refused(monkeypatch):
    class Own(mhkd.METHODS["kd"]):
        units = classmethod(lambda cls, config, network: (1,))
        needs_maps = classmethod(lambda cls, config: False)

        def frozen_heads(self, teacher):
            return [teacher.features[1].mean(dim=(2, 3))]

    monkeypatch.setitem(mhkd.METHODS, "own", Own)
    settings = {"dataset": "digits", "teacher": "resnet14", "student": "resnet8", "method": "own"}
    mhkd.Config(**settings)
    with pytest.raises(mhkd.UsageError, match="pretrained, and --method own has others"):
        mhkd.Config(**settings, teacher_store="float32")


def test_the_views_of_a_network_alone_are_not_said_to_have_no_effect(tmp_path, capsys):
    assert run(tmp_path, *ALONE, *STORE, "--teacher-views", "1") == 0
    said = capsys.readouterr().out
    assert "no effect" not in said and "ce sees a new view in every epoch, of --view-seed 0" in said


def test_a_network_alone_sees_the_same_images_as_runs_with_the_store():
    settings = {"dataset": "digits", "teacher": "resnet14", "student": "resnet8"}
    for method in ("kd", "ce"):
        for name, value in (("teacher_store", "float32"), ("teacher_views", 5)):
            config = mhkd.Config(**settings, method=method, **{name: value})
            assert config.view_seed == 0
            if method == "kd":
                assert config.of_teacher().view_seed is None
    assert config.teacher_views is None


def test_a_network_alone_ignores_the_store_and_its_teacher_is_trained_as_ever(tmp_path, capsys):
    assert run(tmp_path / "plain", *PAIR, "--method", "kd") == 0
    assert run(tmp_path / "stored", *PAIR, "--method", "kd", *STORE) == 0
    plain, stored = (folder_of(tmp_path / n, "resnet14", "ce") for n in ("plain", "stored"))
    assert outcome(plain) == outcome(stored) and plain.name == stored.name

"""Teachers that are files of their answers: golden values by hand, each wrong file, and what `kd export` writes."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shell, kd_here
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from kdcli import BadInput, losses
from kdcli.data.dataset import Split
from kdcli.runs.directory import Run, open_run
from kdcli.teachers.answers import Answers, read_answers
from kdcli.teachers.teacher import dataset_of, kept_logits, logits_of, nets
from kdcli.use import export

CLASSES = ["cat", "dog", "owl"]
LOGITS = np.array([[1.5, -2, 0], [0.25, 3, -1], [-7, 5, 9], [0, 0, 4]], np.float32)  # of four images
P = np.array([[0.5, 0.25, 0.25], [0, 1, 0], [0.125, 0.125, 0.75], [0.1, 0.2, 0.7]], np.float32)
FILES = {
    "train": ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "train/owl/7.png"],
    "test": ["test/cat/9.png"],
}


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def table(folder: Path, *lines: str) -> Path:
    (folder / "a.csv").write_text("".join(f"{line}\n" for line in lines))
    return folder / "a.csv"


def read(file: Path, order: Sequence[str] | None = None, files: bool = True, **sizes: int) -> Answers:
    return read_answers(file, {"train": 4, "test": 1} | sizes, CLASSES, order, FILES if files else {"train": []})


def rows(lines: np.ndarray, *keys: str) -> list[str]:
    """Lines of CSV: numbers with what stands before them."""
    return [
        ",".join([*key, *map(str, line)]) for line, *key in zip(lines.tolist(), *[k.split() for k in keys], strict=True)
    ]


def same(found: Tensor, wanted: np.ndarray) -> bool:
    return found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(wanted))


def test_an_array_is_read_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LOGITS.astype(np.float64))
    found = read(tmp_path / "a.npy")
    assert found.logits.keys() == {"train"}
    assert same(found.logits["train"], LOGITS)
    assert found.said == [
        "Its columns have no names: they are taken to be the classes of the data, in their order.",
        "Of the training images it holds logits.",
        "It has no answers for the 1 test images.",
    ]


def test_the_parts_of_an_npz_file(tmp_path: Path) -> None:
    half, classes = LOGITS.astype(np.float16), ["cat", "dog", "owl"]
    more = {"unlabelled": LOGITS[:2], "labels": [0, 1, 2, 2]}
    file = npz(tmp_path, train=half, test=LOGITS[3:], classes=classes, **more)
    found = read(file, unlabelled=2)
    assert same(found.logits["train"], LOGITS)  # which float16 holds
    assert same(found.logits["test"], LOGITS[3:])
    assert same(found.logits["unlabelled"], LOGITS[:2])
    assert found.said[-1] == "Ignored: its labels."
    assert read(file).logits.keys() == {"train", "test"}  # of data without unlabelled images
    assert read(file).said[-1] == "Ignored: its unlabelled, labels."


def test_probabilities_are_told_by_their_sums(tmp_path: Path) -> None:
    found = read(npz(tmp_path, train=P, test=LOGITS[:1]))
    logits, tiny = found.logits["train"], np.finfo(np.float32).tiny
    assert torch.allclose(logits[0], torch.tensor([math.log(0.5), math.log(0.25), math.log(0.25)]))
    assert torch.allclose(logits[1], torch.tensor([math.log(tiny), 0, math.log(tiny)]))
    assert torch.allclose(logits.softmax(1), torch.from_numpy(P), atol=1e-7)
    assert same(found.logits["test"], LOGITS[:1])
    tell = "Of the training images it holds probabilities, whose logarithm is taken, with 1.2e-38 for 2 that are 0."
    assert found.said[1:] == [tell, "Of the test images it holds logits."]


@pytest.mark.parametrize("given", ["classes", "order"])
def test_columns_are_picked_by_name(given: str, tmp_path: Path) -> None:
    names, values = ["owl", "emu", "cat", "dog"], np.insert(LOGITS[:, [2, 0, 1]], 1, 100, axis=1)
    own = {"classes": names} if given == "classes" else {}
    found = read(npz(tmp_path, train=values, **own), names if given == "order" else None)
    assert same(found.logits["train"], LOGITS)
    assert found.said[0] == "Its columns emu are not classes of the data and are left out."


def test_of_more_classes_probabilities_are_told_by_all(tmp_path: Path) -> None:
    known = np.insert(P / 2, 1, 0.5, axis=1)
    found = read(npz(tmp_path, train=known, classes=["cat", "emu", "dog", "owl"]))
    assert torch.allclose(found.logits["train"].softmax(1), torch.from_numpy(P), atol=1e-7)


def test_what_the_likeliest_leave_is_shared_by_the_others(tmp_path: Path) -> None:
    log_p = np.log([[0.6, 0.3], [0.9005, 0.1], [0.5, 0.25], [0.7, 0.2]])
    numbers, classes = [[3, 0], [1, 0], [0, 2], [2, 3]], ["owl", "cat", "emu", "dog"]
    found = read(npz(tmp_path, train=log_p, train_classes=np.array(numbers, np.uint8), classes=classes)).logits["train"]
    nothing = np.finfo(np.float32).tiny
    # of cat, dog, owl: what is left of the first image is 0.1, for cat and emu
    p = [[0.05, 0.6, 0.3], [0.9005, nothing, 0.1], [0.125, 0.125, 0.5], [0.05, 0.2, 0.05]]
    assert torch.allclose(found, torch.tensor(p).log(), atol=1e-5)


def test_rows_are_told_by_number_and_by_file(tmp_path: Path) -> None:
    order = [2, 0, 3, 1]
    names = ["train/dog/1.png", "train/cat/1.png", "7.png", "2.png"]  # by name where it is the only one so called
    for key, whose in (
        ("index", order),
        ("index", np.array(order, float)),
        ("files", names),
        ("files", np.array(names, bytes)),
    ):
        assert same(read(npz(tmp_path, train=LOGITS[order], **{f"train_{key}": whose})).logits["train"], LOGITS)
    for column, words in (("file", " ".join(names)), ("index", "2 0 3 1")):
        file = table(tmp_path, f"{column}, cat, dog, owl", *rows(LOGITS[order], words))
        assert same(read(file).logits["train"], LOGITS)


def test_a_table_names_its_columns_and_parts(tmp_path: Path) -> None:
    lines = rows(LOGITS[:, [2, 0, 1]], "train train train train", "3 2 1 0")
    found = read(table(tmp_path, "split,index,owl,cat,dog", "test,0,7,8,9", *lines))
    assert same(found.logits["train"], LOGITS[::-1].copy())
    assert found.logits["test"].tolist() == [[8, 9, 7]]
    found = read(table(tmp_path, "file,cat,dog,owl", *rows(LOGITS, " ".join(FILES["train"])), "test/cat/9.png,8,9,7"))
    assert same(found.logits["train"], LOGITS)
    assert found.logits["test"].tolist() == [[8, 9, 7]]
    assert same(read(table(tmp_path, "\ufeffa,b,c", *rows(LOGITS)), CLASSES).logits["train"], LOGITS)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(4)), columns=st.permutations(range(3)))
def test_no_order_of_rows_and_columns_changes_anything(
    order: list[int], columns: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, mixed, classes = tmp_path_factory.mktemp("a"), LOGITS[order][:, columns], [CLASSES[i] for i in columns]
    for key in ({"train_index": order}, {"train_files": [FILES["train"][i] for i in order]}):
        assert same(read(npz(folder, train=mixed, classes=classes, **key)).logits["train"], LOGITS)
    file = table(folder, f"index,{','.join(classes)}", *rows(mixed, " ".join(map(str, order))))
    assert same(read(file).logits["train"], LOGITS)


def test_a_parquet_file_is_a_table(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="is no dependency of kd's")
    from pyarrow import parquet

    columns = dict(zip(CLASSES, LOGITS.T, strict=True))
    parquet.write_table(arrow.table({"file": FILES["train"], **columns}), tmp_path / "a.parquet")
    assert same(read(tmp_path / "a.parquet").logits["train"], LOGITS)
    parquet.write_table(arrow.table({**columns, "index": [3, 2, 1, 0]}), tmp_path / "a.parquet")
    assert same(read(tmp_path / "a.parquet").logits["train"], LOGITS[::-1].copy())
    parquet.write_table(arrow.table({**columns, "owl": [1.0, None, 2.0, 3.0]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="train, row 1, column owl: is not a finite number"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1, as it begins")
    with pytest.raises(BadInput, match=r"a\.parquet: cannot be read as \.parquet: is empty, damaged, or of another"):
        read(tmp_path / "a.parquet")


def test_a_parquet_file_takes_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BadInput, match=r"a\.parquet: takes pyarrow, which is not installed: pip install pyarrow$"):
        read(tmp_path / "a.parquet")


LACKS = "1 of the 4 training images have no row: train/owl/7.png: give each one"


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"logits": LOGITS}, "must hold train [4, 3], one row per training image, not logits"),
        ({"train": LOGITS[0]}, "train must be numbers [images, 3], one column per class, not float32 [3]; teacher.classes names"),
        ({"train": LOGITS[:, :2]}, "train must be numbers [images, 3], one column per class, not float32 [4, 2]"),
        ({"train": LOGITS, "classes": ["cat", "dog"]}, "has columns cat, dog and none for the classes owl: name them"),
        ({"train": LOGITS, "classes": ["cat", "dog", "dog"]}, "has more than one column dog: give each class one"),
        ({"train": LOGITS.astype(str)}, "train must be numbers [images, 3], one column per class, not <U32 [4, 3]"),
        ({"train": LOGITS[:3]}, "train has 3 rows for 4 training images: say whose they are, by train_index or"),
        ({"train": LOGITS, "test": LOGITS}, "test has 4 rows for 1 test images: say whose they are"),
        ({"train": LOGITS, "test": LOGITS[:0]}, "test has 0 rows for 1 test images: say whose they are"),
        ({"train": LOGITS[:3], "train_index": [0, 2, 1]}, LACKS),
        ({"train": LOGITS[:1], "train_index": [3]}, "3 of the 4 training images have no row: train/cat/1.png, train/cat/2.png"),
        ({"train": LOGITS, "train_index": [0, 2, 1, 1]}, "1 of the 4 training images have more than one row: train/cat/2.png"),
        ({"train": LOGITS, "train_index": [0, 2, 1, 4]}, "train, row 3: is of image 4: the training images are 0 to 3"),
        ({"train": LOGITS, "train_index": [0, 2, -1, 3]}, "train, row 2: is of image -1: the training images"),
        ({"train": LOGITS, "train_index": [0, 2]}, "train_index must be numbers [4], one per row, not int64 [2]"),
        ({"train": LOGITS, "train_files": [*FILES["train"][:3], "8.png"]}, "row 3: there is no image 8.png: give its path"),
        ({"train": LOGITS, "train_files": [*FILES["train"][:3], "1.png"]}, "row 3: 2 images are called 1.png: give its path"),
        ({"train": LOGITS, "train_files": [*FILES["train"][:3], "test/cat/9.png"]}, "row 3: there is no image test/cat/9.png"),
        ({"train": LOGITS, "train_files": FILES["train"][:3]}, "train_files must be names [4], one per row, not <U15 [3]"),
        ({"train": np.where(LOGITS == 9, np.nan, LOGITS)}, "train, row 2, column 2: is not a finite number: every image"),
        ({"train": np.where(LOGITS == 9, 1e300, LOGITS.astype(float)), "classes": CLASSES}, "train, row 2, column owl: is not a finite"),
        ({"train": 0.97 * P + 0.02}, "train: its values are like probabilities, but the sums of 4 of 4 rows are not 1, at worst 1.03 in"),
        ({"train": P * [[1], [1], [0.9], [1]]}, "the sums of 1 of 4 rows are not 1, at worst 0.9 in row 2: divide each row"),
        ({"train": 100 * P}, "the sums of 4 of 4 rows are not 1, at worst 100 in row"),
        ({"train": LOGITS[:, :2], "train_classes": [[0, 1]] * 4}, "train_classes number the classes: name these in an array"),
        ({"train": -LOGITS[:, :2] ** 2, "classes": CLASSES, "train_classes": [[0, 1]]}, "train_classes must be whole numbers [4, 2]"),
        ({"train": P[:, :2], "classes": CLASSES, "train_classes": [[0, 1]] * 4}, "row 0: must be log-probabilities, but what they stand for sums to 2.93275"),
        ({"train": P[:, :2], "classes": CLASSES, "train_classes": [[0, 1], [1, 1]] * 2}, "row 1: must number different classes, 0 to 2, not 1, 1"),
        ({"train": P[:, :2], "classes": CLASSES, "train_classes": [[0, 3]] * 4}, "row 0: must number different classes, 0 to 2, not 0, 3"),
        ({"train": np.array([[{}]])}, "cannot be read as .npz: it holds objects"),
    ],
)  # fmt: skip
def test_a_wrong_array_is_refused_in_one_line(arrays: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as raised:
        read(npz(tmp_path, **arrays))
    assert str(raised.value).startswith(f"{tmp_path / 'a.npz'}: ")
    assert line in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([], "cannot be read as .csv: is empty, damaged, or of another format"),
        (["cat,dog,owl"], "train has 0 rows for 4 training images"),
        (["cat;dog;owl", "1;2;3"], "has columns cat;dog;owl and none for the classes cat, dog, owl: name them"),
        (["cat,dog,owl", "1,2,3", "1,2"], "row 1 has 2 fields, and the header 3: it may be cut off"),
        (["cat,dog,owl", "1,2,3", "1,x,3"], "train, row 1, column dog: is not a finite number"),
        (["cat,dog,owl", "1,2,"], "train, row 0, column owl: is not a finite number"),
        (["cat,dog,owl", "1,inf,3"], "train, row 0, column dog: is not a finite number"),
        (["index,cat,dog,owl", "x,1,2,3"], "train, row 0: is of image nan: the training images are 0 to 3"),
        (["index,cat,dog,owl", "1.5,1,2,3"], "train, row 0: is of image 1.5: the training images are 0 to 3"),
        (["split,cat,dog,owl", "dev,1,2,3"], "row 0, column split: must be train, test, unlabelled, not 'dev'"),
        (["split,index,cat,dog,owl", "test,0,1,2,3"], "4 of the 4 training images have no row"),
        (["file,index,cat,dog,owl", "a,0,1,2,3"], "tells whose its rows are twice, by file and by index: remove a column"),
        (["file,cat,dog,owl", "1.png,1,2,3"], "row 0: 2 images are called 1.png"),
        (["label,cat,dog,owl", *rows(P, "3 3 3 3")], "its values are like probabilities, but the sums of 4 of 4 rows are not 1"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_in_one_line(lines: list[str], line: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as raised:
        read(table(tmp_path, *lines))
    assert str(raised.value).startswith(f"{tmp_path / 'a.csv'}: ")
    assert line in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.csv", "a.parquet"])
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow") if name == "a.parquet" else None
    np.savez(tmp_path / "whole", train=LOGITS)
    whole = (tmp_path / "whole.npz").read_bytes()
    for content in (b"", whole[:-9], whole[:99], b"\x80\x04\x95 a pickle", b"\xff\xfe\x00"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}: (cannot be read as|has columns)"):
            read(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(BadInput, match=f"{name}: cannot be read as .*: (No such file|Failed to open)"):
        read(tmp_path / name)


def test_the_wrong_words_about_a_file(tmp_path: Path) -> None:
    file = npz(tmp_path, train=LOGITS, classes=CLASSES)
    for wrong, line in (
        (
            ["dog", "cat", "owl"],
            "names its columns cat, dog, owl, and teacher.classes dog, cat, owl: remove that key",
        ),
        (["dog", "cat"], "has 3 classes, and teacher.classes 2: name each of them"),
    ):
        with pytest.raises(BadInput, match=line):
            read(file, wrong)
    assert same(read(file, CLASSES).logits["train"], LOGITS)
    with pytest.raises(BadInput, match=r"a\.txt: must be an \.npz, \.npy, \.csv or \.parquet file"):
        read(tmp_path / "a.txt")
    with pytest.raises(BadInput, match="names its images by file, and the data are none: number them"):
        read(npz(tmp_path, train=LOGITS, train_files=FILES["train"]), files=False)


# What `kd export` writes.


def run_of(shell: Shell, group: str) -> Run:
    """The first run of a group, of those without omitted classes."""
    folders = sorted((shell.folder / "runs" / "tiny" / group).iterdir())
    return open_run(shell.folder / "runs", f"tiny/{group}/{folders[0].name}")


def exported(shell: Shell, run: Run, out: Path, *words: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document of an export of logits, and what is read from its file."""
    done = kd_here(shell.folder, "export", run.name, "--format", "logits", "--out", str(out), "--json", *words)
    assert (done.code, done.err) == (0, "")
    return done.json, read_answers(out, {"train": 1297, "test": 500}, [str(c) for c in range(10)], None, {}).logits


def test_a_teacher_is_read_back_as_it_was(trained: Shell, tmp_path: Path) -> None:
    run = run_of(trained, "train-teacher")
    document, found = exported(trained, run, tmp_path / "a.npz")
    kept = load_file(run.path / "logits.safetensors")
    assert found.keys() == kept.keys() == {"train", "test"}
    assert all(torch.equal(found[part], kept[part]) for part in kept)
    assert document["errors"] == document["torch_errors"] == run.result().test.errors
    assert document["max_difference"] < 1e-12
    card = (tmp_path / "a.npz.md").read_text()
    assert "| holds | logits of 10 classes, float32, for 1,297 training and 500 test images: classes 0, 1, 2," in card
    assert "inputs" not in card


def test_an_ensemble_is_its_average_at_1(trained: Shell, tmp_path: Path) -> None:
    run = run_of(trained, "ensemble")
    _, found = exported(trained, run, tmp_path / "a.npz")
    for part, images in (("train", 1297), ("test", 500)):
        wanted = losses.average(kept_logits(run, part, images), 1.0, run.spec.average)
        assert torch.allclose(found[part].double(), wanted, atol=1e-5)


def test_a_student_is_asked_about_the_training_images(trained: Shell, tmp_path: Path) -> None:
    run = run_of(trained, "baseline")
    _, found = exported(trained, run, tmp_path / "a.npz")
    assert load_file(run.path / "logits.safetensors").keys() == {"test"}
    assert torch.equal(found["test"], run.load("logits")["test"])
    images = dataset_of(run, None).train
    wanted = nets(run, torch.device("cpu"))[0](images.inputs(torch.arange(1297)))
    assert torch.allclose(found["train"], wanted, atol=1e-5)


def test_what_rounds_says_by_how_much(trained: Shell, tmp_path: Path) -> None:
    run = run_of(trained, "ensemble")
    wanted, labels = (
        losses.average(kept_logits(run, "test", 500), 1.0, "arithmetic").exp(),
        dataset_of(run, None).test.labels,
    )
    for words, most in ((["--half"], 1e-3), (["--top-k", "3"], 1), (["--top-k", "9"], 1e-6)):
        document, found = exported(trained, run, tmp_path / f"{''.join(words)}.npz", *words)
        p = found["test"].double().softmax(1)
        assert float((p - wanted).abs().max()) <= document["max_difference"] + 1e-9 <= most
        assert document["errors"] == int((p.argmax(1) != labels).sum())
    with np.load(tmp_path / "--top-k3.npz") as arrays:
        assert (arrays["train"].shape, arrays["train_classes"].dtype) == ((1297, 3), np.uint8)
        top = torch.from_numpy(arrays["test"]).double().exp()
    assert torch.allclose(top, wanted.topk(3).values, atol=1e-6)
    with np.load(tmp_path / "--half.npz") as arrays:
        assert arrays["train"].dtype == np.float16


def test_logits_above_0_are_no_probabilities(trained: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(trained, "train-teacher")

    def positive(run: Run, part: str, split: Split) -> Tensor:
        return logits_of(run, part, split).sigmoid()

    monkeypatch.setattr(export, "logits_of", positive)
    wanted = positive(run, "test", dataset_of(run, None).test)[0]
    _, found = exported(trained, run, tmp_path / "a.npz")
    assert torch.allclose(found["test"], wanted.log_softmax(1), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--half", "--half: belongs to --format logits: remove it"),
        ("--format torch --top-k 3", "--top-k: belongs to --format logits: remove it"),
        ("--format logits --top-k 10", "--top-k 10: must be fewer than the 10 classes"),
        (
            "--format logits --out a.csv",
            "--out a.csv: must be a file in a folder that exists, with a name that ends in .npz",
        ),
    ],
)
def test_the_wrong_thing_typed(words: str, line: str, trained: Shell) -> None:
    done = kd_here(trained.folder, "export", run_of(trained, "ensemble").name, *words.split())
    assert (done.code, done.out, done.err) == (2, "", f"{line}\n")


def test_in_a_process_of_its_own(trained: Shell, tmp_path: Path) -> None:
    run, out = run_of(trained, "train-teacher"), tmp_path / "a.npz"
    done = trained("export", run.name, "--format", "logits", "--half", "--out", str(out))
    assert done.code == 0, done.err
    assert done.out.startswith(f"wrote {out}: ")
    assert done.out.endswith(f"learn from it: teacher: {{logits: {out}}}\n")

"""CIFAR-100 in both of its archives, read without running what is in a pickle; CUB's own tables."""

import codecs
import os
import pickle

import numpy as np
import pytest

from m2mkd_jax.data import sources
from m2mkd_jax.data.formats import cifar
from m2mkd_jax.data.formats.pickles import read_pickle
from m2mkd_jax.errors import UserError
from tests.data_files import make_config, message, write_cub

# CIFAR-100


def cifar_arrays(count, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, rng.integers(0, 100, count)


def write_cifar_binary(root, names):
    root.mkdir(parents=True)
    for file, count, seed in (("train.bin", 12, 0), ("test.bin", 5, 1)):
        pixels, labels = cifar_arrays(count, seed)
        rows = np.column_stack([np.full(count, 3), labels, pixels])
        rows.astype(np.uint8).tofile(root / file)
    (root / "fine_label_names.txt").write_text("\n".join(names) + "\n")


def write_cifar_python(root, names, protocol, text=str.encode):
    """text: what strings are written as, bytes or, by `str`, text."""
    root.mkdir(parents=True)
    for file, count, seed in (("train", 12, 0), ("test", 5, 1)):
        pixels, labels = cifar_arrays(count, seed)
        value = {
            "filenames": [text("x.png")] * count,
            "batch_label": text("training batch 1 of 1"),
            "fine_labels": labels.tolist(),
            "coarse_labels": [3] * count,
            "data": pixels,
        }
        value = {text(key): field for key, field in value.items()}
        (root / file).write_bytes(pickle.dumps(value, protocol))
    meta = {text("fine_label_names"): [text(name) for name in names]}
    (root / "meta").write_bytes(pickle.dumps(meta, protocol))


@pytest.mark.parametrize("text", [str.encode, str])
@pytest.mark.parametrize("protocol", range(6))
def test_both_cifar_archives_hold_the_same(tmp_path, protocol, text):
    names = [f"class_{i}" for i in range(100)]
    write_cifar_binary(tmp_path / "b" / "cifar-100-binary", names)
    write_cifar_python(tmp_path / "p", names, protocol, text)
    for split, count, seed in (("train", 12, 0), ("test", 5, 1)):
        pixels, labels = cifar_arrays(count, seed)
        for root in (tmp_path / "b", tmp_path / "p"):
            config = make_config("cifar100", root, 100, image_size=32)
            source = sources.load_source(config, split)
            assert source.images.shape == (count, 32, 32, 3)
            # Planes in the file, channels last here.
            np.testing.assert_array_equal(source.images[2, 1, 7], pixels[2, [39, 1063, 2087]])
            np.testing.assert_array_equal(source.labels, labels)
            assert source.class_names == tuple(names)
            assert source.reader().evaluation_images(np.arange(2), 48).shape == (2, 48, 48, 3)


def python2_pickle():
    """As Python 2 wrote CIFAR's: byte strings as SHORT_BINSTRING, protocol 2."""
    return (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\n"
        b"q\x03K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01"
        b"\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06\x01\x02\x03"
        b"\xff\x80\x00tbU\x06labelsq\x07]q\x08(K\x05K\x07eu."
    )


def test_a_pickle_of_python_2(tmp_path):
    path = tmp_path / "train"
    path.write_bytes(python2_pickle())
    value = read_pickle(path)
    assert value[b"labels"] == [5, 7]
    np.testing.assert_array_equal(value[b"data"], [[1, 2, 3], [255, 128, 0]])


class Calls:
    """A pickle that would call something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(path):
    yield pickle.dumps({b"data": Calls(os.mkdir, str(path))}, 2)
    yield pickle.dumps(Calls(eval, f"__import__('os').mkdir({str(path)!r})"), 4)
    yield pickle.dumps(Calls(os.system, f"mkdir {path}"), 0)
    yield b"cposix\nmkdir\n(S'x'\ntR."
    yield b"\x80\x04\x8c\x03o\ns\x8c\x05mkdir\x93."  # a name of two lines
    yield pickle.dumps(Calls(codecs.encode, "x", "rot13"), 2)
    yield b"(S'x'\niposix\nmkdir\n."
    yield b"\x80\x02cnumpy\nndarray\n)\x81."
    yield pickle.dumps(np.zeros(3, "f8"), 2)  # no type of CIFAR's
    yield b"\x80\x02}q\x00h\x00h\x00s."  # a dict inside itself, as its own key
    yield b"\x80\x02](K\x01"  # cut off
    yield b"hello"
    yield b""


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path):
    target = tmp_path / "made"
    for number, content in enumerate(hostile(target)):
        path = tmp_path / f"file{number}"
        path.write_bytes(content)
        text = message(read_pickle, path)
        assert str(path) in text and (number not in (2, 3) or "calls posix." in text)
    assert not target.exists()


# pickletools warns of the escapes that mutated strings happen to have.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_mutated_pickles_end_in_one_line_or_a_value(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "train"
    value = {b"data": np.arange(6, dtype=np.uint8), "labels": [1, 2]}
    pickles = [python2_pickle(), *(pickle.dumps(value, protocol) for protocol in range(6))]
    for number in range(700):
        good = pickles[number % 7]
        content = bytearray(good)
        for place in rng.integers(0, len(good), rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read_pickle(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train.bin", b"\0" * 3075, "no multiple of 3074"),
        ("train.bin", b"\xff" * 3074, "label 255 of 100"),
        ("fine_label_names.txt", b"cat dog", "names 2 classes of 100"),
    ],
)
def test_broken_cifar_files_are_one_line(tmp_path, file, content, words):
    write_cifar_binary(tmp_path / "c", [f"class_{i}" for i in range(100)])
    (tmp_path / "c" / file).write_bytes(content)
    config = make_config("cifar100", tmp_path / "c", 100, image_size=32)
    assert words in message(sources.load_source, config, "train")


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_an_archive_of_fewer_images_than_published_says_so(kind, tmp_path, capsys, monkeypatch):
    """As of a file cut off at the end of an image."""
    names = [f"class_{i}" for i in range(100)]
    if kind == "binary":
        write_cifar_binary(tmp_path / "c", names)
    else:
        write_cifar_python(tmp_path / "c", names, 2)
    monkeypatch.setitem(cifar.IMAGES, "train", 12)
    for split, said in (("train", ""), ("test", "test images in")):
        assert len(cifar.open_split(tmp_path / "c", split)) == {"train": 12, "test": 5}[split]
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == bool(said)
        assert not said or "are 5, and CIFAR-100 has 10,000" in error


# CUB


def test_cub_follows_its_own_tables(tmp_path):
    write_cub(tmp_path / "CUB_200_2011")
    config = make_config("cub", tmp_path, 2)
    for split, numbers, labels in (("train", (1, 3, 4), [0, 1, 1]), ("test", (2, 5), [0, 1])):
        source = sources.load_source(config, split)
        assert source.labels.tolist() == labels and source.class_names == ("001.A", "002.B")
        for place, number in enumerate(numbers):
            assert abs(int(np.asarray(source.read(place))[0, 0, 0]) - 40 * number) <= 2


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("images.txt", "6 002.B/f.jpg", "name different images"),
        ("train_test_split.txt", "1", "line 6: two words"),
        ("train_test_split.txt", "1 2", "line 6: 1 is there twice"),
        ("images.txt", "2 001.A/a.jpg", "line 6: 2 is there twice"),
    ],
)
def test_broken_cub_tables_are_one_line(tmp_path, file, line, words):
    write_cub(tmp_path)
    with open(tmp_path / file, "a") as table:
        table.write(line + "\n")
    assert words in message(sources.load_source, make_config("cub", tmp_path, 2), "test")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("image_class_labels.txt", "names class '3'"),
        ("train_test_split.txt", "values but 0 and 1"),
    ],
)
def test_values_that_no_table_of_cub_has(file, words, tmp_path):
    write_cub(tmp_path)
    *lines, last = (tmp_path / file).read_text().splitlines()
    (tmp_path / file).write_text("\n".join([*lines, f"{last.split()[0]} 3"]))
    assert words in message(sources.load_source, make_config("cub", tmp_path, 2), "test")

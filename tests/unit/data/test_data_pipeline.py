"""Batches: the same bytes for any number of workers, after any resume, on any number of processes.

Axes: B global batch, L local batch.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from ml_collections import ConfigDict
from PIL import Image

from m2mkd_jax.data import pipeline
from m2mkd_jax.data import workers as workers_module
from m2mkd_jax.data.array_source import ArrayImageSource
from m2mkd_jax.data.encoded_source import EncodedImageSource
from m2mkd_jax.data.formats.folder import FolderFiles, list_images
from m2mkd_jax.data.pipeline import eval_batches, train_batches
from m2mkd_jax.errors import Lost, UserError

SIZE = 16


def make_config(crop="random_resized", workers=0, repeats=1, policy="rand-m9-mstd0.5-inc1"):
    return ConfigDict(
        {
            "image_size": SIZE,
            "workers": workers,
            "repeated_augmentation": repeats,
            "damaged_share": 0.001,
            "augment": {
                "crop": crop,
                "shift": 2,
                "scale": (0.08, 1.0),
                "flip": True,
                "rand_augment": policy,
                "color_jitter": 0.0,
                "erase": 0.0,
            },
        }
    )


def array_source(count):
    """Noise, so that no two images are alike; the label of image i is i."""
    images = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return ArrayImageSource(images, np.arange(count), [str(i) for i in range(count)])


@pytest.fixture(scope="module")
def folder_source(tmp_path_factory):
    """Images of different sizes, each with its own label."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for number in range(24):
        path = root / "train" / f"{number:02d}" / "one.png"
        path.parent.mkdir(parents=True)
        pixels = rng.integers(0, 256, (18 + number, 40 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    names = [f"{number:02d}" for number in range(24)]
    return open_folder(root, names)


def open_folder(root, names):
    paths, labels = list_images(root, "train", names)
    return EncodedImageSource(FolderFiles(root, paths), labels, names)


def check_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert type(first[name]) is np.ndarray
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("crop", ["none", "shift", "random_resized"])
def test_a_batch_has_the_promised_shapes_and_labels(crop):
    source = array_source(40)
    batches = list(train_batches(source, make_config(crop), batch_size=8, total_steps=5, seed=0))
    assert len(batches) == 5
    for batch in batches:
        assert batch["image"].shape == (8, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    # 40 images in 5 batches of 8: an epoch.
    assert sorted(np.concatenate([b["label"] for b in batches])) == list(range(40))


def test_images_and_labels_stay_together():
    source = array_source(40)
    config = make_config("none", policy="")
    for batch in train_batches(source, config, batch_size=8, total_steps=5, seed=3):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            original = source.images[label]
            assert (image == original).all() or (image == original[:, ::-1]).all()


def test_augmentation_differs_from_step_to_step_and_seed_to_seed():
    # Eight copies of one image: whatever differs is the augmentation, not the order.
    source = array_source(8)
    source.images[:] = source.images[0]

    def images(seed):
        batches = train_batches(
            source, make_config("shift"), batch_size=8, total_steps=2, seed=seed
        )
        return [batch["image"] for batch in batches]

    first, second = images(0)
    assert (first != second).any()
    assert (first != images(1)[0]).any()
    assert len({image.tobytes() for image in first}) > 4


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_a_resumed_run_sees_the_same_bytes(kind, folder_source):
    source = folder_source if kind == "folder" else array_source(24)
    config = make_config("random_resized" if kind == "folder" else "shift")
    whole = list(train_batches(source, config, batch_size=6, total_steps=15, seed=7))
    for start in (*np.random.default_rng(0).integers(1, 15, 3), 0, 15):
        start = int(start)
        rest = list(
            train_batches(source, config, batch_size=6, total_steps=15, start_step=start, seed=7)
        )
        assert len(rest) == 15 - start
        for first, second in zip(whole[start:], rest, strict=True):
            check_equal(first, second)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_resume_do_not_change_a_byte(workers, folder_source):
    arguments = dict(batch_size=6, total_steps=12, seed=7)
    whole = list(train_batches(folder_source, make_config(), **arguments))
    start = 4 + workers  # in the middle of an epoch of 4 steps
    resumed = train_batches(
        folder_source, make_config(workers=workers), start_step=start, **arguments
    )
    rest = list(resumed)
    assert len(rest) == 12 - start
    for first, second in zip(whole[start:], rest, strict=True):
        check_equal(first, second)


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("kind", ["array", "folder"])
def test_processes_share_the_batch_of_one(kind, processes, folder_source):
    source = folder_source if kind == "folder" else array_source(24)
    config = make_config("random_resized" if kind == "folder" else "shift")
    arguments = dict(batch_size=12, total_steps=3, seed=1)
    whole = list(train_batches(source, config, **arguments))
    shards = [
        list(train_batches(source, config, process_index=p, process_count=processes, **arguments))
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name in batch:
            together = np.concatenate([shard[step][name] for shard in shards])
            np.testing.assert_array_equal(together, batch[name])


def test_repeated_augmentation_shows_different_crops_of_one_image():
    source = array_source(300)
    config = make_config("shift", repeats=3)
    batch = next(train_batches(source, config, batch_size=30, total_steps=1, seed=0))
    labels, counts = np.unique(batch["label"], return_counts=True)
    assert len(labels) == 10 and (counts == 3).all()
    copies = [batch["image"][batch["label"] == label] for label in labels]
    assert sum((three[0] != three[1]).any() for three in copies) >= 8


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 31])
def test_evaluation_counts_every_image_once(count, processes):
    source = array_source(count)
    streams = [
        list(
            eval_batches(
                source, make_config(), batch_size=8, process_index=p, process_count=processes
            )
        )
        for p in range(processes)
    ]
    assert {len(stream) for stream in streams} == {-(-count // 8)}
    seen = []
    for batch in (batch for stream in streams for batch in stream):
        assert batch["image"].shape == (8 // processes, SIZE, SIZE, 3)
        assert batch["label"].dtype == np.int32 and batch["mask"].dtype == np.float32
        counted = batch["mask"] == 1
        np.testing.assert_array_equal(
            batch["image"][counted], source.images[batch["label"][counted]]
        )
        assert not batch["image"][~counted].any() and not batch["mask"][~counted].any()
        seen += list(batch["label"][counted])
    assert sorted(seen) == list(range(count))


@pytest.fixture
def damaged_source(tmp_path):
    """Twelve images of one class, number 3 damaged."""
    rng = np.random.default_rng(2)
    for number in range(12):
        path = tmp_path / "train" / "a" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    (tmp_path / "train" / "a" / "03.png").write_bytes(b"no image")
    return open_folder(tmp_path, ["a"])


def test_damaged_images_are_replaced_alike_by_threads_and_workers(damaged_source, capsys):
    streams = []
    for workers in (0, 1):
        config = make_config(workers=workers)
        config.damaged_share = 0.1
        arguments = dict(batch_size=4, total_steps=6, seed=0)  # two epochs
        streams.append(list(train_batches(damaged_source, config, **arguments)))
        warnings = capsys.readouterr().err.splitlines()
        assert len(warnings) == 1 and "03.png" in warnings[0] and "04.png" in warnings[0]
    for first, second in zip(*streams, strict=True):
        assert first.keys() == {"image", "label"}
        check_equal(first, second)


def test_too_many_damaged_images_are_a_user_error_from_threads_and_workers(damaged_source):
    for workers in (0, 1):
        batches = train_batches(
            damaged_source, make_config(workers=workers), batch_size=4, total_steps=3, seed=0
        )
        with pytest.raises(UserError, match="1 damaged images are more than") as error:
            list(batches)
        assert "0.10% of 12" in str(error.value) and "03.png" in str(error.value)
        batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_not_count_damaged_images(workers, damaged_source, capsys):
    """Seven images, the fourth damaged; an image in its place would count twice."""
    config = make_config(workers=workers)
    config.damaged_share = 0.2
    seven = damaged_source.select(np.arange(7))
    batches = list(eval_batches(seven, config, batch_size=4))
    assert [list(batch["mask"]) for batch in batches] == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert not batches[0]["image"][3].any() and batches[0]["image"][2].any()
    (warning,) = capsys.readouterr().err.splitlines()
    assert "03.png" in warning and warning.endswith("it is not counted (1 of at most 1)")


PROGRAM = """
import sys
import time
import weakref
import zlib
from pathlib import Path
from m2mkd_jax.data.pipeline import train_batches
from tests.unit.data.test_data_pipeline import make_config, open_folder

if __name__ == "__main__":
    root, workers, start = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    source = open_folder(root, [f"{number:02d}" for number in range(24)])
    config = make_config(workers=workers)
    batches = train_batches(
        source, config, batch_size=6, total_steps=40, start_step=start, seed=7
    )
    for step, batch in enumerate(batches, start):
        print(step, zlib.crc32(batch["image"].tobytes()), batch["label"].sum(), flush=True)
"""


def test_a_killed_worker_is_told_and_a_terminals_signals_end_none(folder_source):
    batches = train_batches(
        folder_source, make_config(workers=1), batch_size=6, total_steps=40, seed=7
    )
    next(batches)
    (worker,) = (p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline()))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        worker.send_signal(number)
    for _ in range(8):  # more than wait already
        next(batches)
    worker.kill()
    with pytest.raises(Lost, match=r"a worker process .* was ended \(exit code -9\)"):
        for _ in range(31):
            next(batches)
    assert next(batches, None) is None


def test_a_worker_that_is_ended_as_it_begins_is_told():
    """It gets more than a pipe holds; who writes that waited forever."""
    source, told = array_source(200), []
    batches = train_batches(source, make_config(workers=1), batch_size=6, total_steps=40, seed=7)

    def read():
        with pytest.raises(Lost, match="exit code -15"):
            for _ in range(40):
                next(batches)
        told.append(True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while reader.is_alive():
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.terminate()
                reader.join(120)
                assert told
                return
    raise AssertionError("no worker")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_program_goes_on_with_the_same_bytes(workers, folder_source, tmp_path):
    root = Path(__file__).parents[3]
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def start(step):
        command = [sys.executable, tmp_path / "program.py", folder_source.files.root]
        return subprocess.Popen(
            [*command, str(workers), str(step)],
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    whole = train_batches(folder_source, make_config(), batch_size=6, total_steps=40, seed=7)
    expected = [
        f"{step} {zlib.crc32(batch['image'].tobytes())} {batch['label'].sum()}\n"
        for step, batch in enumerate(whole)
    ]
    step = int(np.random.default_rng(workers).integers(3, 30))
    with start(0) as killed:
        seen = [killed.stdout.readline() for _ in range(step)]
        workers_left = psutil.Process(killed.pid).children(recursive=True)
        os.kill(killed.pid, signal.SIGKILL)
        assert not psutil.wait_procs(workers_left, timeout=60)[1]
    with start(step) as resumed:
        seen += resumed.stdout.readlines()
    assert resumed.returncode == 0
    assert seen == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_two_thousand_batches(workers):
    """A batch has 0.4 MB: keeping one in ten of 1,500 would show as 60 MB."""
    images = np.zeros((64, 64, 64, 3), np.uint8)
    source = ArrayImageSource(images, np.arange(64), [str(i) for i in range(64)])
    config = make_config("shift", workers, policy="")
    config.image_size = 64
    batches = train_batches(source, config, batch_size=32, total_steps=2000, seed=0)
    processes = None
    for step, _ in enumerate(batches):
        if step == 500:
            process = psutil.Process()
            processes = [process, *process.children(recursive=True)]
            before = sum(p.memory_info().rss for p in processes)
        if step == 1990:
            after = sum(p.memory_info().rss for p in processes)
    batches.close()
    assert after - before < 60e6


@pytest.mark.parametrize(("workers", "collections"), [(0, 0), (1, 1)])
def test_no_batch_is_left_of_an_evaluation(workers, collections, monkeypatch):
    """Python collects all of its objects where batches lay in shared memory, and only there."""
    calls, collect = [], pipeline.gc.collect
    monkeypatch.setattr(pipeline.gc, "collect", lambda: calls.append(collect()))
    config, arrays, shared = make_config("shift", workers, policy=""), [], Path("/dev/shm")
    before = set(shared.glob("psm_*")) if shared.is_dir() else set()
    pipeline.gc.disable()
    try:
        for batch in eval_batches(array_source(7), config, batch_size=4):
            arrays.append(weakref.ref(batch["image"]))
        del batch
    finally:
        pipeline.gc.enable()
    assert len(calls) == collections and [array() for array in arrays] == [None, None]
    until = time.monotonic() + 10  # the threads that fetched them end by themselves
    while shared.is_dir() and set(shared.glob("psm_*")) - before and time.monotonic() < until:
        time.sleep(0.05)
    assert not shared.is_dir() or set(shared.glob("psm_*")) <= before


def test_the_number_of_workers_fits_the_machine(monkeypatch):
    free = SimpleNamespace(free=1 << 40)
    memory = SimpleNamespace(available=1 << 40)
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert workers_module.automatic_workers(1 << 20) == 14
    free.free = 64 << 20  # a container's shared memory: 64 MB hold 8 times 4 batches of 1 MB
    assert workers_module.automatic_workers(1 << 20) == 8
    assert workers_module.automatic_workers(100 << 20) == 0
    free.free, memory.available = 1 << 40, 4 << 30  # half of 4 GB: three times 0.5 GB and more
    assert workers_module.automatic_workers(1 << 20) == 4
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 2)
    assert workers_module.automatic_workers(1 << 20) == 2


def test_images_in_memory_need_no_workers(folder_source, monkeypatch):
    """-1 asks the machine for files only: a worker would hold its own copy of the arrays."""
    asked = []
    monkeypatch.setattr(pipeline, "automatic_workers", lambda size: asked.append(size) or 0)
    for source, times in ((array_source(12), 0), (folder_source, 1)):
        list(train_batches(source, make_config(workers=-1), batch_size=6, total_steps=2, seed=0))
        assert asked == [6 * SIZE**2 * 3] * times


def test_a_program_that_stops_in_the_middle_ends_silently(tmp_path):
    """Exit code 3 (preempted) must not come with Grain's page of warnings about its workers."""
    program = tmp_path / "stops.py"
    program.write_text(
        "import sys\n"
        "import numpy as np\n"
        "from ml_collections import ConfigDict\n"
        "from m2mkd_jax.data.array_source import ArrayImageSource\n"
        "from m2mkd_jax.data.pipeline import train_batches\n"
        "if __name__ == '__main__':\n"
        "    config = ConfigDict(dict(image_size=4, workers=1, repeated_augmentation=1,\n"
        "        damaged_share=0.0, augment=dict(crop='none', shift=0, scale=(0.1, 1.0),\n"
        "        flip=False, rand_augment='', color_jitter=0.0, erase=0.0)))\n"
        "    images = np.zeros((8, 4, 4, 3), np.uint8)\n"
        "    source = ArrayImageSource(images, np.arange(8), '12345678')\n"
        "    batches = train_batches(source, config, batch_size=4, total_steps=99, seed=0)\n"
        "    batch = next(batches)\n"
        "    sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(batch_size=9), "a batch of 9 cannot be shared by 2 processes"),
        (dict(batch_size=80), "does not fit into 40"),
        (dict(batch_size=8, seed=-3), "seed is -3"),
    ],
)
def test_wrong_numbers_are_user_errors(arguments, words):
    arguments = dict(total_steps=5, seed=0, process_count=2) | arguments
    with pytest.raises(UserError, match=words):
        train_batches(array_source(40), make_config(), **arguments)
    with pytest.raises(UserError, match=r"data\.workers is -2"):
        eval_batches(array_source(4), make_config(workers=-2), batch_size=4)


def test_steps_and_processes_out_of_range_are_bugs():
    for wrong in (dict(start_step=6), dict(process_index=2, process_count=2)):
        with pytest.raises(ValueError):
            train_batches(
                array_source(8), make_config(), batch_size=4, total_steps=5, seed=0, **wrong
            )

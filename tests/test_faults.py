"""Processes killed, disks full, bytes flipped, two at once: the next run gives the right result.

Each fault happens to a real process, with a cache of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from prunelib import data, models, training
from prunelib.data import Examples

ROOT = Path(training.__file__).resolve().parents[1]
NETWORK = models.mlp((16, 8, 3))
RECIPE = training.Recipe("tiny", steps=100, batch=16, learning_rate=1e-2)
GENERATOR = np.random.default_rng(0)
EXAMPLES = Examples(
    GENERATOR.integers(0, 256, (160, 16)).astype(np.uint8),
    GENERATOR.integers(0, 3, 160).astype(np.int32),
)
SEEDS = (0, 1)


def train(**options):
    return training.train(NETWORK, RECIPE, EXAMPLES, SEEDS, **options)


@pytest.fixture(scope="module")
def reference():
    return train(fresh=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_right(runs, reference):
    for found, expected in zip(
        *(jax.tree.leaves((r.params, r.history)) for r in (runs, reference)), strict=True
    ):
        # another process may have other threads, and sum in another order
        np.testing.assert_allclose(found, expected, atol=1e-4)


def assert_found_again(reference, monkeypatch):
    """What is kept is right, and it is used: no training, no warning."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train", None)
        assert_right(train(), reference)


# Another process ---------------------------------------------------------------------------------

# What a child does before its fault; `reached` tells the parent that it is there, and waits for
# the kill.
PRELUDE = """
import json, os, sys, time, types, warnings
from pathlib import Path
import numpy as np
sys.path[:0] = [{root!r}, {tests!r}]
def reached():
    Path({flag!r}).touch()
    time.sleep(600)
import test_faults as t
from prunelib import data, training
"""


def child(code, folder, prefix=()):
    """Start a process that runs `code`, with its cache in `folder`/cache."""
    prelude = PRELUDE.format(
        root=str(ROOT), tests=str(Path(__file__).parent), flag=str(folder / "reached")
    )
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", prelude + code],
        env=os.environ | {"PRUNELIB_CACHE": str(folder / "cache"), "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when_reached(process, folder):
    """kill -9, as soon as the child says that it is in the middle."""
    while not (folder / "reached").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


MIDDLE_OF_TRAINING = """
reports = []
def advance(number, steps):
    reports.append(steps)
    if len(reports) == 20:
        reached()
training._advance = advance
t.train()
"""
MIDDLE_OF_WRITING = """
def dumps(value, **options):
    return reached() if "content" in value else json.dumps(value, **options)
training.json = types.SimpleNamespace(dumps=dumps, loads=json.loads)
t.train()
"""
BEFORE_THE_MOVE = """
training.os.replace = lambda *args: reached()
t.train()
"""
# The old entry is damaged: it has been moved aside, and the new one is not there yet.
BETWEEN_TWO_MOVES = """
moves = []
def replace(*args, move=os.replace):
    moves.append(args)
    reached() if len(moves) == 2 else move(*args)
training.os.replace = replace
warnings.simplefilter("ignore")
t.train()
"""
KILLS = {
    "training": MIDDLE_OF_TRAINING,
    "writing": MIDDLE_OF_WRITING,
    "before the move": BEFORE_THE_MOVE,
    "between two moves": BETWEEN_TWO_MOVES,
}


@pytest.mark.parametrize("moment", KILLS)
def test_kill_9(cache, tmp_path, monkeypatch, reference, moment):
    if moment == "between two moves":
        train()
        (entry,) = (cache / "runs").iterdir()
        (entry / "run.json").write_text("{")
    kill_when_reached(child(KILLS[moment], tmp_path), tmp_path)
    assert_right(train(), reference)  # and no warning, since that would be an error
    assert_found_again(reference, monkeypatch)


HALF_A_CACHE = """
mnist = data.Mnist(t.EXAMPLES, t.EXAMPLES)
def half(file, **arrays):
    Path(file).write_bytes(b"PK the first half")
    reached()
np.savez_compressed = half
data._write_cache(data.cache_dir() / "mnist-3.0.1.npz", mnist)
"""


def test_kill_9_while_the_data_is_kept(cache, tmp_path, monkeypatch):
    kill_when_reached(child(HALF_A_CACHE, tmp_path), tmp_path)
    assert any(cache.iterdir()), "it was in the middle"
    right = data.Mnist(EXAMPLES, EXAMPLES)
    monkeypatch.setattr(data, "_prepare", lambda *args, **options: right)
    monkeypatch.setattr(data, "_verified", lambda mnist: mnist)
    assert data.load_mnist() is right
    monkeypatch.setattr(data, "_prepare", None)
    found = data.load_mnist()
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, two)


AT_ONCE = """
# Both train before either saves, and neither has seen the other's run.
def train(*args, train=training._train):
    runs = train(*args)
    (Path({folder!r}) / str(os.getpid())).touch()
    while len(list(Path({folder!r}).iterdir())) < 2:
        time.sleep(0.01)
    return runs
training._train = train
warnings.simplefilter("error")
runs = t.train()
print(runs.history["loss"].sum())
"""


def test_two_processes_train_at_once(cache, tmp_path, monkeypatch, reference):
    (tmp_path / "trained").mkdir()
    code = AT_ONCE.format(folder=str(tmp_path / "trained"))
    processes = [child(code, tmp_path) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert float(output) == pytest.approx(reference.history["loss"].sum(), rel=1e-4)
    assert len(list((cache / "runs").iterdir())) == 1
    assert_found_again(reference, monkeypatch)


# Disks -------------------------------------------------------------------------------------------

WARNED = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    runs = t.train()
    mnist = data.Mnist(*[data.Examples(np.random.default_rng(0).integers(0, 256, (500, 784)),
                                       np.zeros(500))] * 2)
    data._write_cache(data.cache_dir() / "mnist-3.0.1.npz", mnist)
kept = [str(f.relative_to(data.cache_dir())) for f in data.cache_dir().rglob("*")
        if not f.is_dir()] if data.cache_dir().exists() else []
print(json.dumps([float(runs.history["loss"].sum()), [str(w.message) for w in caught], kept]))
"""
SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # bytes: no file can be larger
"""


def mounted(folder, options):
    """A prefix for a command: it sees `folder` as a disk of its own, which goes when it ends."""
    prefix = ["unshare", "--map-root-user", "--user", "--mount", "sh", "-c",
              f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"', str(folder)]  # fmt: skip
    if not shutil.which("unshare"):
        pytest.skip("needs the command unshare (Linux) to mount a disk")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk in a namespace of its own")
    return prefix


def assert_warned(process, reference):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    loss, warned, kept = json.loads(output.splitlines()[-1])
    assert loss == pytest.approx(reference.history["loss"].sum(), rel=1e-4)
    assert len(warned) == 2, warned
    assert warned[0].startswith("the run cannot be kept in")
    assert warned[1].startswith("MNIST cannot be kept in")
    assert all("set PRUNELIB_CACHE to a folder that can be written" in text for text in warned)
    assert kept == [], "nothing half-written is left"


def test_full_disk(tmp_path, reference):
    (tmp_path / "cache").mkdir()
    prefix = mounted(tmp_path / "cache", "size=8k")
    assert_warned(child(WARNED, tmp_path, prefix), reference)


def test_files_that_may_not_grow(tmp_path, reference):
    """The same by a limit of the process, which every user may set."""
    assert_warned(child(SMALL_FILES + WARNED, tmp_path), reference)


def test_read_only_home(tmp_path, reference):
    (tmp_path / "cache").mkdir()
    prefix = mounted(tmp_path / "cache", "ro")
    assert_warned(child(WARNED, tmp_path, prefix), reference)


# Bytes -------------------------------------------------------------------------------------------


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def missing(file):
    file.unlink()


@pytest.fixture(scope="module")
def kept(tmp_path_factory, reference):
    """A run that is kept, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELIB_CACHE", str(folder))
        patch.setattr(training, "_train", lambda *args: reference)
        train()
    return folder


# Those with the numbers have random names; all are damaged, since Orbax keeps some parts twice.
FILES = [
    "run.json",
    "arrays/_METADATA",
    "arrays/_CHECKPOINT_METADATA",
    "arrays/manifest.ocdbt",
    "arrays/**/d/*",
]


# Orbax's threads complain as well, to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncated, flipped, empty, missing])
@pytest.mark.parametrize("name", FILES)
def test_damaged_run(kept, cache, monkeypatch, reference, name, damage):
    """Either the damage is noticed, and the run is trained and kept anew; or it does no harm."""
    shutil.copytree(kept, cache)
    (folder,) = (cache / "runs").iterdir()
    files = list(folder.glob(name))
    assert files
    for file in files:
        damage(file)
    trained = []
    monkeypatch.setattr(training, "_train", lambda *args: trained.append(args) or reference)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train()
    for one, two in zip(
        *(jax.tree.leaves((r.params, r.history)) for r in (found, reference)), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert len(trained) == len(caught) <= 1, "trained anew with a warning, or not at all"
    if name in ("run.json", "arrays/**/d/*"):
        assert "is damaged" in str(caught[0].message)
        assert "training it again" in str(caught[0].message)
    monkeypatch.setattr(training, "_train", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()  # it was healed


def test_a_shipped_run_that_is_damaged(kept, cache, tmp_path, monkeypatch, reference):
    """The remedy is the same; the copy made anew goes to the cache."""
    (folder,) = (kept / "runs").iterdir()
    shutil.copytree(folder, tmp_path / "shipped" / RECIPE.name)
    truncated(tmp_path / "shipped" / RECIPE.name / "run.json")
    monkeypatch.setattr(training, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(training, "_train", lambda *args: reference)
    with pytest.warns(UserWarning, match="is damaged.*Delete that folder"):
        train()
    assert len(list((cache / "runs").iterdir())) == 1


def test_no_pickle_is_ever_read():
    """Nothing that is shipped or kept is a pickle, and no line of the package unpickles."""
    for source in (ROOT / "prunelib").glob("*.py"):
        text = source.read_text("utf-8")
        assert "import pickle" not in text
        assert "allow_pickle=True" not in text
    for file in (ROOT / "prunelib").rglob("*"):
        assert file.suffix not in (".pkl", ".pickle", ".pt", ".joblib")


# make run ----------------------------------------------------------------------------------------

RUN_NOTEBOOKS = """
sys.path.insert(0, {scripts!r})
import nbformat, run_notebooks
def half(notebook, file, *args, write=nbformat.write, **options):
    text = nbformat.writes(notebook)
    if hasattr(file, "write"):
        file.write(text[: len(text) // 2])
        file.flush()
    else:
        Path(file).write_text(text[: len(text) // 2])
    reached()
if {writing}:
    nbformat.write = half
sys.argv[1:] = [{notebook!r}]
sys.exit(run_notebooks.main())
"""


@pytest.mark.parametrize("writing", [False, True], ids=["executing", "writing"])
def test_kill_9_in_make_run(tmp_path, writing):
    """A notebook is stored whole or not at all; and the next `make run` executes it."""
    import nbformat  # takes seconds, which the children above need not spend

    path = tmp_path / "01-one.ipynb"
    flag = str(tmp_path / "reached")
    cells = [
        "x = 6 * 7",
        f"import os, time, pathlib\nif not os.path.exists({flag!r}) and not {writing}:\n"
        f"    pathlib.Path({flag!r}).touch()\n    time.sleep(60)",
        "print(x)",
    ]
    cells = [nbformat.v4.new_code_cell(cell, id=f"cell{i}") for i, cell in enumerate(cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    code = RUN_NOTEBOOKS.format(scripts=str(ROOT / "scripts"), notebook=str(path), writing=writing)
    kill_when_reached(child(code, tmp_path), tmp_path)
    assert path.read_bytes() == before
    code = RUN_NOTEBOOKS.format(scripts=str(ROOT / "scripts"), notebook=str(path), writing=False)
    process = child(code, tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[-1].outputs[0].text == "42\n"

"""What is kept: found by its name, whole or not at all, whatever happens to disks and processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import flat

from prunelib import data, experiments, models, pruning, store
from prunelib.data import Examples
from prunelib.training import Recipe

ROOT = Path(store.__file__).resolve().parents[1]
ARRAYS = {"a/b": np.arange(600.0).reshape(2, 300), "word": np.array("two words")}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never(*arguments, **options):
    raise AssertionError("made again")


def same(found):
    assert found.keys() == ARRAYS.keys()
    return all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)


def test_kept_and_found_by_name(cache):
    settings = {"recipe": {"steps": 3, "levels": (1, 2)}, "version": 1}  # JSON makes a list of it
    assert same(store.kept("one", settings, lambda: ARRAYS))
    assert same(store.kept("one", settings, never))
    assert [file.name for file in cache.iterdir()] == ["one.npz"]
    with pytest.raises(AssertionError, match="made again"):
        store.kept("two", settings, never)
    with pytest.warns(UserWarning, match=r"one\.npz was made with another version"):
        found = store.kept("one", settings | {"version": 2}, lambda: {"new": np.ones(1)})
    assert list(found) == ["new"]


@pytest.mark.parametrize("shipped", [True, False])
@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-100], lambda _: b"", lambda _: b"PK" * 99]
)
def test_damage_is_noticed_and_made_anew(cache, tmp_path, monkeypatch, damage, shipped):
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    file = (tmp_path / "shipped" if shipped else cache) / "one.npz"
    store.write(file, ARRAYS, {})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=r"one\.npz is damaged .* anew"):
        assert same(store.kept("one", {}, lambda: ARRAYS))
    assert shipped or same(store.kept("one", {}, never))


def test_a_folder_that_cannot_be_written_warns(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, not a folder")
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot be kept .*choose another folder"):
        assert same(store.kept("one", {}, lambda: ARRAYS))


KILLED = """
import os, sys, time
from pathlib import Path
import numpy as np
from prunelib import store
def replace(*paths):
    Path(sys.argv[1]).touch()
    time.sleep(600)
os.replace = replace
store.kept("one", {"version": 1}, lambda: {"new": np.ones(1)})
"""
FULL = """
import resource, warnings
import numpy as np
from prunelib import store
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # bytes: as a full disk, no file can grow
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = store.kept("one", {}, lambda: {"a": np.random.default_rng(0).random(1000)})
assert len(found["a"]) == 1000
assert len(caught) == 1 and "cannot be kept" in str(caught[0].message), caught
"""


def child(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_kill_9_in_the_middle_of_writing(cache, tmp_path):
    store.write(cache / "one.npz", {"old": np.ones(1)}, {"version": 0})
    process = child(KILLED, tmp_path / "reached")
    while not (tmp_path / "reached").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(store.kept("one", {"version": 0}, never)) == ["old"], "the old one is whole"


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_full_disk(cache):
    process = child(FULL)
    assert (process.communicate()[1], process.returncode) == ("", 0)
    assert list(cache.iterdir()) == [], "nothing half-written is left"


def test_cache_dir(monkeypatch, tmp_path):
    for name in ("PRUNELIB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_dir() == tmp_path / ".cache" / "prunelib"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_dir() == tmp_path / "xdg" / "prunelib"
    monkeypatch.setenv("PRUNELIB_CACHE", "~/own")
    assert store.cache_dir() == tmp_path / "own"
    assert not any(tmp_path.iterdir())


# The experiments of the series -------------------------------------------------------------------


@pytest.fixture(scope="module")
def some():
    return data.load_mnist().test.first(1000)


@pytest.mark.parametrize("name", experiments.RUNS)
def test_the_runs_are_shipped(some, name, cache, monkeypatch):
    """Found without training and without a warning, and as long and as good as they should be."""
    monkeypatch.setattr(experiments, "train", never)
    build, recipe, number, _, prepared = experiments.RUNS[name]
    runs = experiments.trained(name)
    assert (runs.recipe, runs.seeds) == (recipe, tuple(range(number)))
    for found, expected in zip(*map(jax.tree.leaves, (runs.params, build().shapes)), strict=True):
        assert found.shape == (number, *expected.shape)
    assert runs.history.groupby("seed").step.max().tolist() == [recipe.steps] * number
    assert np.isfinite(runs.history.to_numpy()).all()
    assert not cache.exists(), "what is shipped is not kept again"
    least = {"plain": 0.96, "fair_dropout": 0.96, "lenet300": 0.96, "lenet5": 0.97}
    some = prepared(some) if prepared else some
    accuracy = pruning.evaluate(build(), runs.select(number - 1), some).accuracy
    assert accuracy > least.get(name, 0.5)  # some stop long before they converge


@pytest.mark.parametrize("name", experiments.OUTCOMES)
def test_the_outcomes_are_shipped_and_as_sparse_as_asked(name, cache, monkeypatch):
    monkeypatch.setattr(experiments, "prune_and_retrain", never)
    monkeypatch.setattr(experiments, "trained", never)
    table, plan = experiments.outcome(name), experiments.OUTCOMES[name]
    run = (experiments.RUNS | experiments.CONTROLS | experiments.STARTS)[plan.start]
    assert set(table.remaining) == set(plan.remaining)
    assert len(table) % (len(plan.remaining) * run.seeds) == 0
    assert table.accuracy.between(0, 1).all()
    leaves = jax.tree.leaves_with_path(run.network().shapes)
    sizes = {"/".join(p.key for p in path): leaf.size for path, leaf in leaves}
    if name in experiments.DROPPING:  # counts are of units
        widths = {p[0].key: n for (p, _), n in zip(leaves, sizes.values(), strict=True)
                  if p[1].key == "bias"}  # fmt: skip
        *hidden, _ = widths
        total = sum(widths[layer] for layer in hidden)
        assert list(table[hidden].sum(axis=1)) == [
            total - int((100 - level) * total / 100) for level in table.remaining
        ]
        return
    left = table[list(sizes)]
    for row, counts in zip(table.itertuples(), left.to_dict("records"), strict=True):
        percent, total = round(100 - row.remaining, 9), sum(sizes.values())
        moved = name in experiments.CURVES and row.criterion == "obs"
        if moved or name in experiments.SURGERY:  # where biases stay
            biases = sum(n for a, n in sizes.items() if "bias" in a)
            assert sum(counts.values()) == total - int(percent * (total - biases) / 100)
        elif row.scope == "all":
            assert sum(counts.values()) == total - int(percent * total / 100)
        else:
            assert counts == {a: n - int(percent * n / 100) for a, n in sizes.items()}


def test_no_two_outcomes_have_one_name():
    kinds = (experiments.PLANS, experiments.CURVES, experiments.SURGERY, experiments.DROPPING)
    assert sum(map(len, kinds)) == len(experiments.OUTCOMES)


@pytest.fixture
def tiny(cache, monkeypatch):
    """The tables hold one run and one plan, on few examples; nothing is shipped."""
    numbers = np.random.default_rng(0)
    few = Examples(numbers.integers(0, 256, (100, 784), np.uint8), numbers.integers(0, 10, 100))
    recipe = Recipe(steps=3, batch=8)

    def small():
        return models.mlp((784, 4, 10))

    run = experiments.RUNS["plain"]._replace(network=small, recipe=recipe, seeds=2)
    monkeypatch.setitem(experiments.RUNS, "plain", run)
    plan = experiments.PLANS["plain-magnitude"]
    plan = replace(plan, retraining=recipe, remaining=(20, 8))
    for table in (experiments.PLANS, experiments.OUTCOMES):
        monkeypatch.setitem(table, "plain-magnitude", plan)
    for name, table in (("plain-surgery", "SURGERY"), ("lenet300-units", "DROPPING")):
        plan = replace(getattr(experiments, table)[name], start="plain", retraining=recipe)
        monkeypatch.setitem(experiments.OUTCOMES, name, replace(plan, remaining=(50, 25)))
    monkeypatch.setattr(store, "SHIPPED", cache / "none")
    monkeypatch.setattr(data, "load", lambda name: data.Splits(few, few))
    return monkeypatch


def test_a_run_is_trained_kept_and_found(tiny, cache, capsys):
    one = experiments.trained("plain")
    with tiny.context() as patch:
        patch.setattr(experiments, "train", never)
        two = experiments.trained("plain")
    np.testing.assert_array_equal(flat(one.params), flat(two.params))
    assert isinstance(jax.tree.leaves(two.params)[0], jax.Array)
    assert one.history.equals(two.history)
    run = experiments.RUNS["plain"]
    other = run._replace(recipe=replace(run.recipe, learning_rate=0.5))
    tiny.setitem(experiments.RUNS, "plain", other)
    with pytest.warns(UserWarning, match="made with another recipe"):
        assert experiments.trained("plain").recipe.learning_rate == 0.5
    experiments.main(["plain"])
    assert [file.name for file in (cache / "none").iterdir()] == ["plain.npz"]
    assert "plain: " in capsys.readouterr().out


def test_an_outcome_is_the_same_fresh_and_fetched(tiny):
    one = experiments.outcome("plain-magnitude")
    tiny.setattr(experiments, "prune_and_retrain", never)
    two = experiments.outcome("plain-magnitude")
    assert one.equals(two)
    assert one.dtypes.equals(two.dtypes)
    columns = {"recipe", "seed", "criterion", "scope", "remaining", "before", "accuracy", "loss"}
    assert columns < set(one)
    left, total = one[[c for c in one if "/" in c]].sum(axis=1), 784 * 4 + 4 + 40 + 10
    assert left.tolist() == [total - level * total // 100 for level in (80, 80, 92, 92)]


@pytest.mark.parametrize("name", ["plain-surgery", "lenet300-units"])
def test_one_cut_without_and_with_an_update(tiny, name):
    one, plan = experiments.outcome(name), experiments.OUTCOMES[name]
    tiny.setattr(experiments, "trained", never)
    assert one.equals(experiments.outcome(name))
    rows = one[["criterion", "remaining", "update", "seed"]].to_numpy().tolist()
    assert rows == [
        [c, level, update, seed]
        for c in plan.criteria for level in plan.remaining for update in (0, 1) for seed in (0, 1)
    ]  # fmt: skip
    before, after = (one.before[one["update"] == update].to_numpy() for update in (0, 1))
    assert (before != after).any(), "the others have moved"
    left = one[["dense1"] if plan.units else ["dense1/kernel", "dense2/kernel"]].sum(axis=1)
    total = 4 if plan.units else 784 * 4 + 40
    assert left.tolist() == [level * total // 100 for level in one.remaining]

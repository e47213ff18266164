"""Pictures and the tables they show: kept where they change, and only there."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from prunelib import figures

TABLE = pd.DataFrame(
    {"remaining": [100, 50, 10], "criterion": ["magnitude", "OBD, ½ h w²", "obd"],
     "accuracy": [0.98, np.nan, 1 / 3]}
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "figures"


def drawn(title="one"):
    figure, ax = figures.new()
    ax.plot([0, 1, 2], label="rising")
    ax.set_title(title)
    return figure


def stamps(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_a_table_is_read_by_pandas_without_options(folder):
    figures.save(drawn(), "one", TABLE)
    assert sorted(file.name for file in folder.iterdir()) == ["one.csv", "one.png"]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "one.csv"), TABLE, rtol=1e-6)
    assert "½ h w²" in (folder / "one.csv").read_bytes().decode("utf-8")
    assert plt.imread(folder / "one.png").ndim == 3


def test_a_table_of_words_alone_is_kept(folder):
    figures.save(drawn(), "steps", TABLE.select_dtypes(exclude="number"))
    assert not pd.read_csv(folder / "steps.csv").empty


def test_what_agrees_is_left_alone(folder):
    """But for rounding: no file of a second run is touched."""
    figures.save(drawn(), "one", TABLE)
    before = stamps(folder)
    close = TABLE.assign(accuracy=TABLE.accuracy * (1 + 1e-7))
    figures.save(drawn(), "one", close)
    assert stamps(folder) == before


CHANGED = {
    "a number": TABLE.assign(accuracy=[0.98, np.nan, 0.4]),
    "a word": TABLE.assign(criterion=["magnitude", "obd", "obd"]),
    "a row more": pd.concat([TABLE, TABLE[:1]]),
    "another column": TABLE.rename(columns={"accuracy": "loss"}),
    "another type": TABLE.assign(remaining=["all", "half", "few"]),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_has_changed_is_written(folder, what):
    figures.save(drawn(), "one", TABLE)
    figures.save(drawn("another"), "one", CHANGED[what])
    expected = CHANGED[what].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "one.csv"), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["one.csv", "one.png"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe garbage", None])
def test_what_is_damaged_or_missing_is_written_anew(folder, name, content):
    figures.save(drawn(), "one", TABLE)
    whole = stamps(folder)[name][1]
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    figures.save(drawn(), "one", TABLE)
    assert stamps(folder)[name][1] == whole


def test_the_folder_is_that_of_the_project_around(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    for below in ("notebooks", "notebooks/deep"):
        monkeypatch.chdir(tmp_path / below)
        assert figures.folder() == tmp_path / "figures"
    figures.save(drawn(), "one", TABLE)
    assert (tmp_path / "figures" / "one.png").exists()
    (tmp_path / "pyproject.toml").rename("pyproject.toml")  # somebody else's project
    assert figures.folder() == tmp_path / "notebooks" / "deep" / "figures"


def test_a_folder_that_cannot_be_written_warns(folder):
    folder.write_text("a file")
    with pytest.warns(UserWarning, match="figure 'one' is not kept"):
        figures.save(drawn(), "one", TABLE)


def test_lines_draw_the_mean_the_range_and_the_names():
    table = pd.DataFrame(
        {"remaining": [100, 50] * 4, "criterion": ["magnitude"] * 4 + ["obd"] * 4,
         "seed": [0, 0, 1, 1] * 2, "accuracy": [0.9, 0.5, 0.8, 0.3, 0.9, 0.8, 0.9, 0.6]}
    )  # fmt: skip
    _, ax = figures.new()
    figures.remaining_axis(ax, low=40)
    figures.lines(ax, table)
    assert ax.get_xlim() == (100, 40), "falling to the right"
    found = {line.get_label(): line for line in ax.get_lines()}
    assert set(found) == {"magnitude", "OBD"}
    np.testing.assert_allclose(found["magnitude"].get_ydata(), [85, 40])
    np.testing.assert_allclose(found["magnitude"].get_xdata(), [100, 50])
    assert found["OBD"].get_color() == figures.COLOURS["obd"]
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (30, 90)
    assert {text.get_text() for text in ax.texts} == {"magnitude", "OBD"}

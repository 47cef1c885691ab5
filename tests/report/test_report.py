"""The page about runs: what it shows, also of damaged and unfinished ones, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from moesaic.cli import main
from moesaic.report import charts, tables
from moesaic.report.page import render
from moesaic.report.record import read_runs
from moesaic.train.config import TrainConfig, to_json
from moesaic.train.errors import UserError

LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
SAMPLE = "</script><script>throw 1</script>"
MORE = {"bits_per_byte/other": 2.25, "best_step": 18, "sample": SAMPLE}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_run(folder, *, steps=20, rows=10, result=True, loads=True, **changes):
    """A run folder as training leaves it. Expert 2 of the last layer never gets a token."""
    folder.mkdir(parents=True)
    settings = to_json(TrainConfig(steps=steps, **changes))
    about = {
        "settings": settings,
        "world_size": 4,
        "parameters": 12345678,
        "versions": {"torch": "2.13.0"},
        "model": {},
    }
    (folder / "config.json").write_text(json.dumps(about))
    lines = []
    for count in range(rows):
        row = {"step": 2 * count + 1, "loss": 8 / (count + 1), "tokens_per_second": 1000.0 + count, "memory_gib": 1.5}
        row |= {"balance": 2.0, "dead_experts": 1.0, "lr": 1e-3, "grad_norm": None, "time": 1.8e9 + 40 * count}
        if loads:
            row["expert_load"] = {layer: [10 + count, 20, 30 * (layer == LAYERS[0]), 5] for layer in LAYERS}
        if count == rows - 1:
            row |= {"bits_per_byte": 2.5, "bits_per_byte/other": 2.75}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if result:
        scores = {"unigram": 4.5, "bigram": 3.5, "model": 2.4}
        (folder / "result.json").write_text(json.dumps({"step": steps, "bits_per_byte": scores, **MORE}))
    return folder


@pytest.fixture
def two(tmp_path):
    """A run that has ended, with a name that HTML could take for more, and one that goes on."""
    one = write_run(tmp_path / "one<b>&'\"", seed=1)
    return one, write_run(tmp_path / "two", seed=2, lr=1e-2, steps=50, rows=4, result=False)


class _Text(HTMLParser):
    """The text of a page, without scripts and style; its tables as rows of cells."""

    def __init__(self, page):
        super().__init__()
        self.text, self.rows, self._skip = "", [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._skip = self._skip or tag in ("script", "style")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._skip = self._skip and tag not in ("script", "style")
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data):
        if not self._skip:
            self.text += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data.strip()


def test_the_page_compares_runs(two, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, two)]) == 0
    assert re.fullmatch(r"report.html: \d\.\d MiB; open it in a browser\n", capsys.readouterr().out)
    raw = (tmp_path / "report.html").read_text()
    page = _Text(raw)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["state"] == ["finished, step 20 of 20", "not finished, step 7 of 50"]
    assert rows["held out: this model, bits a byte"] == ["2.4000", "2.5000"]
    assert rows["held out: bigram bytes, bits a byte"] == ["3.5000", ""]
    assert rows["other, bits a byte"] == ["2.2500", ""]
    assert rows["exported, of step"] == ["18", ""]
    assert rows["last training loss"] == ["0.8000", "2.0000"]
    assert rows["time"] == ["6 min 0 s", "2 min 0 s"]
    assert rows["parameters"] == ["12,345,678"] * 2
    assert rows["lr"] == ["none", "0.01"]
    assert rows[LAYERS[1]] == ["2"]
    assert "Dead: no token in the last 4 logged steps." in page.text
    assert "two: the run has not ended." in page.text
    # Text of the user's is text.
    assert SAMPLE in page.text
    assert "one<b>&'\"" in page.text
    # Nothing is loaded from elsewhere.
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?!data:)", raw) == []


def test_what_differs_comes_first(two, tmp_path):
    differing, same = tables.settings(read_runs(two))
    assert {name for name, _ in differing} == {"lr", "steps", "seed"}
    assert "batch_size" in dict(same)
    # Of one run: what is not as by default. Settings that this version does not know are shown.
    [run] = read_runs(two[1:])
    run.settings["surprise"] = 7
    differing, same = tables.settings([run])
    assert {name for name, _ in differing} == {"lr", "steps", "seed"}
    assert dict(same)["surprise"] == ["7"]


def test_dead_experts_are_those_of_the_last_steps(two):
    run = read_runs(two)[0]
    assert charts.dead_experts(run) == (10, {LAYERS[1]: [2]})
    run.rows[-1]["expert_load"][LAYERS[1]][2] = 1
    assert charts.dead_experts(run) == (10, {})


def test_heatmaps_have_the_tokens_by_layer_expert_and_step(two):
    found = charts.heatmap(read_runs(two)[1])
    assert (found["layers"], found["steps"]) == (list(LAYERS), [1, 3, 5, 7])
    assert found["tokens"][0] == [[10, 11, 12, 13], [20] * 4, [30] * 4, [5] * 4]


def test_long_runs_are_thinned(two):
    run = read_runs(two)[0]
    values = [1.0] * 5000
    values[1234], values[4000] = 9.0, -9.0
    steps, kept = charts._thinned(list(range(5000)), values)
    assert len(steps) <= 1000
    assert {1234, 4000, 4999} <= {*steps}
    assert sorted(steps) == steps
    assert [values[step] for step in steps] == kept
    run.rows[:] = [{"step": n, "expert_load": {"a": [1] * 4000}} for n in range(700)]
    found = charts.heatmap(run)
    assert len(found["steps"]) <= 150 * 2
    assert (found["steps"][0], found["steps"][-1]) == (0, 699)
    assert 4000 * len(found["steps"]) <= 1_000_000


def test_damaged_and_older_runs_are_shown_with_a_word(tmp_path):
    old = write_run(tmp_path / "old", loads=False)
    bare = write_run(tmp_path / "bare", result=False)
    (bare / "metrics.jsonl").unlink()
    torn = write_run(tmp_path / "torn")
    (torn / "result.json").write_text("{")
    with open(torn / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "expert_load": {"x": ["<b>"]}, "loss": "x", "memory_gib": true}\n{"step": 3, "lo')
    runs = read_runs([old, bare, torn])
    text = _Text(render(runs)).text
    assert "old: metrics.jsonl has no load of experts" in text
    assert "bare: metrics.jsonl cannot be read" in text
    assert "torn: result.json cannot be read" in text
    assert charts.heatmap(runs[2])["steps"][-1] == 19
    assert charts.heatmap(runs[1]) is None


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [run.name for run in read_runs([*runs, runs[0]])] == ["a/run", "b/run"]


def test_the_page_of_one_run_is_in_its_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert str(folder / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no such folder"),
        (["."], "it has no config.json; there are runs in it: broken, run"),
        (["run/inside"], "it has no config.json; a run folder is what `moesaic train` makes"),
        (["broken"], "cannot read the settings of the run in"),
        (["run", "--out", "no/such/place.html"], "choose another file with --out"),
        ([], "give at least one run folder"),
    ],
    ids=str,
)
def test_what_cannot_be_shown(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "run" / "inside").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"settings": 3}')
    assert main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("moesaic report: ")


def test_without_plotly_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(write_run(tmp_path / "run"))]) == 2
    assert "pip install '.[report]'" in capsys.readouterr().err


def test_settings_that_cannot_be_read_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: there is no such folder"):
        read_runs([tmp_path / "nowhere"])


def open_in_browser(file, *, dark=False, width=1200):
    """The document that Chromium makes of a page, and what it wrote to its console."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},900"]
    flags += [f"--user-data-dir={file.parent / 'browser'}", "--virtual-time-budget=500", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)


def test_a_browser_draws_the_page_without_errors(two, tmp_path):
    page = render(read_runs(two))
    file = tmp_path / "page.html"
    file.write_text(page)
    document, console = open_in_browser(file, dark=True)
    assert console == []
    assert 'data-theme="dark"' in document
    count = len(charts.curves(read_runs(two)))
    assert f'data-drawn="{count}"' in document
    # Each curve, and two heatmaps of each run, is a drawing.
    assert document.count('class="plot-container') == count + 4


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1600])
def test_a_browser_draws_every_kind_of_run(tmp_path, dark, width):
    folders = [write_run(tmp_path / "old", loads=False), write_run(tmp_path / "none", rows=0, result=False)]
    folders += [write_run(tmp_path / f"run{n}", rows=1 + 200 * n) for n in range(9)]
    file = tmp_path / "page.html"
    for some in (folders, folders[1:2], folders[:1], folders[2:3]):
        file.write_text(render(read_runs(some)))
        document, console = open_in_browser(file, dark=dark, width=width)
        assert console == []
        assert f'data-theme="{"dark" if dark else "light"}"' in document


@pytest.mark.long
def test_an_error_in_the_browser_is_seen(two, tmp_path):
    file = tmp_path / "page.html"
    page = render(read_runs(two))
    broken = page.replace("  draw();\n})();", "  draw();\n  nothing.there();\n})();")
    assert broken != page
    file.write_text(broken)
    assert any("nothing is not defined" in line for line in open_in_browser(file)[1])

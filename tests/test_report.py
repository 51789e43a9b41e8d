"""The report is judged by what a reader sees. All numbers here are invented."""

import copy
import io
import json
import shutil
import struct

import pytest
from rich.console import Console

import axis_charts
import chart_parts
import charts
import readings
import report

REASON = "oneDNN has no int8 matrix product for <this CPU> | see README"
RECIPES = [  # name, title, decode tokens/s, speed-up, prefill tokens/s, peak MB, weights and size MB, retention
    ("baseline", "Baseline (float32)", 6.5, None, 100, 5000, 4400, 1.0),
    ("mixed_precision", "Mixed precision (bfloat16)", 12.6, 1.47, 410, 2700, 2200, 0.9993),
    ("int8", "INT8 weights and activations", 21.9, 2.94, 380, 1750, 1240, 0.9954),
    ("int8_classic", "INT8 dynamic (classic)", "unsupported", REASON),
    ("head_pruning", "Head pruning (12.5 %)", 7.1, 1.043, 106, 4700, 4190, 0.9431),
    ("kv_cache_int8", "INT8 KV cache", 6.4, 0.985, 97, 4990, 4400, 0.9991),
    ("bf16+kv8", "BF16 + INT8 KV cache", "failed", "exit code 1"),
    ("prune+int8+kv8", "Head pruning + INT8 weights + INT8 KV cache", 22.4, 3.05, 371, 1690, 1180, 0.9389),
]

AXES = {"decode_speed_by_depth", "kv_cache_memory"}


def around(value, low, high):
    return value and [round(value * low, 4), round(value * high, 4)]


def record(name, title, speed, factor=None, prefill=100, peak=5000, weights=4400, kept=1.0):
    """One recipe as the pipeline writes it; with a word in place of the speed, one that has no result."""
    entry = {"name": name, "title": title, "device": "cpu", "dtype": "float32", "random_weights": False}
    entry |= {"model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "status": "ok", "reason": None}
    if isinstance(speed, str):
        return entry | {"status": speed, "reason": factor, "decode_tokens_per_s": None, "targets_met": None}
    entry |= {"decode_tokens_per_s": speed, "samples": {"decode_tokens_per_s": [speed * 0.96, speed, speed * 1.03]}}
    entry |= {"prefill_tokens_per_s": prefill, "prefill_speedup": prefill / 100}
    entry |= {"prefill_speedup_ci": around(prefill / 100, 0.96, 1.03), "speedup": factor}
    entry |= {"speedup_ci": around(factor, 0.97, 1.02), "verdict": factor and ("faster" if factor > 1 else "slower")}
    entry |= {"peak_memory_mb": peak, "weights_mb": weights, "kv_cache_mb": 11.5, "model_size_mb": weights}
    entry |= {"perplexity": 8 / kept, "perplexity_retention": kept}
    entry |= {"perplexity_retention_ci": around(kept, 0.996, 1.004)}
    entry |= {"bytes_per_token": weights * 0.94e6, "ceiling_speedup": 4400 / weights}
    met = {"speed": bool(factor and factor >= 1.6), "memory": peak <= 3250, "quality": kept >= 0.97}
    return entry | {"targets_met": met | {"all": all(met.values())}}


@pytest.fixture
def results():
    """Eight recipes: six measured, one that failed, one that this machine cannot run."""
    environment = {"cpu": "Imaginary 9000", "gpu": None, "cores": 4, "threads": 2, "ram_gb": 15.6, "os": "Linux"}
    environment |= {"torch": "2.13.0", "transformers": "5.23.0", "time": "2031-02-03T04:05:06+00:00"}
    workload = {"prompt_tokens": 128, "new_tokens": 128, "depth": 0, "batch_size": 1, "repeats": 5}
    aa = {"speedup": 1.001, "speedup_ci": [0.985, 1.012], "prefill_speedup": 0.997, "prefill_speedup_ci": [0.97, 1.02]}
    return {
        "environment": environment | {"read_bandwidth_gb_per_s": 29.1},
        "workload": workload | {"quality": {"windows": 16, "window": 512, "text": "a news corpus"}},
        "targets": {"decode_speedup": 1.6, "memory_change": -0.35, "perplexity_retention": 0.97},
        "aa": aa | {"trustworthy": True},
        "results": [record(*recipe) for recipe in RECIPES],
    }


@pytest.fixture
def folder(results, tmp_path):
    """A results folder beside a README, as in the repository."""
    return save(results, tmp_path / "results")


def save(consolidated, folder):
    folder.mkdir(exist_ok=True)
    (folder / "consolidated_results.json").write_text(json.dumps(consolidated), encoding="utf-8")
    return folder


def shown(consolidated):
    """The terminal output as text, wide enough that nothing is folded."""
    console = Console(file=io.StringIO(), width=200)
    report.print_table(consolidated, console)
    return console.file.getvalue()


def without_quality(consolidated):
    for entry in consolidated["results"]:
        entry |= {"random_weights": True, "perplexity": None, "perplexity_retention": None}
        if entry.get("targets_met"):
            entry["targets_met"] |= {"quality": None, "all": None}
    return consolidated


def line_of(text, beginning):
    return next(line for line in text.splitlines() if line.strip("│| ").startswith(beginning))


def test_the_table_shows_values_changes_and_intervals(results):
    row = line_of(shown(results), "INT8 weights")
    for part in ("21.9 (+194 % [+185, +200])", "1750 (-65 %)", "1240 (-72 %)", "8.04 (99.5 %)"):
        assert part in row
    assert "(" not in line_of(shown(results), "Baseline").replace("(float32)", ""), "no change against itself"


def test_the_lines_above_name_machine_and_workload(results):
    text = shown(results)
    for part in ("TinyLlama-1.1B-Chat-v1.0", "Imaginary 9000", "2 threads", "128 prompt tokens", "16 x 512 tokens"):
        assert part in text
    assert "decode 1.001x [0.985, 1.012]" in text and "WARNING" not in text and report.RANDOM not in text


def test_targets_are_passed_missed_or_not_measured(results):
    table = report.markdown_table(results).split("| Recipe")[1]
    assert "Decode +60 % | Memory -35 % | Retention 97 %" in table
    row = line_of(table, "INT8 weights")
    assert "pass (+194.0 %) | pass (-65.0 %) | pass (99.54 % [99.1, 99.9]) | pass | 3.55x | 3.80x [3.65, 3.91]" in row
    row = line_of(report.markdown_table(without_quality(results)).split("| Recipe")[1], "INT8 weights")
    assert "pass (-65.0 %) | not measured | not measured |" in row


def test_recipes_without_a_result_show_status_and_reason(results):
    text, markdown = shown(results), report.markdown_table(results)
    assert "INT8 dynamic (classic) - unsupported: " + REASON in text
    assert "failed: exit code 1" in text and "| failed: exit code 1 |" in markdown


def test_markdown_cells_are_escaped_and_every_row_is_complete(results):
    markdown = report.markdown_table(results)
    assert "&#60;this CPU&#62; &#124; see README" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {6, 8}
    results["results"][1]["title"] = "a\nb | [bold]c[/bold]"
    assert "a b &#124; [bold]c[/bold]" in report.markdown_table(results)
    assert "[bold]c[/bold]" in shown(results), "terminal markup in a title stays text"


def test_random_weights_and_an_untrustworthy_run_are_said_aloud(results):
    results["aa"]["trustworthy"] = False
    for text in (shown(without_quality(results)), report.markdown_table(without_quality(results))):
        assert report.RANDOM in text
        assert "Untrustworthy run" in text
        assert "not measured" in line_of(text, "INT8 weights")


def test_without_an_interleaved_factor_the_two_speeds_are_compared(results):
    results["results"][1].update(speedup=None, speedup_ci=None, decode_tokens_per_s=13.0)
    assert "13.0 (+100 %)" in report.markdown_table(results)


def test_a_change_that_rounds_to_nothing_has_no_sign():
    assert readings.percent(0.99999) == readings.percent(1.0) == "0.0 %" and readings.percent(None) == ""
    assert readings.percent(1.0432, (1.012, 1.0641)) == "+4.3 % [+1.2, +6.4]"


def mostly_null(consolidated):
    """Each key of a record is null in one of two cases; then whole sections and records are missing."""
    keys = sorted({key for entry in consolidated["results"] for key in entry} - {"status"})
    for start in range(2):
        case = copy.deepcopy(consolidated)
        for entry in case["results"]:
            entry |= dict.fromkeys(keys[start::2])
        yield f"keys {start}", case
    yield "sections", {**consolidated, **dict.fromkeys(["environment", "workload", "targets", "aa"])}
    yield "everything", {"results": [{"name": entry["name"], "status": "ok"} for entry in consolidated["results"]]}
    yield "single", {**consolidated, "results": consolidated["results"][:1]}
    yield "no baseline", {**consolidated, "results": consolidated["results"][1:]}
    yield "only failures", {**consolidated, "results": [consolidated["results"][3]]}


def test_any_value_may_be_null_in_the_tables(results):
    for _key, case in mostly_null(results):
        assert "nan" not in shown(case) and "None" not in shown(case) + report.markdown_table(case)
    results["results"][1] |= {"perplexity": float("nan"), "perplexity_retention": float("inf")}
    assert "not measured" in line_of(shown(results), "Mixed precision")


def test_all_charts_are_drawn_and_large_enough_to_read(results, tmp_path):
    paths = charts.draw_all(results, tmp_path)
    assert [path.stem for path in paths] == [name for name in charts.CHARTS if name not in AXES]
    assert sorted(paths) == sorted((tmp_path / "visualizations").iterdir()), "no temporary file is left"
    for path in paths:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])  # the PNG header
        assert width > 900 and height > 500 and path.stat().st_size > 20_000


def test_without_quality_there_is_no_quality_chart_and_a_stale_one_goes(results, tmp_path):
    stale = tmp_path / "visualizations" / "quality.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    names = {path.stem for path in charts.draw_all({**without_quality(results), "aa": None}, tmp_path)}
    assert names == {"decode_speed", "prefill_speed", "memory", "model_size"}
    assert not stale.exists()


def test_any_value_may_be_null_in_the_charts(results, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.write_bytes(b""))
    drawn = {key: [path.stem for path in charts.draw_all(case, tmp_path)] for key, case in mostly_null(results)}
    assert drawn["everything"] == drawn["only failures"] == []
    assert "decode_speed" in drawn["single"] and "decode_speed" in drawn["no baseline"]
    for entry in results["results"]:
        entry["model_size_mb"] = None  # no room on the disk
    assert "pareto" in [path.stem for path in charts.draw_all(results, tmp_path)]


def test_a_chart_names_what_it_does_not_show(results):
    results["results"][4]["peak_memory_mb"] = None
    records = [entry for entry in results["results"] if entry.get("peak_memory_mb")]
    figure = charts.memory(without_quality(results), records)
    texts = " ".join(text.get_text() for text in figure.texts)
    for part in ("Not measured: Head pruning (12.5 %)", "unsupported: oneDNN", report.RANDOM, "Imaginary 9000"):
        assert part in texts
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == 5 and not any("classic" in text for text in labels)


def test_labels_of_crowded_points_do_not_touch(results):
    crowd = [record(f"r{n}", f"Recipe number {n}", 7, 1 + n / 200, kept=0.999 - n / 900) for n in range(12)]
    results["results"][1:] = crowd
    figure = charts.pareto(results, crowd)
    boxes = [chart_parts.Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 13
    assert not any(box.count_overlaps(boxes[:place]) for place, box in enumerate(boxes))


def test_the_front_of_each_trade_is_marked(results):
    """Diamonds: in speed the fastest and those that keep more; in size int8 is the smallest."""
    figure = charts.pareto(results, [r for r in results["results"] if r["status"] == "ok"])
    fronts = []
    for axes in figure.axes:
        diamonds = [line for line in axes.lines if line.get_marker() == "D"]
        fronts.append({round(float(line.get_xdata()[0]), 3) for line in diamonds})
    assert fronts == [{3.05, 2.94, 1.47}, {1180, 1240, 2200}]
    texts = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
    assert texts.count("INT8 KV cache") >= 2 and "Imaginary 9000" in " ".join(text.get_text() for text in figure.texts)


def test_what_the_baseline_beats_is_on_no_front(results):
    """Slower than it, larger and a little worse: no trade, though no other recipe keeps as much."""
    loser = results["results"][1] | {"name": "loser", "speedup": 0.9, "perplexity_retention": 0.9999}
    loser |= {"speedup_ci": [0.8, 0.95], "perplexity_retention_ci": [0.999, 1.0], "model_size_mb": 9999.0}
    figure = charts.pareto(results, [loser])
    assert all(line.get_marker() != "D" for axes in figure.axes for line in axes.lines)


@pytest.fixture
def curve(results):
    """Two kinds of pruning at two shares of the bytes, and one point that failed."""
    baseline = results["results"][0]
    points = [baseline]
    for technique, options, cost in [("head_pruning", {}, 0.4), ("layer_pruning", {"what": "blocks"}, 2.0)]:
        for share in (0.02, 0.05):
            kept = 1 - cost * share
            step = {"technique": technique, "options": options}
            figures = {"bytes_per_token": baseline["bytes_per_token"] * (1 - share), "perplexity_retention": kept}
            figures["perplexity_retention_ci"] = [kept - 0.01, kept + 0.01]
            points.append(record(f"{technique}-{share}", f"{technique} {share}", 6.0) | figures | {"steps": [step]})
    points.append(record("lost", "9 blocks", "failed", "no memory") | {"steps": []})
    return {**results, "results": points}


def test_equal_bytes_has_a_line_for_each_kind(curve, tmp_path):
    (tmp_path / "equal_bytes_results.json").write_text(json.dumps(curve))
    assert [path.stem for path in charts.draw_all_own(tmp_path)] == ["equal_bytes"]
    assert charts.stale(curve, tmp_path) == []
    curve["results"][1]["perplexity_retention"] = 0.5
    (tmp_path / "equal_bytes_results.json").write_text(json.dumps(curve))
    assert [path.stem for path in charts.stale(curve, tmp_path)] == ["equal_bytes"]
    axes = charts.equal_bytes(curve).axes[0]
    lines = {line.get_label(): line.get_xdata() for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"baseline", "query heads, the rest refitted", "whole blocks"}
    assert lines["whole blocks"] == pytest.approx([2, 5])
    low = next(line for line in axes.lines if line.get_label().startswith("query heads"))
    assert 50 in low.get_ydata() and axes.get_ylim()[0] == 70, "drawn where it is, below the axis: slopes are true"
    assert "50 %" in [text.get_text() for text in axes.texts]
    texts = " ".join(text.get_text() for text in charts.equal_bytes(curve).texts)
    assert "9 blocks - failed: no memory" in texts
    assert charts.equal_bytes({"results": curve["results"][:1]}) is None


def test_the_map_of_sensitivity(results, tmp_path):
    """A cell for each layer and kind, white where nothing was measured; the dearest layer is named."""
    costs = {"q_proj": [1e-4, 2e-4, None], "down_proj": [3e-3, 1e-5, 0.0]}
    content = {**results, "results": results["results"][:1], "costs": costs, "lm_head": 0.02, "group_size": 64}
    figure = charts.sensitivity(content)
    assert figure.axes[0].images[0].get_array().shape == (2, 3)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["q", "down"]
    texts = " ".join(text.get_text() for text in figure.texts)
    assert "0.0030 nats" in texts and "lm_head" in texts and "Imaginary 9000" in texts
    assert charts.sensitivity(content | {"heads": [1, 2, 3]}).axes[0].images[0].get_array().shape == (3, 3)
    assert charts.sensitivity(content | {"costs": {}}) is charts.sensitivity(content | {"costs": {"q_proj": [None]}}) is None
    (tmp_path / "layer_costs_results.json").write_text(json.dumps(content))
    (tmp_path / "equal_bytes_results.json").write_text("{")
    assert [path.stem for path in charts.draw_all_own(tmp_path)] == ["sensitivity"]


BLOCK = "<!-- results:results -->old<!-- /results:results -->"
ROW = "<!-- row:results:{0} -->old<!-- /row:results:{0} -->"


def test_readme_markers_are_rewritten_once_and_then_stay(folder, results):
    readme = folder.parent / "README.md"
    readme.write_text(f"# Title\n\n{BLOCK}\n\nSpeed: {ROW.format('int8')}\nend é\n", encoding="utf-8")
    assert report.update_readme(readme, check=True) == ["results:results", "row:results:int8"]
    assert ">old<" in readme.read_text(encoding="utf-8"), "a check writes nothing"
    assert report.update_readme(readme) == ["results:results", "row:results:int8"]
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- results:results -->\nTinyLlama") and text.endswith("-->\nend é\n")
    assert report.markdown_table(results) in text and "old" not in text
    assert report.update_readme(readme) == report.update_readme(readme, check=True) == []
    results["results"][2]["speedup"] = 2.5
    save(results, folder)
    assert report.update_readme(readme, check=True) == ["results:results", "row:results:int8"]


def test_a_row_is_one_sentence_with_interval_and_retention(folder, results):
    assert report.row_sentence(results, "int8") == (
        "INT8 weights and activations: decode 2.94x [2.85, 3.00], 21.9 tokens/s (faster); peak memory in MB 1750 (-65 %); "
        "model size in MB 1240 (-72 %); perplexity 8.04 (retention 99.5 %)."
    )
    assert report.row_sentence(results, "int8_classic").startswith("No result - unsupported: oneDNN")
    assert "perplexity not measured (random weights" in report.row_sentence(without_quality(results), "int8")


def test_only_the_chosen_folders_are_rewritten(folder, results):
    other = shutil.copytree(folder, folder / "other")
    readme = folder.parent / "README.md"
    readme.write_text(BLOCK + BLOCK.replace("results:results", "results:results/other"), encoding="utf-8")
    assert report.update_readme(readme, ["results/other"]) == ["results:results/other"]
    assert ">old<" in readme.read_text() and report.update_readme(readme, [other]) == []


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("<!-- results:nowhere --><!-- /results:nowhere -->", "results:nowhere"),
        (ROW.format("int3"), "row:results:int3"),
        ("<!-- results:results -->", "results:results"),
        ("<!-- row:results:int8 -->" + BLOCK + "<!-- /row:results:int8 -->", "row:results:int8"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(folder, text, marker):
    readme = folder.parent / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=marker):
        report.update_readme(readme)
    assert readme.read_text() == text


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"results": []}', '{"results": 3}', "\x00"])
def test_a_missing_or_broken_file_is_one_sentence(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "consolidated_results.json").write_text(content)
    with pytest.raises(ValueError, match=r"consolidated_results\.json"):
        readings.load_results(tmp_path)
    assert report.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "visualizations").exists()


def test_the_command_prints_draws_rewrites_and_checks(folder, results, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    readme = folder.parent / "README.md"
    readme.write_text(BLOCK, encoding="utf-8")
    assert report.main(["--check"]) == 1
    assert "results:results" in capsys.readouterr().out and not (folder / "visualizations").exists()
    assert report.main(["results", "--readme", "README.md"]) == 0
    assert "21.9 (+194 %" in capsys.readouterr().out and "21.9 (+194 %" in readme.read_text(encoding="utf-8")
    assert report.main(["--check"]) == 0
    results["environment"]["load_average"] = [3.0, 2.0, 1.0]
    save(results, folder)
    assert report.main(["--check"]) == 1, "the tables agree, but the charts are of another run"
    assert "decode_speed.png" in capsys.readouterr().out
    readme.write_text(ROW.format("nothing"))
    assert report.main(["--check"]) == 2 and "row:results:nothing" in capsys.readouterr().err


def test_axis_charts_name_the_crossover(results, tmp_path):
    """A cache recipe that overtakes the baseline at depth 512 is drawn over depth, and the caption says where."""
    cache = next(r for r in results["results"] if r["status"] == "ok" and r["name"] != "baseline")
    point = {"batch_size": 1, "baseline_kv_cache_mb": 40.0, "kv_cache_mb": 11.0}
    speedups = {256: [0.93, 0.97], 512: [1.01, 1.05]}
    cache["steps"] = [{"technique": "kv_cache_quant", "options": {}}]
    cache["axes"] = [
        point | {"depth": d, "baseline_decode_tokens_per_s": 20.0, "decode_tokens_per_s": 19.0, "speedup": sum(ends) / 2,
                 "speedup_ci": ends}
        for d, ends in speedups.items()
    ]  # fmt: skip
    cache |= {"speedup": 0.8, "speedup_ci": [0.7, 0.9]}
    assert {path.stem for path in charts.draw_all(results, tmp_path)} >= AXES
    figure = axis_charts.depth_speed(results, [cache])
    assert "beside the baseline, by depth: faster at 512; slower at 0, 256." in said(figure), "whatever the medians say"
    quantized = {"technique": "quantization", "options": {}}
    stack = cache | {"title": "Both", "steps": [quantized, *cache["steps"]]}
    rival = cache | {"title": "Int8 alone", "steps": [quantized], "speedup_ci": [0.5, 0.6]}
    rival["axes"] = [entry | {"speedup_ci": [1.1, 1.2]} for entry in cache["axes"]]
    said_of = said(axis_charts.depth_speed(results, [stack, rival]))
    assert "Both, beside Int8 alone, by depth: faster at 0; slower at 256, 512." in said_of
    rival["axes"] = [entry | {"speedup": 0.96, "speedup_ci": None} for entry in cache["axes"]]
    text = said(axis_charts.depth_speed(results, [stack, rival]))
    assert "Both, beside Int8 alone, by depth: faster at 0; too few pairs to tell at 256, 512." in text
    rival["speedup_ci"] = None
    text = said(axis_charts.depth_speed(results, [stack, rival]))
    assert "Both, beside Int8 alone, by depth: too few pairs to tell at 0, 256, 512." in text
    rival |= {"speedup_ci": [1.1, 1.2], "axes": [entry | {"speedup_ci": [0.95, 0.97]} for entry in cache["axes"]]}
    text = said(axis_charts.depth_speed(results, [stack, rival]))
    assert "Both, beside Int8 alone, by depth: faster at 512; slower at 0; not told apart at 256." in text
    drawn = [text.get_text() for text in axis_charts.cache_memory(results, [cache, stack]).axes[0].get_legend().get_texts()]
    assert len(drawn) == 2, "equal caches share a line"
    lines = axis_charts.cache_memory(results, [cache]).axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [3, 3], "the main workload's point is drawn as well"
    assert "depth" not in said(axis_charts.cache_memory(results, [cache])).partition("repeats")[0], "it varies"


def test_a_recipe_with_the_baselines_cache_is_not_called_unmeasured(results):
    cache, other = [r for r in results["results"] if r["status"] == "ok" and r["name"] != "baseline"][:2]
    point = {"depth": 512, "batch_size": 1, "baseline_decode_tokens_per_s": 20.0, "decode_tokens_per_s": 19.0}
    cache["steps"] = [{"technique": "kv_cache_quant", "options": {}}]
    cache["axes"] = [point | {"baseline_kv_cache_mb": 40.0, "kv_cache_mb": 11.0}]
    other["axes"] = [point | {"baseline_kv_cache_mb": 40.0, "kv_cache_mb": 40.0}]
    text = said(axis_charts.cache_memory(results, [cache, other]))
    name = readings.label(other)
    assert f"The same cache as the baseline: {name}" in text and name not in text.partition("Not measured")[2]


def said(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def test_the_decode_chart_by_hand(results):
    """A ceiling is bandwidth over bytes for one token, times the sequences that share them; beside a bar, rate and ratio."""
    shown = [entry for entry in results["results"] if entry["status"] == "ok"]
    for batch_size in (1, 2):
        results["workload"]["batch_size"] = batch_size
        axes = charts.speed(results, shown).axes[0]
        (ceiling,) = [line for line in axes.lines if line.get_marker() == "D"]
        by_hand = [batch_size * 29.1e9 / entry["bytes_per_token"] for entry in shown]
        assert list(ceiling.get_xdata()) == pytest.approx(by_hand)
    assert any("21.9" in text.get_text() and "2.94x [2.85, 3.00]" in text.get_text() for text in axes.texts)

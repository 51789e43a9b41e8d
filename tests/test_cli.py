"""The command line: bad input costs one sentence and exit code 2, never a load; help and defaults say what is true."""

import importlib
import io
import json
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from pipeline_model import save_tiny_model
from safetensors.torch import load_file, save_file

import cli
import experiment
import inputs
import models
import run_optimization
import stacks
import texts
from arguments import without_flags
from benchmark import Workload
from fitting import healing

ROOT = Path(cli.__file__).parent
TECHNIQUES = sorted(path.stem for path in (ROOT / "optimizations").glob("*.py") if path.stem != "__init__")
SCRIPTS = [
    "baseline.py",
    "run_optimization.py",
    "pruning_curve.py",
    "layer_costs.py",
    *(f"optimizations/{name}.py" for name in TECHNIQUES),
]
MODULES = [f"optimizations.{name}" for name in TECHNIQUES]


@pytest.fixture
def config_folder(tmp_path):
    """A model that is only a configuration, 8 query heads on 2 KV heads, 1024 positions: loading it must fail."""
    make_tiny(max_position_embeddings=1024).config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """Whoever loads weights or starts a worker in this file has checked an argument too late."""

    def refuse(*_, **__):
        raise AssertionError("an argument was checked after the model was loaded")

    monkeypatch.setattr(models, "load_model", refuse)
    monkeypatch.setattr("worker.WorkerProcess.__init__", refuse)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # parsing the arguments sets it for the whole process


@pytest.fixture
def refused(config_folder, tmp_path, monkeypatch, capsys):
    """`refused(arguments, module=...)` runs a script that must exit with 2, and returns the sentence it printed."""
    monkeypatch.chdir(tmp_path)

    def run(arguments, module="baseline"):
        # A flag of the test's own comes later and wins.
        given = ["--model", str(config_folder), "--results-dir", str(tmp_path / "out"), *map(str, arguments)]
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module).main(given)
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == "", "stdout is for results"
        assert "Traceback" not in captured.err
        (sentence,) = captured.err.strip().splitlines()
        return sentence

    return run


@pytest.mark.parametrize("flag", ["--prompt-tokens", "--new-tokens", "--batch-size", "--repeats", "-p", "-n", "-b", "-r"])
@pytest.mark.parametrize("value", ["0", "-1", "-100"])
def test_counts_below_one(refused, flag, value):
    """Nothing is measured on nothing: the sentence names the long flag."""
    names = {"-p": "--prompt-tokens", "-n": "--new-tokens", "-b": "--batch-size", "-r": "--repeats"}
    assert names.get(flag, flag) in refused([flag, value])


@pytest.mark.parametrize("arguments", [["--depth", "-1"], ["--depth", "0,-5"], ["--seed", "-1"], ["--batch-size", "1,0"]])
def test_other_numbers_out_of_range(refused, arguments):
    """Depth may be 0, not less; every entry of a list is checked."""
    assert arguments[0] in refused(arguments)


@pytest.mark.parametrize(
    "flag", ["--prompt-tokens", "--new-tokens", "--depth", "--batch-size", "--repeats", "--threads", "--seed"]
)
@pytest.mark.parametrize("value", ["many", "1.5", ""])
def test_no_number(refused, flag, value):
    assert flag in refused([flag, value])


@pytest.mark.parametrize("value", ["0", "-5", "nan", "soon"])
def test_budget_that_is_no_time(refused, value):
    """0 seconds must not become the default in silence, nor NaN a run without end."""
    assert "--budget-s" in refused(["--budget-s", value])


@pytest.mark.parametrize("value", ["0", "1", "nan", "fine"])
def test_precision_out_of_range(refused, value):
    assert "--precision" in refused(["--precision", value])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt-tokens", "5000"],
        ["--new-tokens", "5000"],
        ["--depth", "1000"],
        ["--depth", "0,1000"],
        ["--prompt-tokens", "512", "--new-tokens", "256", "--depth", "257"],
    ],
)
def test_more_tokens_than_positions(refused, arguments):
    """The sentence names the flags that add up, and the limit; the deepest of a list counts."""
    sentence = refused(arguments)
    assert all(flag in sentence for flag in ("--prompt-tokens", "--new-tokens", "--depth", "1024"))


def test_all_positions_may_be_used(config_folder, tmp_path):
    """1024 of 1024 positions is not too many."""
    flags = ["-m", str(config_folder), "-o", str(tmp_path / "out"), "-p", "512", "-n", "256", "-d", "256"]
    args = cli.parse(cli.build_parser("doc"), flags)
    assert args.workload.positions == 1024


@pytest.mark.parametrize("recipes", ["no_such_recipe", "int8,no_such_recipe", "", "int8,,head_pruning", "INT8"])
def test_unknown_recipe(refused, recipes):
    """Among known ones too; the sentence lists what there is."""
    sentence = refused(["--recipes", recipes], module="run_optimization")
    assert "--recipes" in sentence and "kv_cache_int8" in sentence


@pytest.mark.parametrize(
    ("stack", "named"),
    [
        ("", "choose from"),
        ("int3", "int4"),
        ("int4 + ", "choose from"),
        ("lean_decode + int4", "order"),
        ("int4 + int4", "order"),
        ("int4:bits=6", "max_bits"),
        ("int4:6", "option=value"),
        ("int4:max_bits=many", "a number"),
        ("quantization:group_size=1.5", "whole number"),
        ("mixed_precision:untie=maybe", "true or false"),
        ("kv_cache_quant:bits=4", "none at all"),
        ("int4:max_bits=2", "--max-bits"),
        ("head_pruning:prune_ratio=0.01 + lean_decode", "no head at all of 8"),
        ("quantization + int4", "--stack"),
        ("mixed_precision + quantization", "--stack"),
        ("mixed_precision:dtype=fp8", "--dtype"),
        ("int4:max_bits=nan", "--max-bits"),
        ("mlp_pruning:calibration_text=all", "--calibration-text"),
    ],
)
def test_stack_that_cannot_be(refused, stack, named):
    """What does not exist, and what its technique refuses from the configuration alone."""
    assert named in refused(["--stack", stack], module="run_optimization")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--find", "--min-retention", "1"],
        ["--find", "--min-retention", "0"],
        ["--find", "--min-retention", "nan"],
        ["--find", "--max-memory-mb", "0"],
        ["--find", "--max-memory-mb", "-3"],
        ["--find", "--min-speedup", "0"],
        ["--find", "--min-speedup", "inf"],
        ["--find", "--find-minutes", "0"],
        ["--find", "--recipes", "int8"],
        ["--find", "--stack", "int4"],
        ["--find", "--new-tokens", "1"],
        ["--min-speedup", "2"],
        ["--find-minutes", "2"],
        ["--minutes", "0"],
        ["--find", "--minutes", "5"],
    ],
)
def test_search_that_cannot_be(refused, arguments):
    assert arguments[-2] in refused(arguments, module="run_optimization")


def test_a_search_on_random_weights(refused):
    assert "random weights" in refused(["--find", "-m", "tinyllama-random"], module="run_optimization")


@pytest.mark.parametrize("module", ["pruning_curve", "layer_costs"])
def test_a_curve_of_random_weights(refused, module):
    assert "random weights" in refused(["-m", "tinyllama-random"], module=module)


def test_unknown_kind_of_pruning(refused):
    assert "--kinds" in refused(["--kinds", "blocks,neurons"], module="pruning_curve")
    assert "--shares 0.1,2" in refused(["--shares", "0.1,2"], module="pruning_curve")
    assert "--shares a" in refused(["--shares", "a"], module="pruning_curve")


def test_stacks_stand_beside_recipes_or_alone(started):
    recipes, _ = started("run_optimization", "--stack", "int4:max_bits=6 + lean_decode", "--stack", "quantization")
    assert list(recipes.values()) == [[("int4", {"max_bits": 6.0}), ("lean_decode", {})], [("quantization", {})]]
    recipes, _ = started("run_optimization", "--recipes", "int8", "--stack", "quantization")
    assert list(recipes) == ["int8", "quantization"]


@pytest.mark.parametrize("below", [False, True])
def test_results_folder_that_cannot_be_written(refused, tmp_path, below):
    """A file stands where the folder or one of its parents should be."""
    (tmp_path / "taken").write_text("a file")
    assert "--results-dir" in refused(["--results-dir", tmp_path / "taken" / ("deeper" if below else "")])
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize("flag", ["--prompts-file", "--text-file"])
@pytest.mark.parametrize("content", [None, b"", b" \n\n \t\n", b"\xff\xfe\x00not text"])
def test_files_of_the_user(refused, tmp_path, flag, content):
    """Missing, empty, blank, or not UTF-8."""
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    assert flag in refused([flag, path])


@pytest.mark.parametrize("flag", ["--prompts-file", "--text-file"])
def test_a_folder_in_place_of_a_file(refused, tmp_path, flag):
    assert flag in refused([flag, tmp_path])


def test_a_folder_without_safetensors(refused, tmp_path):
    """Said before anything is measured, and earlier results are not moved for it."""
    model = save_tiny_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    for module, *flags in (("baseline", "--quick"), ("pruning_curve", "--quick"), ("layer_costs",)):
        assert "only safetensors are read" in refused(["--model", model, *flags], module=module)


@pytest.mark.parametrize("damage", ["cut", "a tensor is missing", "a tensor too many", "another shape"])
def test_damaged_weights(refused, tmp_path, damage):
    """Known from the files' headers before anything is measured; earlier results stay where they are."""
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    file = model / "model.safetensors"
    tensors = load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        name = "model.layers.0.mlp.up_proj.weight"
        other = {"a tensor too many": {"extra": torch.ones(2)}, "another shape": {name: tensors[name][1:].clone()}}
        kept = tensors if damage != "a tensor is missing" else {key: tensors[key] for key in tensors if key != name}
        save_file(kept | other.get(damage, {}), file)
    out.mkdir()
    (out / "baseline_results.json").write_text("{}")
    assert "--model model" in refused(["--model", model, "--quick"])
    assert [path.name for path in out.iterdir() if path.name[0] != "."] == ["baseline_results.json"]


def test_ctrl_c_while_a_model_is_looked_for(monkeypatch, capsys, tmp_path):
    def interrupt(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "find_model", interrupt)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("baseline").main(["-o", str(tmp_path / "out")])
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_random_weights_have_nothing_to_smooth_by(refused):
    chosen = ["--model", "tinyllama-random", "--recipes", "int8,int8_dynamic"]
    assert "choose int8_original" in refused(chosen, module="run_optimization")
    args = SimpleNamespace(recipes="all", stack=[], source=models.find_model("tinyllama-random"))
    assert set(run_optimization.RECIPES) - set(run_optimization.recipe_names(args)) == {"int8_dynamic"}


@pytest.mark.parametrize("technique", ["head_pruning", "mlp_pruning"])
def test_recovery_is_measured_apart(technique):
    """Twice: pruned as without training, and trained."""
    once, twice = (healing.recipes(technique, {"prune_ratio": 0.1, "heal_minutes": minutes}) for minutes in (0.0, 2.0))
    assert once == {technique: [(technique, {"prune_ratio": 0.1, "heal_minutes": 0.0})]}
    assert twice == once | {f"{technique}_healed": [(technique, {"prune_ratio": 0.1, "heal_minutes": 2.0})]}


def test_a_text_that_techniques_learn_from(refused, tmp_path, monkeypatch):
    """One long line of it is enough; other text is taken."""
    known = texts.Text("a book", f"short\n{'word ' * 40}\n")
    monkeypatch.setattr(texts, "calibration_texts", lambda: [known])
    (tmp_path / "text.txt").write_text(f"Mine.\n{'word ' * 40}\nshort\n" * 50)
    model = save_tiny_model(tmp_path / "model")
    assert "calibration text (a book)" in refused(["--model", model, "--quick", "--text-file", tmp_path / "text.txt"])
    texts.check_apart(texts.Text("text.txt", "short\n" + "other " * 40))


def test_a_prompt_longer_than_the_models_positions(refused, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("short\n" + "word " * 200)
    assert "reads no text" in refused(["-m", "tinyllama-random", "--prompts-file", tmp_path / "prompts.txt"])
    sentence = refused(["--model", model, "--quick", "--prompts-file", tmp_path / "prompts.txt"])
    assert "--prompts-file: the longest prompt" in sentence and "positions" in sentence
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 80}
    (model / "config.json").write_text(json.dumps(config))
    assert "the benchmark's longest prompt" in refused(["--model", model, "-p", "8", "-n", "8", "--quality-window", "32"])


def test_half_precision_of_a_stack_stands_in_the_stack(refused):
    sentence = refused(["--stack", "mixed_precision", "--dtype", "bf16"], module="run_optimization")
    assert "--dtype bf16" in sentence and "mixed_precision:dtype=bf16" in sentence


@pytest.mark.parametrize("flags, expected", [
    (["--recipes", "all", "-m", "x"], ["-m", "x"]), (["-m", "x", "--recipes=a,b"], ["-m", "x"]), (["--rec", "a"], []),
    (["-r", "3", "--resume"], ["-r", "3", "--resume"]),
])  # fmt: skip
def test_flags_are_left_out_with_their_values(flags, expected):
    assert without_flags(flags, "--recipes") == expected


@pytest.mark.parametrize("flags, expected", [
    ([], "--recipes int8"), (["--recipes", "all"], "--recipes int8"),
    (["--stack", "int4", "--recipes", "int8"], "--stack int4 --recipes int8"),
])  # fmt: skip
def test_a_record_names_the_command_of_its_recipe(monkeypatch, flags, expected):
    monkeypatch.setattr("sys.argv", ["/somewhere/run_optimization.py", *flags])
    assert experiment.repro("int8") == f"python run_optimization.py {expected}"


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "abc", "1.0", "nan", "0.0"])
def test_prune_ratio_out_of_range(refused, ratio):
    assert "--prune-ratio" in refused(["--prune-ratio", ratio], module="optimizations.head_pruning")


@pytest.mark.parametrize("ratio", ["0.99", "0.01"])
def test_prune_ratio_that_leaves_or_removes_no_head(refused, ratio):
    """Known from the configuration, so the weights are not needed to say so."""
    sentence = refused(["--prune-ratio", ratio], module="optimizations.head_pruning")
    assert "--prune-ratio" in sentence and ("no head of 8" in sentence or "no head at all of 8" in sentence)


@pytest.mark.parametrize("size", ["0", "-64", "3", "abc"])
def test_group_size_out_of_range(refused, size):
    pytest.importorskip("optimizations.quantization")
    assert "--group-size" in refused(["--group-size", size], module="optimizations.quantization")


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("optimizations.head_pruning", "--mode"),
        ("optimizations.mixed_precision", "--dtype"),
        ("optimizations.quantization", "--scheme"),
    ],
)
def test_unknown_choice(refused, module, flag):
    assert flag in refused([flag, "nonsense"], module=module)


def test_unknown_device(refused):
    assert "--device" in refused(["--device", "tpu"])


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_this_machine_lacks(refused, monkeypatch, device):
    """A known device that is not here: the sentence says what is."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    sentence = refused(["--device", device])
    assert f"--device {device}" in sentence and "cpu" in sentence


@pytest.mark.parametrize("threads", ["0", "-2", "100000"])
def test_threads_out_of_range(refused, threads):
    assert "--threads" in refused(["--threads", threads])


@pytest.mark.parametrize("name", ["no-such-model", "no/such/file.gguf", "owner/not-cached", ""])
def test_unknown_model(refused, name):
    assert "--model" in refused(["--model", name])


def test_model_without_a_tokenizer(refused):
    """A folder with a configuration but no tokenizer files is the user's mistake, not a crash."""
    assert "--model" in refused([])


def test_unknown_flag(refused):
    assert "--no-such-flag" in refused(["--no-such-flag", "1"])


# Defaults


@pytest.fixture
def started(monkeypatch, config_folder, tmp_path):
    """`started(module, *arguments)`: what the script hands to the experiment, recipes and arguments."""
    handed = {}

    def run(recipes, args, **_):
        handed.update(recipes=recipes, args=args)
        return 0

    monkeypatch.setattr(experiment, "run", run)

    def start(module, *arguments):
        main = importlib.import_module(module).main
        assert main(["-m", str(config_folder), "-o", str(tmp_path / "out"), *arguments]) == 0
        return handed["recipes"], handed["args"]

    return start


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_defaults_of_the_flags_are_those_of_apply(started, technique):
    """One place for a default: a script without flags does what `apply(model)` does."""
    recipes, _ = started(f"optimizations.{technique}")
    [[(name, options)]] = recipes.values()
    assert name == technique
    assert options == (importlib.import_module(f"optimizations.{technique}").apply.__kwdefaults__ or {})


def test_flags_of_a_technique_reach_apply(started):
    recipes, _ = started("optimizations.head_pruning", "--prune-ratio", "0.15", "--mode", "mask")
    assert list(recipes.values()) == [
        [
            (
                "head_pruning",
                importlib.import_module("optimizations.head_pruning").apply.__kwdefaults__
                | {"prune_ratio": 0.15, "mode": "mask"},
            )
        ]
    ]


def test_workload_of_the_flags(started):
    """Long and short spellings, defaults where nothing is given, and the same letters as llama-bench."""
    _, args = started("baseline", "-p", "32", "-n", "8", "-d", "16", "-b", "2", "-r", "7", "--seed", "3")
    assert args.workload == Workload(prompt_tokens=32, new_tokens=8, depth=16, batch_size=2, repeats=7, seed=3)
    _, args = started("baseline")
    assert args.workload == Workload()


def test_quick_is_smaller_and_a_flag_overrides_it(started):
    _, quick = started("baseline", "--quick")
    _, mixed = started("baseline", "--quick", "--new-tokens", "50")
    assert quick.workload.new_tokens < Workload().new_tokens
    assert quick.workload.quality_windows < Workload().quality_windows
    assert mixed.workload.new_tokens == 50 and mixed.workload.repeats == quick.workload.repeats


def test_recipes_are_taken_in_the_order_given(started):
    recipes, _ = started("run_optimization", "--recipes", "kv_cache_int8, head_pruning")
    assert list(recipes) == ["kv_cache_int8", "head_pruning"]


@pytest.mark.parametrize("name", run_optimization.RECIPES)
def test_every_recipe_names_techniques_and_options_that_exist(name):
    """The table is data: a typing error in it would otherwise show after an hour."""
    for technique, options in run_optimization.RECIPES[name][1]:
        assert set(options) <= set(importlib.import_module(f"optimizations.{technique}").apply.__kwdefaults__ or {})


@pytest.mark.parametrize("name", run_optimization.RECIPES)
def test_recipes_keep_the_order_of_combination(name):
    """prune -> precision -> weights -> cache -> lean pass: any other order is refused by the techniques."""
    positions = [stacks.ORDER.index(technique) for technique, _ in run_optimization.RECIPES[name][1]]
    assert positions == sorted(set(positions))


# Help, in processes of their own


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory):
    """`--help` of every script, by path and by module name, from a folder that is not the repository."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    commands = {script: [str(ROOT / script)] for script in SCRIPTS} | {name: ["-m", name] for name in MODULES}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        patch.setenv("COLUMNS", "200")
        texts = {name: _run_here(command, patch) for name, command in commands.items()}
        for name in ("baseline.py", MODULES[0]):  # two in a process of their own: each imports torch again
            done = subprocess.run([sys.executable, *commands[name], "--help"], capture_output=True, text=True, timeout=120)
            texts[name] = done.returncode, done.stdout, done.stderr
    assert list(elsewhere.iterdir()) == [], "asking for help must leave nothing behind"
    return texts


def _run_here(command, patch):
    """What the interpreter would do with `command` and --help, in this process: exit code, stdout, stderr."""
    patch.setattr(sys, "argv", [command[-1], "--help"])
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        (runpy.run_module if command[0] == "-m" else runpy.run_path)(command[-1], run_name="__main__")
    return stop.value.code or 0, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", SCRIPTS + MODULES)
def test_help(help_texts, name):
    """Works from anywhere as a file and as a module, and lists the shared flags."""
    code, out, err = help_texts[name]
    assert code == 0, err
    left_out = cli.OF_RECIPES if name == "layer_costs.py" else ()
    for flag in ("--model", "--device", "--threads", "--prompt-tokens", "--new-tokens", "--depth", "--results-dir", "--quick"):
        assert (flag in out) == (flag not in left_out)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_help_of_a_technique_names_its_paper(help_texts, technique):
    """With its address; and says what it loses, not only what it gains."""
    _, out, _ = help_texts[f"optimizations/{technique}.py"]
    assert "Paper" in out and "https://arxiv.org/abs/" in out
    assert "Loses" in out and f"python optimizations/{technique}.py" in out


def test_help_prints_each_default_of_a_technique(help_texts):
    """The reader of --help sees the value that applies."""
    _, out, _ = help_texts["optimizations/head_pruning.py"]
    assert "default: 0.25" in " ".join(out.split()) and "default: structural" in " ".join(out.split())


def test_the_fixture_is_only_a_configuration(config_folder):
    """Guards the tests above: there is nothing to load in it."""
    assert {path.name for path in config_folder.iterdir()} == {"config.json"}
    assert json.loads((config_folder / "config.json").read_text())["num_attention_heads"] == 8


@pytest.mark.parametrize("module", ["report", "compare_runs", "peers.compare", "peers.build_models"])
def test_scripts_of_their_own_flags_say_one_sentence_too(module, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main(["--color", "a", "b"])
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "--color" in sentence


def test_flags_that_would_do_nothing_are_no_flags(capsys):
    """A script that times nothing keeps their defaults and refuses them; its help is shorter for it."""
    parser = cli.build_parser("x", without=cli.OF_RECIPES)
    args = parser.parse_args([])
    assert args.repeats is None and args.precision == 0.02 and args.quick is False and args.resume is True
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-resume"])
    assert "--quick" not in parser.format_help() and "--results-dir" in parser.format_help()


@pytest.mark.parametrize(("flags", "module", "said"), [
    (["--recipes", "int8", "--dtype", "bf16"], "run_optimization", "--dtype bf16: none of the recipes"),
    (["--calibration-text", "evaluated"], "optimizations.head_pruning", "--calibration-text evaluated"),
    (["--quick", "--depth", "0,4"], "pruning_curve", "--depth: choose one"),
])  # fmt: skip
def test_flags_that_would_do_nothing_are_refused(refused, tmp_path, flags, module, said):
    assert said in refused(["--model", save_tiny_model(tmp_path / "model"), *flags], module=module)


def test_which_recipes_a_run_has(started):
    default, every = (started("run_optimization", *flags)[0] for flags in ([], ["--recipes", "all"]))
    assert list(every) == list(run_optimization.RECIPES)
    assert list(default) == [name for name in every if name not in run_optimization.ASKED_FOR]
    recipes, _ = started("run_optimization", "--quick", "--dtype", "fp16", "--recipes", "half+lean,int4+lean")
    assert recipes["half+lean"][0] == ("mixed_precision", {"dtype": "fp16"})
    assert recipes["int4+lean"][0] == ("int4", {"rounding": "nearest"}), "GPTQ takes minutes"


@pytest.mark.parametrize(
    ("flag", "value"), [("--quality-window", "2000"), ("--quality-window", "1"), ("--quality-windows", "0")]
)
def test_windows_that_cannot_be_scored(refused, flag, value):
    assert flag in refused([flag, value])


def test_inputs_are_as_long_as_was_asked(tmp_path, monkeypatch):
    """The timed prompt has all tokens that its rate is divided by; every row differs; what is scored is evaluation text."""
    monkeypatch.setattr(inputs, "load_text", lambda part="evaluation", **_: texts.Text(part, part[0] * 5000))
    model, flags = save_tiny_model(tmp_path / "m"), ["-p", "8", "-n", "4", "-d", "0,100", "-b", "1,3"]
    quality = ["--quality-windows", "2", "--quality-window", "32"]
    args = cli.parse(cli.build_parser("doc"), ["-m", str(model), "-o", str(tmp_path / "o"), *flags, *quality])
    assert args.axes == [(0, 3), (100, 1), (100, 3)]
    tokenizer = models.load_tokenizer(args.source)
    made = inputs.prepare(tokenizer, args, vocab_size=256)
    assert made.input_ids.shape == (3, 108) and len(set(map(tuple, made.input_ids.tolist()))) == 3
    assert made.windows.shape == (2, 32) and set(made.windows.flatten().tolist()) == set(tokenizer("e").input_ids)
    assert made.quality_protocol["scored_tokens"] == 62

"""Structural rules: which module may import which, how long a file may be, and files that name others."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT, environment

TRAINER = sorted((ROOT / "trainer").rglob("*.py"))
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.py") if p.name != "__init__.py")
PARTS = sorted(p for folder in ("models", "data") for p in (ROOT / "recipes" / folder).glob("*.py"))
BESIDE = sorted(p for folder in ("commands", "baselines", "experiments") for p in (ROOT / "recipes" / folder).glob("*.py"))
HEAVY = ("deepspeed", "transformers", "wandb", "datasets", "matplotlib")

# The layers of trainer/, top to bottom: each imports from those below it, and from nothing above.
LAYERS = (
    "main",
    "planning",
    "launched_run",
    "evaluate",
    "debugging",
    "loop",
    "setup",
    "checks",
    "attention_kernels",
    "micro_batches",
    "checkpoints",
    "reporting",
    "backends",
    "evaluation",
    "recipe",
    "optimisation",
    "initial_weights",
    "data",
    "command_line",
    "distributed",
    "state",
    "fields",
    "errors",
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, at_run_time: bool = False) -> set[str]:
    """Dotted names of all that a file imports, wherever in it the import stands; `at_run_time`: not those for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if at_run_time and id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            names |= {f"{node.module}.{name.name}" for name in node.names}
    return names


def python(script: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def layer(name: str) -> str:
    """The layer of a dotted name below trainer."""
    return name.split(".")[1]


def test_there_is_something_to_look_at() -> None:
    assert {"loop.py", "recipe.py", "config.py", "zero.py", "stream.py"} <= {p.name for p in TRAINER}
    assert "gpt2_wikitext.py" in {p.name for p in RECIPES}
    assert {"gpt2.py", "text.py"} <= {p.name for p in PARTS}
    assert len(BESIDE) > 9
    assert "trainer.command_line.sections" in " ".join(imports(ROOT / "recipes" / "gpt2_wikitext.py"))


@pytest.mark.parametrize("path", TRAINER, ids=relative)
def test_the_trainer_imports_neither_recipes_nor_tools(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] in ("recipes", "tools", "tests")}


@pytest.mark.parametrize("path", TRAINER, ids=relative)
def test_imports_inside_the_trainer_run_down(path: Path) -> None:
    own = (path.relative_to(ROOT / "trainer").parts[0]).removesuffix(".py")
    if own == "__init__":
        return
    above = LAYERS[: LAYERS.index(own)]
    assert not {name for name in imports(path, at_run_time=True) if name.startswith("trainer.") and layer(name) in above}


def test_every_module_has_its_layer() -> None:
    tops = {
        p.name.removesuffix(".py") for p in (ROOT / "trainer").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert tops - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", PARTS, ids=relative)
def test_models_and_data_import_neither_the_trainer_nor_a_recipe(path: Path) -> None:
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] in ("trainer", "tools", "tests")}
    assert not {name for name in names if name.startswith("recipes.") and name.split(".")[1] not in ("models", "data")}


@pytest.mark.parametrize("path", BESIDE, ids=relative)
def test_nothing_beside_a_recipe_imports_one(path: Path) -> None:
    recipes = {p.stem for p in RECIPES}
    assert not {name for name in imports(path) if name.startswith("recipes.") and name.split(".")[1] in recipes}


def test_no_module_of_the_recipes_is_part_of_a_circle() -> None:
    graph = {}
    for path in [*RECIPES, *PARTS, *BESIDE]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {n.rpartition(".")[0] for n in imports(path)} | imports(path)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for name in graph.get(todo.pop(), ()):
                if name in graph and name not in seen:
                    seen.add(name)
                    todo.append(name)
        return seen

    assert not {name for name in graph if name in reachable(name)}


def test_the_loop_is_short_and_knows_no_backend() -> None:
    loop = ROOT / "trainer" / "loop.py"
    assert lines(loop) < 300
    assert not {word for word in ("deepspeed", "zero", "ddp", "fsdp") if word in loop.read_text(encoding="utf-8").lower()}


@pytest.mark.parametrize("path", TRAINER, ids=relative)
def test_files_of_the_trainer_are_short(path: Path) -> None:
    assert lines(path) <= 300


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_are_short(path: Path) -> None:
    assert lines(path) < 250


def test_no_file_is_a_catch_all() -> None:
    folders = [ROOT / name for name in ("trainer", "recipes", "tools", "tests")]
    stems = {path.stem for folder in folders for path in folder.rglob("*.py")}
    assert not stems & {"utils", "util", "helpers", "helper", "misc", "common"}


def test_importing_the_trainer_imports_nothing_heavy() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in TRAINER if path.stem != "__init__"]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted(sys.modules.keys() & set({HEAVY!r}))\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
        "print(len(sys.modules))\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > len(names)


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_the_parts_of_help_import_no_torch(recipe: str) -> None:
    done = python(f"import recipes.{recipe}, sys; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


# ------------------------------------------------------------------------------------------------- launch configuration

LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
NEEDED = {
    "cpu",
    "cpu_2proc",
    "single_gpu",
    "ddp",
    "zero1",
    "zero2",
    "zero3",
    "zero3_offload",
    "multi_node_ddp",
    "multi_node_fsdp",
    "multi_node_zero2",
    "multi_node_zero3",
}


def test_every_launch_configuration_exists() -> None:
    assert {path.stem for path in LAUNCHES} >= NEEDED


@pytest.mark.parametrize("path", LAUNCHES, ids=relative)
def test_accelerate_reads_its_file(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.num_processes == raw["num_processes"]
    assert "mixed_precision" not in raw, "it would win over --mixed_precision auto"
    deepspeed = raw.get("deepspeed_config")
    assert (raw["distributed_type"] == "DEEPSPEED") == (deepspeed is not None) == ("zero" in path.stem)
    if deepspeed:
        assert (ROOT / deepspeed["deepspeed_config_file"]).is_file()
        assert deepspeed["zero3_init_flag"] is False
        inner = {"deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher", "deepspeed_hostfile"}
        assert set(deepspeed) <= inner


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=relative)
def test_deepspeed_files_leave_to_the_loop_what_is_its_own(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    ours = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {key: config[key] for key in ours} == dict.fromkeys(ours, "auto")
    zero = config["zero_optimization"]
    assert zero["stage"] == int(path.stem.removeprefix("zero")[0])
    assert ("offload_optimizer" in zero) == path.stem.endswith("offload")
    buckets = {key: value for key, value in zero.items() if "bucket" in key or "threshold" in key}
    assert all(isinstance(value, int | float) for value in buckets.values()), "auto needs model.config and is tiny"
    assert not config.keys() & {"optimizer", "scheduler"}


def test_the_page_beside_the_deepspeed_files_explains_every_key() -> None:
    page = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    sections = [
        json.loads(path.read_text(encoding="utf-8"))["zero_optimization"] for path in (ROOT / "ds_configs").glob("*.json")
    ]
    keys = {key for section in sections for key in section} | set(sections[0].get("offload_param", ()))
    assert len(keys) > 9
    assert {key for key in keys if f"`{key}`" not in page} == set()


def test_there_are_four_deepspeed_files_and_each_is_used() -> None:
    files = {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    assert files >= {"zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"}
    used = {Path(name).name for path in LAUNCHES if (name := _deepspeed_file(path))}
    assert used == files


def _deepspeed_file(path: Path) -> str | None:
    deepspeed = yaml.safe_load(path.read_text(encoding="utf-8")).get("deepspeed_config")
    return deepspeed["deepspeed_config_file"] if deepspeed else None

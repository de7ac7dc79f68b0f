"""`--help`: what people use first, every flag with `all`, nothing that does nothing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recipes.collatz import Collatz
from recipes.finetune_lm import FinetuneLM
from recipes.gpt2_wikitext import Gpt2Wikitext
from recipes.pfn_raventos import PFNRaventos
from recipes.tinystories_lm import TinyStoriesLM
from recipes.vit_relpos import VitRelpos
from trainer import main
from trainer.command_line import config, help
from trainer.command_line.flags import flag_names
from trainer.errors import UserError
from trainer.planning.flags import PLAN_HELP, take_plan_flags
from trainer.recipe import Recipe

RECIPES = [Gpt2Wikitext(), TinyStoriesLM(), PFNRaventos(), VitRelpos(), Collatz(), FinetuneLM()]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@pytest.fixture(autouse=True)
def _script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["recipes/mine.py"])


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


@each_recipe
def test_every_flag_is_there_with_all_and_those_that_people_use_without(recipe: Recipe) -> None:
    short, full = (main.help_text(recipe, "train", everything) for everything in (False, True))
    fields = set(flag_names(recipe.config_class).values())
    unused = set(getattr(recipe.config_class, "unused", ()))
    assert flags_in(full) == fields - unused | {flag.removeprefix("--").split()[0] for flag in PLAN_HELP}
    assert flags_in(full) - flags_in(short)
    assert set(help.USUAL) - unused <= flags_in(short)
    assert f"{len(flags_in(full)) - len(flags_in(short))} more flags: --help all" in short
    assert len(short.splitlines()) < len(full.splitlines()) / 1.3
    for alias, field in flag_names(recipe.config_class).items():
        assert (f"--{alias}" in full) == (field not in unused)
    for text in (short, full):
        assert "None" not in text
        assert "MISSING" not in text
        for line in re.split(r"\n(?=  --)", text):
            assert len(re.findall(r"default:|\[[^\]]*\]$", line.strip())) <= 1, line


@each_recipe
def test_the_examples_are_command_lines_of_the_recipe(recipe: Recipe) -> None:
    text = main.help_text(recipe, "train", False)
    examples = [line.strip() for line in text.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()]
    assert len(examples) >= 4
    for example in examples:
        words = shlex.split(example, comments=True)
        argv = words[words.index("recipes/mine.py") + 1 :]
        main.read_command_line(recipe, take_plan_flags(argv)[1])
        if argv[0].startswith("-") and "--preset" not in argv:  # it trains
            assert set(recipe.needs.split()[:1]) <= set(argv), "it would be refused"


@each_recipe
def test_the_help_of_a_command_lists_its_flags(recipe: Recipe) -> None:
    for name, command in recipe.commands.items():
        text = main.help_text(recipe, name, False)
        assert f"usage: python recipes/mine.py {name} [FLAGS]" in text
        assert name in main.help_text(recipe, "train", False)
        for field in flag_names(command.flags).values():
            assert f"--{field}" in text or f"  {field.upper()}" in text


def test_it_is_printed_by_rank_0_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            main.read_command_line(RECIPES[0], ["evaluate", "--model_path", "x", "--help"])
        assert not end.value.code
        assert ("--stride" in capsys.readouterr().out) == (rank == "0")


@pytest.mark.parametrize(
    ("recipe", "argv", "message"),
    [
        (
            PFNRaventos(),
            ["--warmup_steps", "10"],
            "warmup_steps 10 would do nothing: the learning rate follows one cycle; give --schedule",
        ),
        (Collatz(), ["--max_epochs", "2"], "max_epochs 2 would do nothing: numbers never run out; give --max_steps"),
        (Collatz(), ["--use_wandb", "False"], "--use_wandb takes no value: give --use_wandb or --no_use_wandb"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(recipe: Recipe, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config.parse(recipe.config_class, recipe.presets, argv, recipe.name)


@each_recipe
def test_the_config_of_a_run_is_a_config_file_again(recipe: Recipe, tmp_path: Path) -> None:
    """It holds the flags that do nothing as well."""
    first = config.parse(recipe.config_class, recipe.presets, [], recipe.name).config
    (tmp_path / "config.yaml").write_text(config.to_yaml(first))
    argv = ["--config", str(tmp_path / "config.yaml")]
    again = config.parse(recipe.config_class, recipe.presets, argv, recipe.name).config
    assert (again.model, again.data) == (first.model, first.data)

"""Rows to fine-tune on: what is given and what is to be said, in ids, and how examples lie in samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TEMPLATE, WORDS

from recipes.data.examples import IGNORED, PackedExamples, encode_rows, find_rows, load_chat_tokenizer
from recipes.data.instructions import instruction_rows
from recipes.data.text import TokenSplit
from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer

END = 0


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))


def tokenizer_of(template: str | None = None, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    trained = train_tokenizer([" ".join(WORDS)] * 3, 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END_OF_TEXT, **special)
    tokenizer.chat_template = template
    return tokenizer


def encoded(folder: Path, rows: list[Any], tokenizer: Any, column: str = "text", name: str = "train.jsonl") -> TokenSplit:
    """The training rows; one more is there for validation."""
    folder.mkdir()
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    (folder / "validation.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    return encode_rows(find_rows("", [str(folder)]), tokenizer, column)[0]["train"]


def texts(split: TokenSplit, tokenizer: Any) -> list[tuple[str, str]]:
    """(given, to be said) of each example."""
    examples = np.split(np.asarray(split.ids), split.row_ends[:-1])
    return [(tokenizer.decode(-1 - one[one < 0]), tokenizer.decode(one[one >= 0])) for one in examples]


def test_only_a_completion_is_to_be_said_and_it_ends(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    split = encoded(tmp_path / "rows", [{"prompt": "a river", "completion": " of stone"}], tokenizer)
    assert texts(split, tokenizer) == [("a river", f" of stone{END_OF_TEXT}")]


def test_each_answer_of_a_conversation_is_an_example_behind_all_before_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(TEMPLATE)
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "of"), ("user", "river"), ("assistant", "stone")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "source": None}
    first = "<|system|>be brief<|user|>a<|assistant|>"
    second = f"{first}of{END_OF_TEXT}<|user|>river<|assistant|>"
    split = encoded(tmp_path / "rows", [row, {"prompt": "a", "completion": "b"}], tokenizer)
    assert texts(split, tokenizer) == [
        (first, f"of{END_OF_TEXT}"),
        (second, f"stone{END_OF_TEXT}"),
        ("<|user|>a<|assistant|>", f"b{END_OF_TEXT}"),
    ]


def test_text_is_said_throughout_and_rows_without_any_are_counted(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    rows = [{"story": "a river"}, {"story": None}, {"story": " "}, {"story": "stone"}]
    split = encoded(tmp_path / "rows", rows, tokenizer, column="story")
    assert texts(split, tokenizer) == [("", f"a river{END_OF_TEXT}"), ("", f"stone{END_OF_TEXT}")]
    corpus = find_rows("", [str(tmp_path / "rows")])
    assert encode_rows(corpus, tokenizer, "story")[1] == ["2 rows without text or answer passed over"]
    plain = encoded(tmp_path / "plain", ["a river", "", "stone"], tokenizer, name="train.txt")
    assert texts(plain, tokenizer) == texts(split, tokenizer)


def test_a_tokenizer_that_begins_texts_with_a_token_does_so_once(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(bos_token="a")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", begin)])
    split = encoded(tmp_path / "rows", [{"prompt": "river", "completion": " of"}], tokenizer)
    assert split.ids[0] == -1 - begin
    assert texts(split, tokenizer) == [("ariver", f" of{END_OF_TEXT}")]


@pytest.mark.parametrize(
    ("rows", "template", "words"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"question": "a"}],
            None,
            "line 2: it has question: messages, prompt and completion, or text",
        ),
        ([{"messages": [{"role": "user", "content": "a"}]}], None, "messages need a chat template, and the tokenizer has none"),
        (
            [{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}],
            "{{ raise_exception('no') }}",
            "the chat template refuses messages",
        ),
        (
            [{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}],
            "{{ messages | length }}",
            "does not put the answer behind what was said",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            TEMPLATE,
            r"nothing to learn for train \(1 row without text or answer passed over\)",
        ),
        (['"hello"'], TEMPLATE, r"train.jsonl, line 1 is no JSON object: hello; mend it"),
        (["", "5"], TEMPLATE, "train.jsonl, line 2 is no JSON object: 5; mend it"),
        (
            [{"messages": ["a", "b"]}],
            TEMPLATE,
            r'train.jsonl, line 1: messages are no list of .*: {"messages": \["a", "b"\]}; mend them',
        ),
        ([{"messages": {"role": "user"}}], TEMPLATE, "messages are no list"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}], TEMPLATE, "messages are no list"),
        ([{"messages": [{"content": "a"}]}], TEMPLATE, "messages are no list"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_refused(rows: Any, template: str | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        encoded(tmp_path / "rows", rows, tokenizer_of(template))


@pytest.mark.parametrize("kind", ["parquet", "saved", "txt"])
def test_a_row_of_another_form_is_named_in_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    import datasets

    table, folder = datasets.Dataset.from_dict({"question": ["a river", "of"]}), tmp_path / "rows"
    if kind == "saved":
        datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(folder)
    else:
        folder.mkdir()
        for split in ("train", "validation"):
            path = folder / f"{split}.{kind}"
            table.to_parquet(path) if kind == "parquet" else path.write_text("a river")
    named = {
        "parquet": "train.parquet, row 1: it has question",
        "saved": "rows, train, row 1: it has",
        "txt": "train.txt: it has text",
    }
    with pytest.raises(ValueError, match=named[kind]):
        encode_rows(find_rows("", [str(folder)]), tokenizer_of(), "story")


def split_of(*examples: list[int]) -> TokenSplit:
    return TokenSplit(np.concatenate(examples).astype(np.int32), np.cumsum([len(one) for one in examples]), 0, "")


def test_examples_lie_side_by_side_each_from_position_0() -> None:
    """Given 1 2, said 3 0; given 4, said 5 6 0; all of 7 8 0 said."""
    packed = PackedExamples(split_of([-2, -3, 3, 0], [-5, 5, 6, 0], [7, 8, 0]), length=7, vocab_size=9, packing=True)
    assert len(packed) == 2
    batch = {name: values.tolist() for name, values in packed.__getitems__([0, 3]).items()}
    assert batch == {
        "input_ids": [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]],
        "labels": [[IGNORED, 3, 0, 5, 6, 0], [8, 0, IGNORED, IGNORED, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]],
    }


def test_what_a_bigram_is_measured_on_is_what_the_network_predicts() -> None:
    packed = PackedExamples(split_of([-2, -3, 3, 0], [7, 8, 0], [-5, 5, 6, 0]), length=7, vocab_size=9, packing=True)
    ids, predicted = packed.predicted()
    assert ids.tolist() == [1, 2, 3, 0, 7, 8, 0, 4, 5, 6, 0]
    labels = torch.cat([packed.__getitems__([row])["labels"].flatten() for row in range(len(packed))])
    assert ids[predicted].tolist() == labels[labels >= 0].tolist() == [3, 0, 8, 0, 5, 6, 0]


def test_long_text_goes_on_and_a_long_example_is_cut() -> None:
    text, long_answer, long_prompt = [1, 2, 3, 4, 5, 6, 0], [-2, 3, 4, 5, 6, 0], [-2, -3, -4, -5, -6, 0]
    packed = PackedExamples(split_of(text, long_answer, long_prompt), length=3, vocab_size=9, packing=False)
    labels = packed.__getitems__(range(3))["labels"].tolist()
    assert labels == [[2, 3, 4], [5, 6, 0], [3, 4, 5]]
    assert (packed.cut, packed.left_out) == (2, 1)


def test_ids_the_network_has_not_and_nothing_to_say_are_refused() -> None:
    with pytest.raises(ValueError, match="token id 9 is not below vocab_size 9"):
        PackedExamples(split_of([-10, 3, 0]), length=7, vocab_size=9, packing=True)
    with pytest.raises(ValueError, match="nothing is left to predict within max_length 1"):
        PackedExamples(split_of([-2, -3, 3, 0]), length=1, vocab_size=9, packing=True)


def test_an_example_as_text_to_show(tmp_path: Path) -> None:
    packed = PackedExamples(split_of([-2, -3, 3, 0], [4, 5, 6, 7, 0]), length=7, vocab_size=9, packing=True)
    assert packed.text_of(0) == ([1, 2], [3, 0])
    assert packed.text_of(1) == ([4], [5, 6, 7, 0])


def test_the_questions_made_on_the_spot_are_the_same_everywhere_and_one_in_ten_is_held_out() -> None:
    rows = instruction_rows()
    assert rows == instruction_rows()
    questions = [json.loads(row)["prompt"] for _, row in rows]
    assert len(set(questions)) == len(rows)
    assert 0.08 < sum(split == "validation" for split, _ in rows) / len(rows) < 0.12


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_a_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_chat_tokenizer(str(tmp_path / name), find_rows("embedded", []))

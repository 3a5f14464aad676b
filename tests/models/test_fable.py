"""The shipped model: it is small, plain `transformers` loads it, its template is separable, and it recalls."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.training.data import Shape, Story, encode, make_story
from models.training.evaluate import MODES, SHAPES, held_out, laid_out, reuse_mask, right_answers
from models.training.examples import document_order, example_stories
from models.training.names import HELD_OUT, TRAIN, Namer, half_of

FABLE = Path(__file__).parents[2] / "models" / "fable"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FABLE)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FABLE, dtype=torch.float32).eval()


def story():
    return make_story(random.Random(7), Shape(documents=3, facts=9, fillers=4, questions=2))


def test_weights_are_at_most_12_mb():
    assert sum(path.stat().st_size for path in FABLE.glob("*.safetensors")) <= 12_000_000


def test_template_is_separable(tokenizer):
    messages = story().messages()
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    one_by_one = [
        token for m in messages for token in tokenizer.apply_chat_template([m], tokenize=True, return_dict=False)
    ]
    assert whole == one_by_one == encode(tokenizer.backend_tokenizer, story()).ids


def test_template_text_and_generation_prompt(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "A."}, {"role": "user", "content": "B?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|system|>A.<end><|user|>B?<end><|assistant|>"
    assert len(tokenizer.encode("<|document|><end><|assistant|><pad>", add_special_tokens=False)) == 4
    assert tokenizer.eos_token == "<end>"


def test_template_refuses_unknown_roles(tokenizer):
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


TEXTS = ("na\u00efve caf\u00e9 e\u0301", "\u4e2d\u6587 \U0001f98a", "  a ,b\t\n\n c 's", "\x00\ufffd", "")


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_halves_of_the_names_never_meet():
    words = {half: {Namer(random.Random(3), half).word() for _ in range(50)} for half in (TRAIN, HELD_OUT)}
    assert all(half_of(word) == half for half, found in words.items() for word in found)


def test_masks_are_those_of_the_reuse_modes():
    segments = torch.tensor([[0, 1, 2, 255]]).expand(3, 4)
    exact, independent, anchored = reuse_mask(segments, torch.tensor(list(MODES.values())))[:, 0].int().tolist()
    assert exact == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert independent == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]
    assert anchored == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("mode", MODES)
def test_held_out_facts_are_recalled(model, tokenizer, mode):
    stories = held_out(SHAPES["16 facts, 4 documents"], 20, seed=5)
    right = right_answers(model, tokenizer.backend_tokenizer, stories, MODES[mode], tokens_max=8000)
    assert sum(right) >= 0.95 * len(right)


@pytest.mark.parametrize("mode", MODES)
def test_example_questions_are_answered(model, tokenizer, mode):
    stories = example_stories(document_order(2 + MODES[mode]))[MODES[mode] :: len(MODES)]
    assert all(right_answers(model, tokenizer.backend_tokenizer, stories, MODES[mode], tokens_max=8000))


def test_names_made_of_plain_words_are_copied(model, tokenizer):
    documents = (
        "Farrowin is located in Dunmarrow. Farrowin is famous for its copper bells.",
        "Crystalton is located in Nebulonia. Scholarwick exports walnut tables.",
    )
    asked = {
        "Where is Farrowin located?": "Farrowin is located in Dunmarrow.",
        "What is Farrowin famous for?": "Farrowin is famous for its copper bells.",
        "Where is Crystalton located?": "Crystalton is located in Nebulonia.",
        "What does Scholarwick export?": "Scholarwick exports walnut tables.",
    }
    stories = [Story("Answer in one full sentence.", documents, (exchange,)) for exchange in asked.items()]
    for mode in MODES.values():
        assert all(right_answers(model, tokenizer.backend_tokenizer, stories, mode, tokens_max=8000))


def test_plain_generate_answers(model, tokenizer):
    asked = example_stories(document_order(1))[0]
    inputs = tokenizer.apply_chat_template(
        asked.messages()[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert answer == "Crystalton is located in Nebulonia.<end>"


def test_an_anchored_document_is_measured_as_it_is_served():
    anchored = laid_out([0, 0, 1, 2, 2, 255], MODES["ANCHORED"])
    assert anchored.source.tolist() == [0, 1, 2, 0, 1, 3, 4, 5], "the second document has a system turn of its own"
    assert anchored.positions.tolist() == [0, 1, 2, 1, 2, 3, 4, 5], "directly before it"
    assert anchored.allowed[-1].tolist() == [True, True, True, False, False, True, True, True], "the tail sees one"

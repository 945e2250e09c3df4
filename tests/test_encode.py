"""From a prompt group to ids, positions and image tensors; the length limit; what a template may be."""

import json
import random

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from unidpo.data.formats import load_pairs
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.errors import ModelError, UserError
from unidpo.model.encode import CHATML, Encoder, PromptTooLong, prompt_positions
from unidpo.model.lengths import TokenCounter
from unidpo.model.load import load_policy, load_processor
from worlds import GOLDEN, group, picture

IMAGE_TOKEN = 2060


@pytest.fixture(scope="module")
def positions():
    return prompt_positions(load_policy(GOLDEN / "model"))


@pytest.fixture(scope="module")
def processor():
    return load_processor(GOLDEN / "model")


@pytest.fixture(scope="module")
def make(positions, processor):
    """An encoder of the golden model, with options."""
    return lambda **options: Encoder(processor, positions, **options)


@pytest.fixture(scope="module")
def make_text(text_model):
    """An encoder of the text-only model, with options."""
    positions, tokenizer = prompt_positions(load_policy(text_model)), load_processor(text_model)
    return lambda **options: Encoder(tokenizer, positions, **options)


def ask(*content, images=(), answers=("yes", "no"), role="user"):
    return PromptGroup(
        (Message(role, content),), tuple(images), tuple(Response(text) for text in answers), (Pair(0, 1, 7),)
    )


def test_ids_labels_positions_and_pixels_are_the_references(golden, make):
    encoder = make(template="chatml")
    lines = (golden / "reference" / "uni_dpo" / "micro_batches.jsonl").read_text().splitlines()[:2]
    groups = load_pairs(golden / "data" / "golden48.json")
    for line, one in zip(lines, groups, strict=False):
        recorded, encoded = json.loads(line), encoder.encode(one)
        prompt = len(encoded.prompt_ids)
        for row, response in enumerate(encoded.response_ids):
            length = recorded["n_tok"][row]
            assert [*encoded.prompt_ids.tolist(), *response.tolist()] == recorded["input_ids"][row][:length]
            assert recorded["labels"][row][:length] == [-100] * prompt + response.tolist()
            going_on = range(encoded.next_position, encoded.next_position + len(response))
            for axis in range(3):
                ours = [*encoded.position_ids[axis].tolist(), *going_on]
                assert ours == recorded["position_ids"][axis][row][:length]
        # The authors' batch holds the picture twice, once per row.
        assert 2 * encoded.vision["pixel_values"].double().sum().item() == pytest.approx(
            recorded["pixel_sum"], rel=1e-6
        )
        assert encoded.vision["image_grid_thw"].tolist() == recorded["image_grid_thw"][:1]


def test_chatml_is_the_golden_models_own_template(make):
    history = (
        Message("system", ("Be brief.",)),
        Message("user", ("Look: ", IMAGE, " and ", IMAGE)),
        Message("assistant", ("Two.",)),
        Message("user", ("Sure?",)),
    )
    for messages in (history, history[1:], history[3:]):
        assert make(template="chatml").prompt_text(messages) == make().prompt_text(messages)


def test_an_image_stands_where_its_mark_stands_and_text_that_spells_a_mark_stays_text(make):
    encoder = make()
    image = picture(random.Random(0))
    encoded = encoder.encode(ask("Say <image> ", IMAGE, " now", images=[image]))
    text = encoder.tokenizer.decode(encoded.prompt_ids)
    assert (
        "user\nSay <image> <|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|> now"
        in text
    )
    assert (encoded.prompt_ids == IMAGE_TOKEN).tolist() == encoded.mm_token_type_ids.bool().tolist()


def test_images_come_in_the_order_of_their_marks(make):
    wide, tall = Image.new("RGB", (112, 56)), Image.new("RGB", (56, 112), (255, 255, 255))
    encoded = make().encode(ask(IMAGE, "then", IMAGE, images=[wide, tall]))
    assert encoded.vision["image_grid_thw"].tolist() == [[1, 4, 8], [1, 8, 4]]


def test_a_response_has_the_same_tokens_whatever_precedes_it(make):
    encoder = make()
    alone, after_image = encoder.encode(ask("x")), encoder.encode(group(images=1))
    assert alone.response_ids[0].tolist() == encoder.response_ids(Response("yes"))
    assert encoder.tokenizer.decode(alone.response_ids[0]) == "yes<|im_end|>\n"
    assert after_image.response_ids[1].tolist()[-2:] == alone.response_ids[1].tolist()[-2:]


@pytest.mark.parametrize("images", [0, 1])
def test_no_token_comes_from_the_tokenizer_that_the_template_did_not_write(positions, images):
    """Llama's and Gemma's tokenizers put one before each text; before a response it would be in the middle."""
    processor = load_processor(GOLDEN / "model")
    one, plain = group(images=images), Encoder(load_processor(GOLDEN / "model"), positions)
    first = ("<|endoftext|>", processor.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[first]
    )
    assert processor.tokenizer("red")["input_ids"][0] == first[1]
    encoder = Encoder(processor, positions)
    found, expected = encoder.encode(one), plain.encode(one)
    assert found.prompt_ids.tolist() == expected.prompt_ids.tolist()
    assert [ids.tolist() for ids in found.response_ids] == [ids.tolist() for ids in expected.response_ids]
    assert TokenCounter(encoder).one(one) == TokenCounter(plain).one(one)


def test_only_the_wanted_responses_are_encoded(make):
    one = group(responses=(3, 5, 4))
    every, some = make().encode(one), make().encode(one, [2, 0])
    assert [ids.tolist() for ids in some.response_ids] == [every.response_ids[i].tolist() for i in (2, 0)]


def test_a_response_is_cut_on_the_right_and_counted(make):
    one = group(images=1, responses=(2, 30))
    whole = make().encode(one)
    limit = len(whole.prompt_ids) + len(whole.response_ids[0]) + 1
    cut = make(max_length=limit).encode(one)
    room = limit - len(whole.prompt_ids)
    assert cut.cut_tokens == (0, len(whole.response_ids[1]) - room)
    assert cut.response_ids[0].tolist() == whole.response_ids[0].tolist()
    assert cut.response_ids[1].tolist() == whole.response_ids[1].tolist()[:room]


def test_a_prompt_is_never_cut(make):
    """At every limit either the whole prompt with all its image tokens is there, or nothing is."""
    one = group(images=2, responses=(3, 3))
    whole = make().encode(one)
    prompt = len(whole.prompt_ids)
    for limit in (1, prompt // 2, prompt - 1, prompt):
        with pytest.raises(PromptTooLong, match=rf"{prompt} tokens.*data\.max_length={limit}"):
            make(max_length=limit).encode(one)
    assert make(max_length=prompt + 1).encode(one).prompt_ids.tolist() == whole.prompt_ids.tolist()


def test_a_template_from_a_file(make, tmp_path):
    path = tmp_path / "own.jinja"
    turn = "[{{ m.role }}] {{ m.content[0].text }}!"
    path.write_text("{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}>{% endif %}")
    encoder = make(template=str(path))
    assert encoder.prompt_text(ask("hello").messages) == "[user] hello!>"
    assert encoder.tokenizer.decode(encoder.response_ids(Response("yes"))) == "yes!"


def test_a_template_that_closes_no_turn_gets_the_end_of_text_token(make, tmp_path):
    path = tmp_path / "open.jinja"
    path.write_text("{% for m in messages %}{{ m.content[0].text }} {% endfor %}")
    encoder = make(template=str(path))
    assert encoder.tokenizer.decode(encoder.response_ids(Response("yes"))) == "yes<|im_end|>"


def test_a_template_nobody_knows(make):
    with pytest.raises(UserError, match=r"data\.template=chatmll.*chatml"):
        make(template="chatmll")


@pytest.mark.parametrize("text", ["{% for m in messages %}", "{{ raise_exception('no system role') }}"])
def test_a_template_that_does_not_render(make, tmp_path, text):
    path = tmp_path / "broken.jinja"
    path.write_text(text)
    with pytest.raises(UserError, match=r"template.*data\.template"):
        make(template=str(path)).prompt_text(ask("hello").messages)


def test_a_template_that_renders_to_nothing(make, tmp_path):
    path = tmp_path / "empty.jinja"
    path.write_text("{% if false %}x{% endif %}")
    with pytest.raises(ModelError, match=r"nothing.*data\.template=chatml"):
        make(template=str(path)).encode(ask("hello"))


def test_a_model_without_a_template(positions):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*data\.template=chatml"):
        Encoder(tokenizer, positions)
    Encoder(tokenizer, positions, template="chatml")


def test_a_tokenizer_is_the_processor_of_a_text_model(make_text):
    encoder = make_text()
    encoded = encoder.encode(ask("hello"))
    assert encoder.tokenizer.decode(encoded.prompt_ids).endswith("user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert encoded.position_ids.tolist() == [list(range(len(encoded.prompt_ids)))]
    assert encoded.vision == {}


def test_images_and_a_text_model(make_text):
    one = group(images=1)
    for use in (make_text().encode, TokenCounter(make_text()).one):
        with pytest.raises(ModelError, match="takes none"):
            use(one)


def test_text_prompts_of_a_vision_model_have_its_three_axes(make):
    encoded = make().encode(group(images=0))
    assert encoded.position_ids.tolist() == [list(range(len(encoded.prompt_ids)))] * 3


def test_the_fingerprint_names_what_changes_the_tensors(make, make_text, positions, tmp_path):
    base = make().fingerprint()
    assert make().fingerprint() == base
    assert Encoder(load_processor(GOLDEN / "model"), positions).fingerprint() == base
    own = tmp_path / "own.jinja"
    own.write_text(CHATML + " ")
    begins_otherwise = tmp_path / "begins-otherwise.jinja"
    begins_otherwise.write_text(CHATML.replace("a helpful", "a grumpy"))
    more_words = load_processor(GOLDEN / "model")
    more_words.tokenizer.add_tokens(["circle"])
    other_images = load_processor(GOLDEN / "model")
    other_images.image_processor.image_mean = [0.5, 0.5, 0.5]
    others = {
        "end of the template": make(template=str(own)),
        "beginning of the template": make(template=str(begins_otherwise)),
        "max_length": make(max_length=4095),
        "max_pixels": make(max_pixels=768 * 767),
        "tokenizer": Encoder(more_words, positions),
        "image processor": Encoder(other_images, positions),
        "text model": make_text(),
    }
    prints = {what: encoder.fingerprint() for what, encoder in others.items()}
    assert len({base, *prints.values()}) == 1 + len(prints), prints


def test_using_an_encoder_leaves_its_fingerprint(make):
    """Tokenizers keep the padding and truncation of their last call as state; the store must be found again."""
    encoder = make()
    before = encoder.fingerprint()
    encoder.encode(group())
    encoder.tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=5)
    assert encoder.fingerprint() == before


def test_positions_come_from_the_model(make, positions):
    encoded = make().encode(group(images=1))
    model = load_policy(GOLDEN / "model")
    types = encoded.mm_token_type_ids[None]
    grid = encoded.vision["image_grid_thw"]
    expected, _ = model.model.get_rope_index(encoded.prompt_ids[None], mm_token_type_ids=types, image_grid_thw=grid)
    assert torch.equal(encoded.position_ids, expected[:, 0])
